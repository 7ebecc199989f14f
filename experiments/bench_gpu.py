"""What only a GPU can show: bfloat16 training, the peak's share, memory, and who waits for whom.

The whole section takes less than five minutes: no case begins after four, and compilations have a
limit of their own. transformers computes every expert for every token, so ratios against it grow
with the number of experts by construction.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from time import monotonic

import torch
from torch import Tensor

from experiments.bench_gpu_rows import rows
from experiments.bench_measure import (
    Bench,
    Row,
    Skip,
    agree,
    peak_memory,
    scaled,
    time_limit,
    waits,
)
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
from experiments.bench_parts import mixtures
from experiments.bench_step import RECIPE
from experiments.bench_step_worker import objective_of
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.data.batch import collate
from sandbox.data.charts import Charts
from sandbox.train.optim import build_optimizer

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
SECONDS = 240  # after these no further case begins
COMPILE = 100  # that a compilation may take

Case = Callable[[Bench, BackboneConfig, int, int], Iterator[Row | Skip]]


def gpu(bench: Bench) -> Iterator[Row | Skip]:
    """bfloat16 on a GPU, or its rehearsal in miniature on a CPU."""
    if not torch.cuda.is_available() and not bench.quick:
        yield Skip("gpu", "all cases", "PyTorch sees no CUDA device")
        return
    bench = replace(bench, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = bench.pick(LARGE, MINIATURE)
    B, T = bench.pick((2, 4096), (2, 24))
    start = monotonic()
    cases: tuple[Case, ...] = (steps, quickstart, rows, mixture, train, compiled)
    for case in cases:
        if monotonic() - start > SECONDS:
            yield Skip("gpu", case.__name__, f"the cases before it took {SECONDS} s")
        elif why := bench.lacks(training_memory(config, B * T, itemsize=2)):
            yield Skip("gpu", case.__name__, why)
        else:
            yield from case(bench, config, B, T)


def steps(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row]:
    """Training step of the backbone, bf16-true and bf16-mixed, over its matmul floor."""
    tokens = random_tokens(bench, config, B, T)
    flops = matmul_flops(config, B, T, train=True)
    for precision, dtype in (("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)):
        torch.manual_seed(0)
        model = Backbone(config).to(bench.device, dtype)
        step = training_step(model, mixed(bench, precision, our_loss(model, tokens)))
        samples, flop = bench.interleave(
            bench.timer(step), bench.per_flop(torch.bfloat16), warmup=3
        )
        what = f"training step, {precision}, {config.experts} experts, {B} x {T} tokens"
        note = (
            f"{what}: {B * T / median(samples):,.0f} tokens/s; "
            f"{utilization(bench, flops / median(samples), 1 / min(flop))}; "
            f"{peak_memory(bench, step) / 1e9:.2f} GB at its peak beyond weights and optimizer; "
            f"the host waits {waits(bench, step)} times"
        )
        floor = scaled(flop, flops)
        yield Row("gpu", what, samples, "matmuls alone", floor, gain=False, note=note)
        del model, step


def mixed(bench: Bench, precision: str, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The loss as Lightning computes it in a precision: bf16-mixed means under autocast."""

    def call() -> Tensor:
        on = precision == "bf16-mixed"
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=on):
            return loss()

    return call


def quickstart(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row]:
    """The quickstart's own step: 16 charts, questions as branches, MuonAdamW."""
    results, counts = [], []
    for precision in ("bf16-mixed", "32-true"):
        torch.manual_seed(0)
        objective = objective_of(RECIPE).to(bench.device)
        optimizer, _ = build_optimizer(objective, objective.optimizer, steps=1000)
        encoder = objective.model.prompts
        samples = [Charts().sample("train", index) for index in range(bench.pick(16, 2))]
        batch = collate([encoder.encode_sample(sample) for sample in samples]).to(bench.device)
        loss = mixed(bench, precision, partial(objective.loss, batch))
        results.append(partial(updated, optimizer, loss))
        results[-1]()
        counts.append(f"{waits(bench, results[-1])} times in {precision}")
    ours, peer = bench.interleave(*map(bench.timer, results), warmup=2)
    what = f"quickstart step, bf16-mixed, {len(batch.tokens)} charts"
    note = f"{what}: the host waits {', '.join(counts)}; "
    note += f"{batch.tokens.numel() / median(ours):,.0f} places/s"
    yield Row("gpu", what, ours, "32-true", peer, note=note)


