"""What only a GPU can show: bfloat16 training, the peak's share, compilation, no waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from experiments.bench_measure import Bench, Row, Skip, agree, scaled
from experiments.bench_models import (
    MINIATURE,
    matmul_flops,
    our_loss,
    random_tokens,
    their_loss,
    training_memory,
    training_step,
    twins,
)
from experiments.bench_parts import folded_attention, mixtures, random_heads, there_and_back
from sandbox.backbone.config import BackboneConfig

LARGE = BackboneConfig(
    vocab_size=32_768,
    width=1024,
    layers=8,
    heads=8,
    kv_heads=2,
    head_dim=128,
    expert_hidden=2048,
    experts=16,
    chunk=1024,
    balance="none",
)
# Dense bfloat16 FLOP/s of the data sheets; the first name found in the device's wins.
DATASHEET = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}
TOLERANCE = 3e-2  # relative, in bfloat16


def gpu(bench: Bench) -> Iterator[Row | Skip]:
    """bfloat16 on a GPU, or its rehearsal in miniature on a CPU."""
    if not torch.cuda.is_available() and not bench.quick:
        yield Skip("gpu", "all cases", "PyTorch sees no CUDA device")
        return
    bench = replace(bench, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = bench.pick(LARGE, MINIATURE)
    B, T = bench.pick((2, 4096), (2, 24))
    for case in (train, mixture, folds):
        if why := bench.lacks(training_memory(config, B * T, itemsize=2)):
            yield Skip("gpu", case.__name__, why)
        else:
            yield from case(bench, config, B, T)


def train(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row]:
    """Training step against transformers', with and without `torch.compile`."""
    what = f"training step, {config.experts} experts, {B} x {T} tokens"
    tokens = random_tokens(bench, config, B, T)
    ours, theirs = twins(config, bench.device, torch.bfloat16)
    loss, their = our_loss(ours, tokens), their_loss(theirs, tokens)
    with torch.no_grad():
        agree(f"loss, {what}", loss(), their(), TOLERANCE)
    step = training_step(ours, loss)
    samples, peer, flop = bench.interleave(
        bench.timer(step),
        bench.timer(training_step(theirs, their)),
        bench.per_flop(torch.bfloat16),
        warmup=3,
    )
    flops = matmul_flops(config, B, T, train=True)
    seconds = median(samples)
    note = (
        f"{what}: {B * T / seconds:,.0f} tokens/s; "
        + utilization(bench, flops / seconds, 1 / min(flop))
        + "; floor: its matmuls at the measured rate"
    )
    floor = scaled(flop, flops)
    yield Row("gpu", what, samples, "transformers", peer, floor=floor, note=note)
    del theirs, their

    # Code generation takes a compiler; a rehearsal on a CPU traces only.
    backend = "inductor" if bench.device.type == "cuda" else "aot_eager"
    compiled = our_loss(ours, tokens, torch.compile(ours, backend=backend))
    agree(f"compiled loss, {what}", compiled(), loss(), TOLERANCE)
    samples, peer = bench.interleave(
        bench.timer(training_step(ours, compiled)), bench.timer(step), warmup=3
    )
    yield Row("gpu", f"{what}, compiled", samples, "ours, not compiled", peer)


def utilization(bench: Bench, rate: float, measured: float) -> str:
    """The share of the peak that useful matmuls reach (MFU), measured and by the data sheet."""
    text = f"MFU {rate / measured:.1%} of the measured {measured / 1e12:.3g} TFLOP/s"
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    peak = next((peak for key, peak in DATASHEET.items() if key in name), None)
    return f"{text}, {rate / peak:.1%} of the data sheet's {peak / 1e12:.0f}" if peak else text


def mixture(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row]:
    """Mixture layer, forward and backward, and whether the host ever waits for the device."""
    what = f"mixture layer, {config.experts} experts, {B * T:,} tokens"
    ours, theirs, dense = mixtures(bench, replace(config, layers=1), B, T, torch.bfloat16)
    for our, their in zip(ours(), theirs(), strict=True):
        # The typical token: rounding may send some to another expert, where two score alike.
        distance = (our - their).float().norm(dim=-1) / their.float().norm(dim=-1)
        agree(what, 1 + distance.median(), torch.ones((), device=bench.device), TOLERANCE)
    cuda = bench.device.type == "cuda"
    note = f"{what}: the host never waits for the device"
    try:
        with no_host_sync(bench.device):
            ours()
    except RuntimeError as error:
        note = f"{what}: THE HOST WAITS FOR THE DEVICE ({str(error).splitlines()[0]})"
    samples, peer, dense_peer = bench.interleave(*map(bench.timer, (ours, theirs, dense)))
    yield Row("gpu", what, samples, "Llama4TextMoe", peer, note=note if cuda else "")
    yield Row("gpu", what, samples, "dense SwiGLU", dense_peer, gain=False)


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Within, whatever makes the host wait for a CUDA device raises RuntimeError."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def folds(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row]:
    """Chunked attention: folded rows against `flex_attention` under a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, C = 4 * T, config.chunk or T
    cuda = bench.device.type == "cuda"
    mask = create_block_mask(
        lambda b, h, q, k: (q >= k) & (q // C == k // C), None, None, T, T, device=str(bench.device)
    )
    kernel = torch.compile(flex_attention) if cuda else flex_attention

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return kernel(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    qkv = random_heads(bench, config, T, torch.bfloat16)
    # On a CPU, flex_attention has no backward.
    runs = [
        there_and_back(call, *qkv) if cuda else forward_only(call, *qkv)
        for call in (folded_attention(config, bench.device, T), flex)
    ]
    what = f"chunked attention, {T:,} tokens, chunk {C}" + ("" if cuda else ", forward only")
    for our, their in zip(runs[0](), runs[1](), strict=True):
        agree(what, our, their, TOLERANCE)
    samples, peer = bench.interleave(*map(bench.timer, runs), warmup=3)
    yield Row("gpu", what, samples, "flex_attention", peer)


def forward_only(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], list[Tensor]]:
    """The result of ``call`` on inputs, without gradients."""

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [call(*inputs)]

    return run
