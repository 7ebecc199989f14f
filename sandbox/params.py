"""Counting parameters, without allocating them."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone

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


def count(config: BackboneConfig) -> dict[str, Any]:
    """Parameters of the text decoder: ``total``, ``active`` for one token, and each by ``parts``.

    Active is everything but the routed experts, plus the ``top_k`` of each mixture layer that a
    token visits. A head tied to the embedding is counted once, as embedding.
    """
    with torch.device("meta"):
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


def table(name: str, counted: Mapping[str, Any]) -> Table:
    """The counts of one preset, for a terminal."""
    result = Table("part", title=f"{name}: text parameters", title_justify="left")
    result.add_column("total", justify="right")
    result.add_column("active", justify="right")
    for part in dict.fromkeys(_PARTS.values()):
        if entry := counted["parts"].get(part):
            result.add_row(part, f"{entry['total']:,}", f"{entry['active']:,}")
    result.add_section()
    result.add_row("all", f"{counted['total']:,}", f"{counted['active']:,}", style="bold")
    return result