def updated(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """Forward, backward and update."""
    loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row]:
    """Training step, bf16-true, against transformers'."""
    what = f"training step, bf16-true, {config.experts} experts, {B} x {T} tokens"
    tokens = random_tokens(bench, config, B, T)
    ours, theirs = twins(config, bench.device, torch.bfloat16)
    loss, their = our_loss(ours, tokens), their_loss(theirs, tokens)
    with torch.no_grad():
        agree(f"loss, {what}", loss(), their(), TOLERANCE)
    calls = (training_step(ours, loss), training_step(theirs, their))
    samples, peer = bench.interleave(*map(bench.timer, calls), warmup=3)
    note = "transformers computes every expert for every token: its ratio grows with their number"
    yield Row("gpu", what, samples, "transformers", peer, note=note)


def compiled(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row | Skip]:
    """Training step, bf16-true, under `torch.compile`."""
    what = f"training step, bf16-true, {config.experts} experts, {B} x {T} tokens, compiled"
    tokens = random_tokens(bench, config, B, T)
    torch.manual_seed(0)
    model = Backbone(config).to(bench.device, torch.bfloat16)
    loss = our_loss(model, tokens)
    # Code generation takes a compiler; a rehearsal on a CPU traces only.
    backend = "inductor" if bench.device.type == "cuda" else "aot_eager"
    fast = our_loss(model, tokens, torch.compile(model, backend=backend))
    start = monotonic()
    try:
        with time_limit(COMPILE):
            torch.autograd.grad(fast(), model.head.weight)
    except TimeoutError as error:
        torch.compiler.reset()
        yield Skip("gpu", what, str(error))
        return
    note = f"{what}: the first pass took {monotonic() - start:.0f} s"
    agree(f"loss, {what}", fast(), loss(), TOLERANCE)
    calls = (training_step(model, fast), training_step(model, loss))
    samples, peer = bench.interleave(*map(bench.timer, calls), warmup=3)
    yield Row("gpu", what, samples, "ours, not compiled", peer, note=note)


def utilization(bench: Bench, rate: float, measured: float) -> str:
    """The share of the peak that useful matmuls reach (MFU), measured and by the data sheet."""
    text = f"MFU {rate / measured:.1%} of the measured {measured / 1e12:.3g} TFLOP/s"
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    peak = next((peak for key, peak in DATASHEET.items() if key in name), None)
    return f"{text}, {rate / peak:.1%} of the data sheet's {peak / 1e12:.0f}" if peak else text


def mixture(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row]:
    """Mixture layer, forward and backward, and how often the host waits for the device."""
    what = f"mixture layer, {config.experts} experts, {B * T:,} tokens"
    ours, theirs, dense = mixtures(bench, replace(config, layers=1), B, T, torch.bfloat16)
    for our, their in zip(ours(), theirs(), strict=True):
        # The typical token: rounding may send some to another expert, where two score alike.
        distance = (our - their).float().norm(dim=-1) / their.float().norm(dim=-1)
        agree(what, 1 + distance.median(), torch.ones((), device=bench.device), TOLERANCE)
    note = f"{what}, bf16-true: the host waits {waits(bench, ours)} times"
    samples, peer, dense_peer = bench.interleave(*map(bench.timer, (ours, theirs, dense)))
    yield Row("gpu", what, samples, "Llama4TextMoe", peer, note=note)
    yield Row("gpu", what, samples, "dense SwiGLU", dense_peer, gain=False)
