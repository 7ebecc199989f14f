"""Attention over segments equals the dense rule, and never builds a mask over a whole row."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sandbox.backbone.backends import cpu, products
from sandbox.backbone.backends.segments import flat_of, segments
from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.backbone.visibility import Visibility, visible

H, G, K = 4, 2, 8


def layout(rng: random.Random, kind: str) -> dict[str, Tensor]:
    """Two rows of random documents, with branches or blocks, padded on the right."""
    rows = []
    for _ in range(2):
        row = []
        for document in range(rng.randint(1, 3) if "packed" in kind else 1):
            trunk = rng.randint(1, 30)
            runs = [(0, 0, trunk)]
            if "branches" in kind:
                count = rng.randint(1, 4)
                runs += [(k, trunk, rng.randint(1, 12)) for k in range(1, count + 1)]
            for branch, first, length in runs:
                for i in range(length):
                    block = (i // 5) % 3 if "blocks" in kind else 0
                    row.append((first + i, document, branch, block))
        rows.append(row)
    T = max(map(len, rows))
    padded = torch.tensor([[*row, *[(0, -1, 0, 0)] * (T - len(row))] for row in rows])
    names = ("positions", "documents", "branches", "blocks")
    return dict(zip(names, padded.unbind(-1), strict=True))


def view_of(chunk: int | None, coordinates: dict[str, Tensor], **more: object) -> Visibility:
    real = (coordinates["documents"].flatten() >= 0).nonzero().squeeze(1)
    config = BackboneConfig(chunk=chunk)
    return Visibility(config, torch.ones(K // 2), **coordinates, real=real, **more)


def qkv(M: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(M, heads, K, requires_grad=True) for heads in (H, G, G)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("chunk", [None, 1, 7, 16])
@pytest.mark.parametrize(
    "kind", ["plain", "packed", "branches", "packed branches", "blocks", "packed branches blocks"]
)
def test_segments_equal_the_rule(kind: str, chunk: int | None) -> None:
    """Guards against a chunk's edge off by one, a branch that sees another, a lost gradient."""
    for seed in range(6):
        rng = random.Random(f"{kind} {chunk} {seed}")
        view = view_of(chunk, layout(rng, kind), multiple=16)
        M = len(view.row)
        chosen = None
        if seed % 2:
            chosen = torch.tensor(sorted(rng.sample(range(M - view.blank), max(1, M // 4))))
        keys = view.coordinates
        mask = visible(keys if chosen is None else keys.at(chosen), keys, chunk)
        q, k, v = qkv(M)
        queries = [q if chosen is None else q[chosen] for _ in range(2)]
        assert cpu.plan_of(view, chunk, H, G, chosen) is not None, "no structure was found"
        found = cpu.attend(queries[0], k, v, view, local=True, chosen=chosen)
        real = slice(None) if chosen is not None else slice(M - view.blank)
        weight = torch.randn_like(found[real])
        results = [
            (out[real], *torch.autograd.grad((out[real] * weight).sum(), (q, k, v)))
            for out in (found, dense(queries[1], k, v, mask))
        ]
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [1 << 20, 64])
def test_scores_in_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against segments that are lost where not all scores are held at once."""
    monkeypatch.setattr("sandbox.backbone.backends.segment_attention.SCORES", parts)
    view = view_of(None, layout(random.Random(1), "packed branches"))
    q, k, v = qkv(len(view.row))
    mask = visible(view.coordinates, view.coordinates, None)
    results = [
        (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
        for out in (cpu.attend(q, k, v, view, local=True), dense(q, k, v, mask))
    ]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [4, 5, 11, 30])
def test_folding_plain_rows_is_exact(T: int) -> None:
    """Guards against a chunk edge off by one and against padding that leaks."""
    positions = torch.arange(T).expand(2, T)
    view = Visibility(BackboneConfig(chunk=5), torch.ones(K // 2), positions, plain=True)
    q, k, v = qkv(2 * T)
    mask = visible(view.coordinates, view.coordinates, 5)
    results = [
        (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
        for out in (cpu.attend(q, k, v, view, local=True), dense(q, k, v, mask))
    ]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": [0, 2, 1, 3, 4, 5]},
        {"documents": [0, 0, 1, 1, 0, 0]},
        {"branches": [0, 1, 1, 2, 1, 1], "positions": [0, 1, 2, 1, 3, 4]},
        {"branches": [0, 0, 0, 1, 1, 1], "positions": [0, 1, 2, 1, 2, 3]},
    ],
)
def test_coordinates_without_structure_use_the_rule(change: dict[str, list[int]]) -> None:
    """Guards against positions that jump, or texts that are interrupted, taken for segments."""
    coordinates = {
        name: torch.tensor([change.get(name, list(range(6)) if name == "positions" else [0] * 6)])
        for name in ("positions", "documents", "branches", "blocks")
    }
    view = view_of(None, coordinates)
    assert segments(flat_of(view), None) is None
    q, k, v = qkv(6)
    mask = visible(view.coordinates, view.coordinates, None)
    torch.testing.assert_close(cpu.attend(q, k, v, view, local=True), dense(q, k, v, mask))


@pytest.mark.parametrize("kind", ["plain", "blocks"])
@pytest.mark.parametrize("chunk", [None, 4, 64])
def test_several_tokens_after_others(chunk: int | None, kind: str) -> None:
    """Guards against a prompt read in pieces, of rows of unequal length, that forgets or repeats.

    Blocks are read whole, in one piece.
    """
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(vocab_size=50, chunk=chunk, init_std=0.2)).eval()
    rows = [torch.randint(0, 50, (n,)) for n in (29, 22)]
    blocks = [torch.where((torch.arange(len(r)) - 11) // 6 == 0, 1, 0) for r in rows]
    cut = [(10, 20, 29), (7, 17, 22)]  # where each row is cut
    cache = KVCache(model.config, 2, 40, like=model.embed.weight)
    found: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        for piece in range(3):
            spans = [(ends[piece - 1] if piece else 0, ends[piece]) for ends in cut]
            T = max(end - start for start, end in spans)
            tokens, documents, block = torch.zeros(3, 2, T, dtype=torch.int64)
            for b, (start, end) in enumerate(spans):
                tokens[b, : end - start] = rows[b][start:end]
                block[b, : end - start] = blocks[b][start:end]
                documents[b, end - start :] = -1
            seen = {"blocks": block} if kind == "blocks" else {}
            hidden = model(tokens, documents=documents, cache=cache, **seen).hidden
            for b, (start, end) in enumerate(spans):
                found[b].append(hidden[b, : end - start])
        for b, row in enumerate(rows):
            seen = {"blocks": blocks[b][None]} if kind == "blocks" else {}
            whole = model(row[None], **seen).hidden[0]
            torch.testing.assert_close(torch.cat(found[b]), whole, atol=2e-5, rtol=0)
    assert cache.lengths.tolist() == [29, 22]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("chunk", [1024, None])
def test_masks_of_long_prompts_are_small(chunk: int | None, bidirectional: bool) -> None:
    """Guards against masks that grow with the square of a prompt: 48 images of 17 tiles each."""
    span, images = 17 * 16 + 20, 48
    T = span * images
    rows = {name: torch.zeros(1, T, dtype=torch.int64) for name in ("documents", "blocks")}
    if bidirectional:
        rows["blocks"][0] = torch.where(
            torch.arange(T) % span < 17 * 16, torch.arange(T) // span + 1, 0
        )
    branch = [torch.full((12,), k + 1) for k in range(8)]
    rows["branches"] = torch.cat((torch.zeros(T - 96, dtype=torch.int64), *branch))[None]
    rows["positions"] = torch.cat((torch.arange(T - 96), *[T - 96 + torch.arange(12)] * 8))[None]
    plan = cpu.plan_of(view_of(chunk, rows), chunk, 3, 1, None)
    assert plan is not None
    assert plan.mask_bytes < 4 * T * 1024  # fp32; one of all pairs takes 4 * T * T


def test_segments_cost_linear_time_on_local_layers() -> None:
    """Guards against local layers that multiply what global ones do, where rows have branches."""
    T, chunk = 8192, 1024
    branches = torch.cat((torch.zeros(T - 8 * 64), *[torch.full((64,), k + 1.0) for k in range(8)]))
    trunk = T - 8 * 64
    positions = torch.cat((torch.arange(trunk), *[trunk + torch.arange(64)] * 8))
    zeros = torch.zeros(1, T, dtype=torch.int64)
    view = view_of(
        chunk,
        {
            "positions": positions[None],
            "documents": zeros,
            "branches": branches.long()[None],
            "blocks": zeros,
        },
    )
    plan = cpu.plan_of(view, chunk, 3, 1, None)
    assert plan is not None
    assert plan.pairs < 1.25 * T * chunk


@pytest.mark.parametrize("rows", [64, 100, 1024])
def test_products_equal_torchs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a transposed operand, whichever library multiplies."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "SMALLEST", 1)
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 48, requires_grad=True) for n in (rows, 80))
    results = [
        (out, *torch.autograd.grad(out.square().sum(), (x, weight)))
        for out in (products.linear(x, weight), x @ weight.T)
    ]
    experts = torch.randn(3, 48, 80, requires_grad=True)
    ends = torch.tensor([rows // 4, rows // 4, rows], dtype=torch.int32)  # one without a row
    monkeypatch.setattr(products, "visits_multiple", lambda *_: products.ROWS)
    parts = zip(x.split([rows // 4, 0, rows - rows // 4]), experts, strict=True)
    each = [
        (out, *torch.autograd.grad(out.square().sum(), (x, experts)))
        for out in (
            products.grouped_mm(x, experts, ends),
            torch.cat([part @ expert for part, expert in parts]),
        )
    ]
    for pair in (results, each):
        for mine, other in zip(*pair, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)


def test_the_choice_of_products_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a choice by the clock: a resumed run would compute other bits."""
    for vendor, capability, expected in (
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
    ):
        monkeypatch.setattr(products, "_vendor", lambda vendor=vendor: vendor)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert products.onednn_is_faster() is expected


def test_swiglu_has_the_gradient_of_its_formula() -> None:
    """Guards against a derivative written by hand that is wrong where the gate is negative."""
    torch.manual_seed(0)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cpu.swiglu, x)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(cpu.swiglu(x), F.silu(gate) * up)


def test_no_mask_is_kept_for_the_backward_pass() -> None:
    """Guards against masks that autograd saves once a layer."""
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(vocab_size=50, chunk=8))
    positions = torch.cat((torch.arange(25), *[25 + torch.arange(6)] * 2))[None]
    branches = torch.tensor([[0] * 25 + [1] * 6 + [2] * 6])
    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.zeros(1, 37, dtype=torch.int64), positions=positions, branches=branches)
    assert shapes
    assert not [shape for shape in shapes if shape[-2:] == (37, 37)]


def test_plans_of_numpy_are_of_one_type() -> None:
    """Guards against indices of another width, which torch refuses on some platforms."""
    view = view_of(7, layout(random.Random(3), "packed branches"))
    found = segments(flat_of(view), 7)
    assert found is not None
    assert all(part.dtype == np.int64 for part in found)
