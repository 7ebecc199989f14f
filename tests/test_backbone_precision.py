"""What runs in which dtype under each precision: the table of ``backends`` against the code."""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sandbox.backbone import backends, rope
from sandbox.backbone.backends import cpu
from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.loss import chunked_cross_entropy
from sandbox.backbone.moe import MoE
from sandbox.backbone.transformer import Backbone

WORDS = 61  # no other axis is as long
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def table() -> dict[str, dict[str, str]]:
    """The drawn table: dtype by computation and precision."""
    lines = (inspect.getdoc(backends) or "").splitlines()
    edges = [number for number, line in enumerate(lines) if line.startswith("===")]
    columns = [(m, m + len(part)) for m, part in _spans(lines[edges[0]])]
    rows = [[line[a:b].strip() for a, b in columns] for line in lines[edges[1] + 1 : edges[2]]]
    header = [lines[edges[0] + 1][a:b].strip() for a, b in columns]
    assert tuple(header[1:]) == PRECISIONS
    return {row[0]: dict(zip(PRECISIONS, row[1:], strict=True)) for row in rows}


def _spans(line: str) -> Iterator[tuple[int, str]]:
    at = 0
    for part in line.split():
        at = line.index(part, at)
        yield at, part
        at += len(part)


class OfLogits(TorchDispatchMode):
    """Notes the dtypes of products that give logits, of their exponentials, and of their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {"mm": set(), "exp": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and out.shape[-1:] == (WORDS,):
            if name in ("mm", "_linear_pointwise"):
                self.found["mm"].add(out.dtype)
            elif name in ("exp", "exp_"):
                self.found["exp"].add(out.dtype)
        return out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_table_is_true(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against experts that stay in fp32 under autocast, a router that is rounded, a loss in
    two dtypes, and against a table that says otherwise.
    """
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(vocab_size=WORDS, chunk=4, layers=4))
    if precision == "bf16-true":
        model = model.bfloat16()
    mixed = precision == "bf16-mixed"
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, *tensors: Tensor) -> None:
        seen.setdefault(name, set()).update(tensor.dtype for tensor in tensors)

    def spy(target: Any, name: str, what: str, *, inputs: int = 0) -> None:
        original = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if inputs:
                note(what, *args[:inputs])
            else:
                note(what, *(x for x in (out if isinstance(out, tuple) else [out])))
            return out

        monkeypatch.setattr(target, name, call)

    spy(cpu, "grouped_mm", "experts", inputs=2)
    spy(cpu.SegmentAttention, "apply", "attention on a CPU", inputs=3)
    spy(rope, "rotation", "turns")
    norm = torch.linalg.vector_norm

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        out = norm(*args, **kwargs)
        note("RMS norms inside", out)
        return out

    monkeypatch.setattr(torch.linalg, "vector_norm", watched)
    select = MoE.select

    def selected(layer: MoE, logits: Tensor) -> tuple[Tensor, Tensor]:
        note("router", logits)
        chosen, gate = select(layer, logits)
        note("gates, rotary turns", gate)
        return chosen, gate

    monkeypatch.setattr(MoE, "select", selected)
    hook = model.layers[0].attention.query.register_forward_hook(
        lambda _module, _args, out: note("linear layers", out)
    )
    tokens = torch.randint(0, WORDS, (2, 9))
    documents = torch.tensor([[0] * 9, [0] * 6 + [-1] * 3])
    spied = OfLogits()
    context = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with context:
        hidden = model(tokens, documents=documents).hidden.flatten(0, 1)
        with spied:
            loss, _ = chunked_cross_entropy(hidden, model.head.weight, tokens.flatten())
        cache = KVCache(model.config, 1, 4, like=model.embed.weight)
        note("KV cache", cache.keys[0])
        with torch.no_grad():
            model(tokens[:1, :3], cache=cache)
            sdpa = F.scaled_dot_product_attention
            with monkeypatch.context() as patched:

                def attended(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
                    note("attention in decoding", q, k, v)
                    return sdpa(q, k, v, **options)

                patched.setattr(F, "scaled_dot_product_attention", attended)
                model(tokens[:1, 3:4], cache=cache)
    hook.remove()
    sums = loss.grad_fn.saved_tensors[1]  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    note("weights, optimizer", *optimizer.param_groups[0]["params"])
    note("logits of the loss", *(torch.empty(0, dtype=found) for found in spied.found["mm"]))
    note("softmax of the loss", *(torch.empty(0, dtype=found) for found in spied.found["exp"]))
    note("head's gradient sums", sums)
    note("balancing bias", *(layer.balance_bias for layer in model.mixtures().values()))
    assert seen.pop("turns") == {torch.complex64}
    drawn = {name: row[precision] for name, row in table().items() if "GPU" not in name}
    found = {name: "/".join(sorted(NAMES[x] for x in dtypes)) for name, dtypes in seen.items()}
    assert found == drawn
