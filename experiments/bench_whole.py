"""The whole model against transformers': training step, prefill, decoding, and the floors.

transformers computes every expert for every token, compiled or not: its ratios grow with the number
of experts by construction. What a peer without that habit takes is in section ``moe``.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench_measure import Bench, Row, Skip, agree, scaled
from experiments.bench_models import (
    matmul_flops,
    matmul_weights,
    our_loss,
    random_tokens,
    shape,
    their_loss,
    training_memory,
    training_step,
    transformers,
    twins,
)
from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.decode import Step, decoding
from sandbox.backbone.transformer import Backbone

PEER = "transformers"
MATMULS = (
    "floor: the step's matmuls at the rate of a square matmul; transformers computes every expert "
    "for every token: its ratio grows with their number by construction"
)


def title(config: BackboneConfig, B: int, T: int) -> str:
    """What a case on rows ``[B, T]`` is called."""
    return f"{config.experts} experts, {B} x {T} tokens"


def train(bench: Bench) -> Iterator[Row | Skip]:
    """Training step: forward, loss, backward, AdamW (fused, for both)."""
    T = bench.pick(512, 24)
    cases = [(4, 4, 2.7), (16, 4, 6.5), (128, 1, 20.0)]
    for experts, B, goal in bench.pick(cases, [(2, 2, 2.7), (4, 1, 6.5)]):
        yield train_case(bench, shape(bench, experts=experts), B, T, goal)


def train_case(bench: Bench, config: BackboneConfig, B: int, T: int, goal: float) -> Row | Skip:
    """One size of model; when it returns, its models are gone."""
    what = title(config, B, T)
    if why := bench.lacks(training_memory(config, B * T)):
        return Skip("train", what, why)
    tokens = random_tokens(bench, config, B, T)
    ours, theirs = twins(config, bench.device)
    step = training_step(ours, our_loss(ours, tokens))
    their_step = training_step(theirs, their_loss(theirs, tokens))
    for _ in range(2):  # the second loss shows that both were updated alike
        agree(f"loss, {what}", step(), their_step(), 1e-4)
    samples, peer, flop = bench.interleave(
        bench.timer(step), bench.timer(their_step), bench.per_flop(), warmup=0
    )
    least = scaled(flop, matmul_flops(config, B, T, train=True))
    return Row("train", what, samples, PEER, peer, goal=goal, floor=least, note=MATMULS)


def compiled(bench: Bench) -> Iterator[Row | Skip]:
    """Training step, ours eager, against transformers' under `torch.compile`."""
    T = bench.pick(512, 24)
    for experts, B in bench.pick(((4, 4), (16, 4)), ((2, 2),)):
        config = shape(bench, experts=experts)
        what = title(config, B, T)
        if why := bench.lacks(training_memory(config, B * T)):
            yield Skip("compiled", what, why)
            continue
        tokens = random_tokens(bench, config, B, T)
        ours, theirs = twins(config, bench.device)
        # Code generation takes a compiler; a rehearsal traces only.
        faster = torch.compile(theirs, backend=bench.pick("inductor", "aot_eager"))
        step = training_step(ours, our_loss(ours, tokens))
        their_step = training_step(theirs, their_loss(faster, tokens))
        start = process_time(), perf_counter()
        first = their_step()
        cpu, wall = process_time() - start[0], perf_counter() - start[1]
        agree(f"loss, {what}", step(), first, 1e-4)
        agree(f"second loss, {what}", step(), their_step(), 1e-4)
        samples, peer = bench.interleave(bench.timer(step), bench.timer(their_step), warmup=1)
        note = f"{what}: the compiled peer's first step took {wall:.0f} s ({cpu:.0f} CPU s here, "
        note += "without those of compiler processes); it is not in the ratio"
        yield Row("compiled", what, samples, f"{PEER}, compiled", peer, note=note)
        torch.compiler.reset()


def floor(bench: Bench) -> Iterator[Row | Skip]:
    """Our training step over its matmul floor."""
    config = shape(bench)
    B, T = bench.pick((4, 512), (2, 24))
    tokens = random_tokens(bench, config, B, T)
    torch.manual_seed(0)
    model = Backbone(config).to(bench.device)
    step = training_step(model, our_loss(model, tokens))
    flops = matmul_flops(config, B, T, train=True)
    ours, flop = bench.interleave(bench.timer(step), bench.per_flop(), warmup=2)
    yield Row(
        "floor",
        title(config, B, T),
        ours,
        "matmuls alone",
        scaled(flop, flops),
        gain=False,
        goal=1.6,
        note=f"{flops / 1e9:.1f} GFLOP; square matmul at {1e-9 / min(flop):.1f} GFLOP/s",
    )


def prefill(bench: Bench) -> Iterator[Row | Skip]:
    """Prefill: logits of what follows the prompt, filling the cache."""
    config = shape(bench)
    T = bench.pick(512, 24)
    ours, theirs = twins(config, bench.device)
    for B in bench.pick((1, 4), (1, 2)):
        tokens = random_tokens(bench, config, B, T)
        sides = (Ours(ours, T + 1), Theirs(theirs, "DynamicCache", T + 1))
        what = title(config, B, T)
        with torch.inference_mode():
            logits = [read_anew(side, tokens) for side in sides]
            agree(f"prefill, {what}", *logits, 1e-4)
            samples, peer, flop = bench.interleave(
                *(bench.timer(partial(read_anew, side, tokens)) for side in sides),
                bench.per_flop(),
            )
        least = scaled(flop, matmul_flops(config, B, T, train=False))
        yield Row("prefill", what, samples, PEER, peer, floor=least, note=MATMULS)


