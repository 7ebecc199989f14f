"""What a kind of row costs on a GPU: plain, packed, branched, and with blocks.

A backbone that is nearly all attention reads embeddings, forward and backward; three of its four
layers are local. A row whose rule is kept by a dense mask shows in both figures: in time, and in
memory that grows with the square of the row.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from experiments.bench_measure import Bench, Row, Skip, peak_memory, time_limit
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone

KINDS = ("plain", "packed", "branched", "blocked")
COMPILE = 60  # seconds that the first pass of a kind may take


def rows(bench: Bench, config: BackboneConfig, B: int, T: int) -> Iterator[Row | Skip]:
    """Attention by kind of row, bfloat16, forward and backward, over that of a plain row."""
    T = B * T
    config = replace(config, experts=0, dense_hidden=64, layers=4, balance="none")
    torch.manual_seed(0)
    model = Backbone(config).to(bench.device, torch.bfloat16)
    calls, notes = {}, {}
    for kind in KINDS:
        call = passes(model, kind, T)
        try:
            with time_limit(COMPILE):
                call()
        except TimeoutError as error:
            yield Skip("gpu", f"attention, {kind} row", str(error))
            continue
        calls[kind] = call
        notes[kind] = f"{peak_memory(bench, call) / 1e6:.0f} MB"
    if "plain" not in calls:
        return
    samples = bench.interleave(*map(bench.timer, calls.values()), warmup=2)
    per_token = {
        kind: tuple(sample / T for sample in taken)
        for kind, taken in zip(calls, samples, strict=True)
    }
    note = f"attention of one row of {T:,} tokens, memory at its peak: "
    note += ", ".join(f"{kind} {memory}" for kind, memory in notes.items())
    for kind, ours in per_token.items():
        what = f"attention, {kind} row, {T:,} tokens"
        plain = per_token["plain"]
        yield Row("gpu", what, ours, "a plain row", plain, "s/token", gain=False, note=note)


def passes(model: Backbone, kind: str, T: int) -> Callable[[], list[Tensor]]:
    """Forward and backward of one row of a kind: the gradients of all parameters."""
    weight = model.norm.weight
    embeds = torch.randn(1, T, model.config.width, device=weight.device, dtype=weight.dtype)
    given = coordinates(kind, T, weight.device)
    parameters = [p for name, p in model.named_parameters() if not name.startswith(EMBEDDING)]

    def run() -> list[Tensor]:
        hidden = model(embeds=embeds, **given).hidden
        return list(torch.autograd.grad(hidden.float().square().mean(), parameters))

    return run


EMBEDDING = ("embed.", "head.")  # take no part


def coordinates(kind: str, T: int, device: torch.device) -> dict[str, Tensor]:
    """Coordinates of a row: four documents, 16 branches behind half a row, or eight images."""
    place = torch.arange(T, device=device)[None]
    if kind == "packed":
        long = -(-T // 4)
        return {"positions": place % long, "documents": place // long}
    if kind == "branched":
        trunk, long = T // 2, -(-T // 32)
        branch = (place - trunk) // long
        positions = torch.where(place < trunk, place, place - branch * long)
        return {"positions": positions, "branches": torch.where(place < trunk, 0, branch + 1)}
    if kind == "blocked":
        long = -(-T // 8)
        image = place % long < long // 2
        return {"positions": place, "blocks": torch.where(image, place // long + 1, 0)}
    return {}
