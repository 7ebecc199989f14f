"""What a model takes: parameters, memory and KV cache, without allocating any of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from torch import nn

from encoders.llama4_vit import Llama4Vision
from fusion.early import EarlyFusion
from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import NOTES, BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.meta import without_memory

# The first pattern found in a parameter's name decides its part, so the order matters.
_PARTS = {
    "norm": "norms",
    "embed.": "embedding",
    "head.": "head",
    ".attention.": "attention",
    ".ffn.experts.": "routed experts",
    ".ffn.shared.": "shared experts",
    ".ffn.router.": "routers",
    ".ffn.": "dense feed-forward",
}
_QUANTISED = ("routed experts", "shared experts")
_WITH_LLAMA4_TOWER = ("scout", "maverick")
_CACHE_TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def count(config: BackboneConfig) -> dict[str, Any]:
    """Parameters of the text decoder: ``total``, ``active`` for one token, and each by ``parts``.

    Active is everything but the routed experts, plus the ``top_k`` of each mixture layer that a
    token visits. A head tied to the embedding is counted once, as embedding.
    """
    with without_memory():
        backbone = Backbone(config)
    parts: dict[str, dict[str, int]] = {}
    for name, parameter in backbone.named_parameters():
        part = next(part for pattern, part in _PARTS.items() if pattern in name)
        entry = parts.setdefault(part, {"total": 0, "active": 0})
        n = parameter.numel()
        entry["total"] += n
        entry["active"] += n * config.top_k // config.experts if part == "routed experts" else n
    return {
        "total": sum(entry["total"] for entry in parts.values()),
        "active": sum(entry["active"] for entry in parts.values()),
        "parts": parts,
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of a whole model: ``total``, ``active`` (see ``count``) and ``trained``.

    Active are all but the routed experts that a token does not visit, the vision tower included;
    trained are all that are not frozen.
    """
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    texts = [count(part.config) for part in model.modules() if isinstance(part, Backbone)]
    idle = sum(text["total"] - text["active"] for text in texts)
    return {
        "total": total,
        "active": total - idle,
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }


def vision(name: str, config: BackboneConfig) -> dict[str, int] | None:
    """Parameters of the ``tower`` and ``fusion`` that Meta publishes with this preset, if any."""
    if name not in _WITH_LLAMA4_TOWER:
        return None
    with without_memory():
        tower = Llama4Vision()
        fusion = EarlyFusion(tower.width, tower.grid, config.width, hidden=4096)
    parts = {"tower": tower, "fusion": fusion}
    return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}