def decode(bench: Bench) -> Iterator[Row | Skip]:
    """Decoding, greedy, through each one's cache (the faster of transformers' two)."""
    config = shape(bench)
    prompt, steps = bench.pick((256, 64), (12, 6))
    capacity = prompt + steps
    ours, theirs = twins(config, bench.device)
    for B, goal in bench.pick(((1, 7.0), (32, 2.4)), ((1, 7.0), (3, 2.4))):
        tokens = random_tokens(bench, config, B, prompt)
        what = f"batch {B}, {steps} steps after {prompt} tokens"
        sides = (
            Ours(ours, capacity),
            Theirs(theirs, "DynamicCache", capacity),
            Theirs(theirs, "StaticCache", capacity),
        )
        with torch.inference_mode():
            runs = [Decoding(bench, side, tokens, steps) for side in sides]
            ids = [run.ids() for run in runs]
            for run, theirs_ids in zip(runs[1:], ids[1:], strict=True):
                if not torch.equal(ids[0], theirs_ids):
                    raise RuntimeError(f"decode, {what}: other greedy ids with {run.side}")
            samples, *rivals, byte = bench.interleave(*runs, bench.per_byte(), warmup=0)
            least = scaled(byte, decode_bytes(ours, tokens, ids[0]))
        rival, best = min(zip(rivals, sides[1:], strict=True), key=lambda x: median(x[0]))
        yield Row(
            "decode",
            what,
            samples,
            f"{PEER}, {best}",
            rival,
            unit="s/step",
            goal=goal,
            floor=least,
            note="floor: active weights and visible keys and values, read once from memory",
        )


@dataclass(frozen=True)
class Ours:
    """Our model behind the interface that both sides share."""

    model: Backbone
    capacity: int

    def cache(self, B: int) -> KVCache:
        """An empty cache for B rows."""
        return KVCache(self.model.config, B, self.capacity, like=self.model.head.weight)

    @cached_property
    def step(self) -> Step:
        """The decoding step, as ``generate`` takes it; preparing it is not timed."""
        return decoding(self.model)

    def read(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits ``[B, V]`` of what follows the tokens ``[B, T]``, which join the cache."""
        if tokens.shape[1] == 1:
            return self.step(tokens[:, 0], cache, None, None)
        return self.model.unembed(self.model(tokens, cache=cache).hidden[:, -1])

    def __str__(self) -> str:
        return "KVCache"


@dataclass(frozen=True)
class Theirs:
    """Transformers' model with one of its caches, behind the same interface."""

    model: nn.Module
    kind: str
    capacity: int

    def cache(self, B: int) -> Any:
        """An empty cache; rows are allotted at the first use."""
        length = {"max_cache_len": self.capacity} if self.kind == "StaticCache" else {}
        return getattr(transformers(), self.kind)(config=self.model.config, **length)

    def read(self, tokens: Tensor, cache: Any) -> Tensor:
        """Logits ``[B, V]`` of what follows the tokens ``[B, T]``, which join the cache."""
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def __str__(self) -> str:
        return self.kind


def read_anew(side: Ours | Theirs, tokens: Tensor) -> Tensor:
    """Logits ``[B, V]`` of what follows the tokens ``[B, T]``, through a new cache."""
    return side.read(tokens, side.cache(len(tokens)))


class Decoding:
    """Greedy steps behind a prompt that was read once; calling it gives seconds per step."""

    def __init__(self, bench: Bench, side: Ours | Theirs, prompt: Tensor, steps: int) -> None:
        self.bench, self.side, self.steps = bench, side, steps
        self.filled = side.cache(len(prompt))
        self.first = side.read(prompt, self.filled).argmax(dim=-1)

    def ids(self) -> Tensor:
        """The greedy continuation ``[B, steps + 1]``."""
        return self._run(copy.deepcopy(self.filled))

    def __call__(self) -> float:
        """Seconds per step; restoring the cache to the prompt's end is not timed."""
        cache = copy.deepcopy(self.filled)
        return self.bench.seconds(lambda: self._run(cache)) / self.steps

    def _run(self, cache: Any) -> Tensor:
        ids = [self.first]
        for _ in range(self.steps):
            ids.append(self.side.read(ids[-1][:, None], cache).argmax(dim=-1))
        return torch.stack(ids, dim=1)


def decode_bytes(model: Backbone, prompt: Tensor, ids: Tensor) -> float:
    """Bytes that a step must read: weights in use, keys and values in sight; mean over steps.

    Args:
        model: ours.
        prompt: the tokens ``[B, T]`` before the first step.
        ids: the tokens ``[B, steps + 1]`` that the steps read, but for the last.
    """
    config, (B, T) = model.config, prompt.shape
    steps = ids.shape[1] - 1
    routing = model(torch.cat((prompt, ids[:, :-1]), dim=1)).routing
    visited = sum(
        len(step.unique())
        for layer in routing
        for step in layer.experts.unflatten(0, (B, -1))[:, T:].unbind(dim=1)
    )
    expert = 3 * config.width * config.expert_hidden
    always = matmul_weights(config) - len(routing) * config.top_k * expert
    weights = always + config.vocab_size * config.width + visited / steps * expert
    seen = 0
    for layer in range(config.layers):
        local = config.uses_rope(layer) and config.chunk is not None
        C = config.chunk if local and config.chunk else T + steps
        seen += sum((T + step) % C + 1 for step in range(steps))
    kept = B * seen / steps * 2 * config.kv_heads * config.head_dim
    return model.head.weight.element_size() * (weights + kept)
