"""Single parts: chunked attention, the mixture layer, and the cost of length.

The mixture layer has two kinds of peer. transformers' computes every expert for every token, so
that ratio grows with the number of experts by construction; the loop over experts of
``bench_peers`` computes, like ours, what was routed and nothing else.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench_measure import Bench, Row, Sampler, Skip, agree
from experiments.bench_models import our_loss, random_tokens, shape, twins
from experiments.bench_peers import ExpertLoop
from sandbox.backbone import backends, rope
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.moe import FeedForward
from sandbox.backbone.transformer import Backbone
from sandbox.backbone.visibility import Visibility


def there_and_back(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], list[Tensor]]:
    """Forward and backward of ``call`` on inputs: its result, and the gradients of the inputs.

    Gradients of parameters are computed too, and dropped.
    """
    torch.manual_seed(2)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        downstream = torch.randn_like(call(*leaves))
    parameters = list(call.parameters()) if isinstance(call, nn.Module) else []

    def run() -> list[Tensor]:
        out = call(*leaves)
        gradients = torch.autograd.grad(out, [*leaves, *parameters], downstream)
        return [out.detach(), *gradients[: len(leaves)]]

    return run


def attention(bench: Bench) -> Iterator[Row | Skip]:
    """Chunked attention, forward and backward, against SDPA under a dense boolean mask."""
    cases = [(2048, None), (8192, 20.0), (16384, 45.0)]
    for T, goal in bench.pick(cases, [(64, None), (128, 20.0)]):
        config = shape(bench, chunk=bench.pick(512, 16))
        what = f"{T:,} tokens, chunk {config.chunk}"
        if why := bench.lacks(10 * T * T):
            yield Skip("attention", what, why)
            continue
        qkv = random_heads(bench, config, T)
        folded = there_and_back(folded_attention(config, bench.device, T), *qkv)
        dense = there_and_back(masked_attention(config, bench.device, T), *qkv)
        for ours, theirs in zip(folded(), dense(), strict=True):
            agree(f"attention, {what}", ours, theirs, 1e-4)
        samples, peer = bench.interleave(
            per_token(bench, folded, T), per_token(bench, dense, T), warmup=0
        )
        yield Row(
            "attention", what, samples, "SDPA, dense mask", peer, "s/token", goal=goal, length=T
        )

    yield branched(bench)


def branched(bench: Bench) -> Row:
    """Local attention of a row with eight branches, against a plain row of as many tokens."""
    config = shape(bench, chunk=bench.pick(512, 16))
    T, branches, length = bench.pick((8192, 8, 64), (128, 4, 8))
    trunk = T - branches * length
    after = torch.arange(length) + trunk
    rows = {
        "positions": torch.cat((torch.arange(trunk), after.repeat(branches)))[None],
        "branches": torch.cat(
            (
                torch.zeros(trunk, dtype=torch.int64),
                torch.arange(branches).repeat_interleave(length) + 1,
            )
        )[None],
    }
    rows = {name: row.to(bench.device) for name, row in rows.items()}
    qkv = random_heads(bench, config, T)
    plain = there_and_back(folded_attention(config, bench.device, T), *qkv)
    ours = there_and_back(folded_attention(config, bench.device, T, **rows), *qkv)
    samples, peer = bench.interleave(
        per_token(bench, ours, T), per_token(bench, plain, T), warmup=1
    )
    what = f"{T:,} tokens of which {branches} branches, chunk {config.chunk}"
    return Row(
        "attention", what, samples, "ours, a plain row", peer, "s/token", goal=0.67, length=T
    )


def per_token(bench: Bench, call: Callable[[], object], T: int) -> Sampler:
    """A sampler of the call's seconds per token."""
    return lambda: bench.seconds(call) / T