def training_memory(counted: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's two moments, by the Trainer's ``precision``.

    All four are fp32 under ``32-true`` and ``bf16-mixed``, which casts only inside a step: 16 bytes
    a parameter, as with bf16 weights and gradients beside fp32 master weights (ZeRO, arXiv
    1910.02054, section 3.1). ``bf16-true`` keeps all four in bf16. Activations come on top.
    """
    bytes_each = {"32-true": 16, "bf16-mixed": 16, "bf16-true": 8}
    return {precision: n * counted["total"] for precision, n in bytes_each.items()}


def weight_memory(counted: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights at inference, by their type.

    In fp8 and int4 stand the experts, routed and shared; attention, dense layers, embedding, head,
    routers and norms stay in bf16. So does Meta's int4 recipe (llama-models,
    ``models/llama4/quantization/loader.py``), with an fp32 scale for each group of 128 weights
    (``models/quantize_impls.py``), which makes 4.25 bits a weight. Its fp8 recipe also spares
    shared experts and the first and last layer, so it takes a little more than stated here; scales
    of fp8, one a row, are not counted.
    """
    parts, total = counted["parts"], counted["total"]
    experts = sum(parts[part]["total"] for part in _QUANTISED if part in parts)
    kept = 2 * (total - experts)
    return {
        "fp32": 4 * total,
        "bf16": 2 * total,
        "fp8": kept + experts,
        "int4": kept + experts * 17 // 32,
    }


def cache_memory(config: BackboneConfig, context: int) -> dict[str, dict[str, int]]:
    """Bytes of one row's KV cache after ``context`` tokens, by its type.

    ``bytes`` is what ``KVCache`` allocates, local layers holding one chunk; ``full`` what it would
    if every layer held every token.
    """
    held = {"bytes": config, "full": replace(config, chunk=None)}
    return {
        name: {
            key: KVCache(each, 1, context, like=torch.empty(0, dtype=dtype, device="meta")).bytes
            for key, each in held.items()
        }
        for name, dtype in _CACHE_TYPES.items()
    }


def describe(name: str, config: BackboneConfig, context: int) -> dict[str, Any]:
    """All of the above for one preset, in plain values."""
    counted = count(config)
    return counted | {
        "vision": vision(name, config),
        "training_bytes": training_memory(counted),
        "weight_bytes": weight_memory(counted),
        "cache_bytes": cache_memory(config, context),
        "context": context,
        "note": NOTES.get(name),
        "config": asdict(config),
    }


def overview(described: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Every preset in a line, for a terminal of 80 columns."""
    table = Table("preset", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("layers", "width", "experts", "total", "active", "training", "weights"):
        table.add_column(heading, justify="right")
    table.add_column("KV cache", justify="right")
    for name, facts in described.items():
        config = facts["config"]
        table.add_row(
            name + "*" * (facts["note"] is not None),
            *(f"{config[key]:,}" for key in ("layers", "width", "experts")),
            *(short(facts[key]) for key in ("total", "active")),
            in_bytes(facts["training_bytes"]["bf16-mixed"]),
            in_bytes(facts["weight_bytes"]["bf16"]),
            in_bytes(facts["cache_bytes"]["bf16"]["bytes"]),
        )
    context = next(iter(described.values()))["context"]
    estimates = [f"* {name} is an estimate." for name, facts in described.items() if facts["note"]]
    legend = (
        "Parameters are the text decoder's, in all and active for one token. Training: weights, "
        "gradients and AdamW's moments in fp32 or bf16-mixed, without activations. Weights: bf16. "
        f"KV cache: {context:,} tokens in bf16, local layers holding one chunk."
    )
    return Group(table, legend, *estimates, "More of one: sandbox params PRESET")


def details(name: str, facts: Mapping[str, Any]) -> RenderableType:
    """Everything about one preset, for a terminal of 80 columns."""
    about = [f"{name}: {_shape(BackboneConfig.of(facts['config']))}"]
    if facts["note"]:
        about.append(f"This is {facts['note']}.")
    tables = _parameters(facts), _memory(facts), _cache(facts)
    return Group(*(Padding(text, (0, 0, 1, 0)) for text in about), *tables)


def _shape(config: BackboneConfig) -> str:
    """The configuration in one sentence."""
    mixtures = sum(config.is_moe(layer) for layer in range(config.layers))
    experts = f"{config.experts} experts of {config.expert_hidden:,} in {mixtures} of them"
    local = "everywhere global" if config.chunk is None else f"local in chunks of {config.chunk:,}"
    return (
        f"{config.layers} layers of width {config.width:,}, {experts} (top {config.top_k}"
        f"{' and a shared one' if config.shared_expert else ''}); attention of {config.heads} "
        f"heads over {config.kv_heads} of {config.head_dim}, {local}; vocabulary of "
        f"{config.vocab_size:,}."
    )


def _parameters(facts: Mapping[str, Any]) -> Table:
    table = _table("parameters", "part", "total", "active")
    for part in dict.fromkeys(_PARTS.values()):
        if entry := facts["parts"].get(part):
            table.add_row(part, f"{entry['total']:,}", f"{entry['active']:,}")
    table.add_section()
    text = "all" if facts["vision"] is None else "all text"
    table.add_row(text, f"{facts['total']:,}", f"{facts['active']:,}", style="bold")
    if facts["vision"] is not None:
        for part, n in facts["vision"].items():
            table.add_row(f"vision {part}", f"{n:,}")
        everything = facts["total"] + sum(facts["vision"].values())
        table.add_row("all, with vision", f"{everything:,}", style="bold")
    return table


def _memory(facts: Mapping[str, Any]) -> Table:
    table = _table("memory of the text decoder", "what", "bytes")
    training, weights = facts["training_bytes"], facts["weight_bytes"]
    table.add_row("training (AdamW), fp32 or bf16-mixed", in_bytes(training["bf16-mixed"]))
    table.add_row("training (AdamW), bf16-true", in_bytes(training["bf16-true"]))
    for kind, n in weights.items():
        quantised = " experts, the rest bf16" if kind in ("fp8", "int4") else ""
        table.add_row(f"weights, {kind}{quantised}", in_bytes(n))
    return table


def _cache(facts: Mapping[str, Any]) -> Table:
    title = f"KV cache of {facts['context']:,} tokens"
    table = _table(title, "type", "local layers hold one chunk", "all layers hold all", "ratio")
    for kind, n in facts["cache_bytes"].items():
        share = n["bytes"] / n["full"]
        table.add_row(kind, in_bytes(n["bytes"]), in_bytes(n["full"]), f"{share:.3f}")
    return table


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is words and whose others are numbers."""
    table = Table(columns[0], title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def short(n: float, units: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """Three digits and a power of a thousand.

    >>> short(107_769_861_120), short(1_074_304), short(999_600)
    ('108B', '1.07M', '1.00M')
    """
    power = 0
    while n >= 999.5 and power < len(units) - 1:
        n, power = n / 1000, power + 1
    digits = f"{n:#.3g}" if power and n < 99.95 else f"{n:,.0f}"
    return f"{digits}{units[power]}"


def in_bytes(n: int) -> str:
    """A number of bytes in decimal units: 1 GB is 10^9 bytes."""
    return short(n, (" B", " kB", " MB", " GB", " TB", " PB"))
