"""Counting parameters, memory and cache without allocating them."""

import pytest
import torch
from rich.console import Console

from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import PRESETS, BackboneConfig, preset
from sandbox.backbone.transformer import Backbone
from sandbox.params import (
    cache_memory,
    count,
    describe,
    details,
    in_bytes,
    overview,
    short,
    training_memory,
    vision,
    weight_memory,
)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("scout", 107_769_861_120, 17_172_894_720),
        ("maverick", 400_711_848_960, 17_184_691_200),
    ],
)
def test_published_sizes(name: str, total: int, active: int) -> None:
    """Articles give other widths and a second expert; Meta's own checkpoints have these counts."""
    counted = count(preset(name))
    assert (counted["total"], counted["active"]) == (total, active)


def test_parts_add_up() -> None:
    """A parameter whose name fits no part, or two, would be lost or counted twice."""
    for config in (PRESETS["tiny"], BackboneConfig(moe_every=2, shared_expert=False, tied=True)):
        counted = count(config)
        for key in ("total", "active"):
            assert sum(part[key] for part in counted["parts"].values()) == counted[key]


def test_tied_head_counts_once() -> None:
    """A tied head is the embedding seen twice; counting both inflates small models by a third."""
    free, tied = count(BackboneConfig()), count(BackboneConfig(tied=True))
    assert "head" not in tied["parts"]
    assert free["total"] - tied["total"] == free["parts"]["head"]["total"]


def test_more_experts_visited_are_more_active() -> None:
    """Active counts one expert by habit; with top_k = 2 a token visits two."""
    one, two = count(BackboneConfig(top_k=1)), count(BackboneConfig(top_k=2))
    assert one["total"] == two["total"]
    routed = "routed experts"
    assert two["parts"][routed]["active"] == 2 * one["parts"][routed]["active"]


@pytest.mark.parametrize(
    ("name", "total"), [("scout", 108_641_793_536), ("maverick", 401_583_781_376)]
)
def test_published_sizes_with_vision(name: str, total: int) -> None:
    """A tower or projector of another width than Meta's would load nothing of Meta's."""
    config = preset(name)
    found = vision(name, config)
    assert found is not None
    assert sum(found.values()) == 850_960_896 + 20_971_520
    assert count(config)["total"] + sum(found.values()) == total
    assert vision("tiny", preset("tiny")) is None


def _numbers_of(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_training_memory_is_what_a_step_leaves_behind(precision: str, dtype: torch.dtype) -> None:
    """A moment forgotten, or counted in another type, is a run that does not fit."""
    config = BackboneConfig(width=32, heads=2, head_dim=16)
    model = Backbone(config).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    weights = list(model.parameters())
    gradients = [x.grad for x in weights if x.grad is not None]
    assert (
        _numbers_of([*weights, *gradients, *moments]) == training_memory(count(config))[precision]
    )


def test_weight_memory() -> None:
    """Stacked experts are what quantisers skip; all the rest is what they should leave alone."""
    config = BackboneConfig(width=128, expert_hidden=256, experts=4, layers=4, moe_every=2)
    counted = count(config)
    experts = 2 * (4 + 1) * 3 * 128 * 256  # two mixtures of four experts and a shared one
    rest = counted["total"] - experts
    assert weight_memory(counted) == {
        "fp32": 4 * counted["total"],
        "bf16": 2 * counted["total"],
        "fp8": experts + 2 * rest,
        "int4": experts // 2 + 4 * (experts // 128) + 2 * rest,
    }
    dense = count(BackboneConfig(experts=0))
    assert len(set(weight_memory(dense).values())) == 2


@pytest.mark.parametrize("context", [5, 64, 1000])
def test_cache_memory_is_that_of_a_real_cache(context: int) -> None:
    """A second rule for the cache would drift from the one that allocates it."""
    config = BackboneConfig(layers=8, chunk=64, kv_heads=1)
    found = cache_memory(config, context)
    real = KVCache(config, 1, context, like=torch.zeros((), dtype=torch.bfloat16))
    assert found["bf16"]["bytes"] == real.bytes == 2 * found["fp8"]["bytes"]
    a_token = 2 * config.head_dim * 2  # keys and values of one head, two bytes each
    assert found["bf16"]["full"] == 8 * context * a_token
    assert real.bytes == (2 * context + 6 * min(context, 64)) * a_token


def test_scout_caches_ten_million_tokens_in_a_quarter() -> None:
    """The chunk is what makes the advertised context possible: 12 of 48 layers hold all of it."""
    found = cache_memory(preset("scout"), 10_000_000)["bf16"]
    assert found["full"] == 48 * 10_000_000 * 4096
    assert found["bytes"] == (12 * 10_000_000 + 36 * 8192) * 4096
    assert found["bytes"] / found["full"] == pytest.approx(0.25, abs=0.001)


def _printed(what: object, width: int) -> str:
    """What a terminal of that width shows."""
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal(width: int) -> None:
    """A wrapped row or a cut name makes the table unreadable where it is read most."""
    described = {name: describe(name, config, 10_000_000) for name, config in PRESETS.items()}
    shown = _printed(overview(described), width)
    for name, facts in described.items():
        (row,) = (line for line in shown.splitlines() if line.split()[:1] in ([name], [f"{name}*"]))
        ends = " ".join(row.split())
        assert ends.endswith(in_bytes(facts["cache_bytes"]["bf16"]["bytes"]))
        assert f" {short(facts['active'])} " in ends
        one = _printed(details(name, facts), width)
        assert "…" not in one
        assert f"{facts['total']:,}" in one
        assert ("This is an estimate" in one) == (name == "behemoth")
    assert "…" not in shown
    assert "* behemoth is an estimate." in shown


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (7, "7"),
        (999, "999"),
        (1_074_304, "1.07M"),
        (999_499, "999k"),
        (999_600, "1.00M"),
        (99_960, "100k"),
        (107_769_861_120, "108B"),
        (1_988_043_217_920, "1.99T"),
        (4e15, "4,000T"),
    ],
)
def test_short_numbers(n: float, text: str) -> None:
    """Rounding across a unit printed 1e+03k."""
    assert short(n) == text
    assert in_bytes(64_700_000_000) == "64.7 GB"