def random_heads(
    bench: Bench, config: BackboneConfig, T: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random queries, keys and values of one row, ``[1, T, heads, K]`` each."""
    torch.manual_seed(0)
    return [
        torch.randn(1, T, heads, config.head_dim, device=bench.device, dtype=dtype)
        for heads in (config.heads, config.kv_heads, config.kv_heads)
    ]


def folded_attention(
    config: BackboneConfig, device: torch.device, T: int, **coordinates: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Our local attention of a row of T tokens, plain unless it has coordinates ``[1, T]``."""
    frequency = rope.frequencies(config.head_dim, config.rope_theta).to(device)
    positions = coordinates.pop("positions", torch.arange(T, device=device)[None])
    view = Visibility(config, frequency, positions, **coordinates, plain=not coordinates)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backends.of(q).attend(q[0], k[0], v[0], view, local=True)[None]

    return attend


def masked_attention(
    config: BackboneConfig, device: torch.device, T: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same by SDPA under a mask ``[T, T]``, made once."""
    place = torch.arange(T, device=device)
    mask = place[:, None] >= place
    mask &= place[:, None] // config.chunk == place // config.chunk
    repeats = config.heads // config.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Repeated heads, not `enable_gqa`: with a mask, that would cost CUDA its fast kernels.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend


DENSE_PEER = "Llama4TextMoe computes every expert for every token: its ratio grows with E"
LOOPS = "the loop's backward pass writes a gradient of all experts for each, unless unbound"


def moe(bench: Bench) -> Iterator[Row | Skip]:
    """Mixture layer, forward and backward: transformers', a loop over experts, a dense layer."""
    goals = {4: (None, None), 16: (1.85, 1.2), 64: (16.0, 1.6), 128: (None, 2.0)}
    B, T = bench.pick((4, 512), (2, 8))
    for experts, (least, most) in bench.pick(goals, {2: (None, None), 4: (1.85, 1.2)}).items():
        config = shape(bench, experts=experts, layers=1)
        what = f"{experts} experts, {B * T:,} tokens"
        kept = experts * B * T * (4 * config.width + 8 * config.expert_hidden)
        if why := bench.lacks(4 * kept):
            yield Skip("moe", what, why)
            continue
        ours, theirs, dense, *loops = mixtures(bench, config, B, T, loops=least is not None)
        results = [run() for run in (ours, theirs, *loops)]
        for result in results[1:]:
            for our, their in zip(results[0], result, strict=True):
                agree(f"moe, {what}", our, their, 1e-4)
        # Apart from transformers' layer: whatever follows that one in a round finds memory in such
        # disorder that it takes two to three times as long. The dense layer there is not counted.
        calls = (ours, dense, *loops)
        samples, *peers = bench.interleave(*map(bench.timer, calls), warmup=1)
        yield Row("moe", what, samples, "dense SwiGLU", peers[0], gain=False, goal=most)
        if loops:
            yield Row("moe", what, samples, "expert loop", peers[1], goal=least, note=LOOPS)
            yield Row("moe", what, samples, "expert loop, unbound", peers[2])
        samples, peer, _ = bench.interleave(*map(bench.timer, (ours, theirs, dense)), warmup=0)
        yield Row("moe", what, samples, "Llama4TextMoe", peer, note=DENSE_PEER)


def mixtures(
    bench: Bench,
    config: BackboneConfig,
    B: int,
    T: int,
    dtype: torch.dtype = torch.float32,
    *,
    loops: bool = False,
) -> list[Callable[[], list[Tensor]]]:
    """Forward and backward of three layers: ours, transformers' twin, a dense one.

    The dense one is as wide as the shared expert and the visited ones together. With ``loops``, two
    more on the same weights: the loop over experts as torchtune writes it, and unbound.
    """
    ours, theirs = twins(config, bench.device, dtype)
    mixture, their_mixture = ours.layers[0].ffn, theirs.model.layers[0].feed_forward
    active = (config.top_k + config.shared_expert) * config.expert_hidden
    dense = FeedForward(config.width, active).to(bench.device, dtype)
    layers: list[nn.Module] = [Result(mixture), Result(their_mixture), dense]
    if loops:
        layers += [Result(ExpertLoop(mixture, unbound=unbound)) for unbound in (False, True)]
    torch.manual_seed(3)
    x = torch.randn(B, T, config.width, device=bench.device, dtype=dtype)
    return [there_and_back(layer, x) for layer in layers]


class Result(nn.Module):
    """A mixture layer without what it tells of its routing, its result shaped like its input."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to the same shape."""
        return self.mixture(x)[0].view_as(x)


def length(bench: Bench) -> Iterator[Row | Skip]:
    """Forward and backward when all layers are local: the cost per token, by length."""
    # Narrow, or at some length tensors outgrow the 32 MiB up to which glibc keeps memory for the
    # next one, and fresh pages from the system would show as a cost of length.
    config = shape(
        bench,
        vocab_size=256,
        width=64,
        layers=2,
        heads=2,
        kv_heads=1,
        expert_hidden=128,
        experts=4,
        nope_every=0,
        chunk=bench.pick(512, 16),
    )
    torch.manual_seed(0)
    model = Backbone(config).to(bench.device)

    def cost(T: int) -> Sampler:
        forward = our_loss(model, random_tokens(bench, config, 1, T))
        parameters = list(model.parameters())
        return per_token(bench, lambda: torch.autograd.grad(forward(), parameters), T)

    lengths = bench.pick((8192, 16_384, 32_768, 65_536), (32, 64, 128))
    costs = bench.interleave(*map(cost, lengths))
    for T, samples in zip(lengths, costs, strict=True):
        yield Row(
            "length",
            f"{T:,} tokens",
            samples,
            f"ours, {lengths[0]:,} tokens",
            costs[0],
            "s/token",
            gain=False,
            goal=1.15 if lengths[0] < T else None,
            length=T,
        )
