"""Presets: their sizes, counted on the meta device, and what may be said of them."""

import pytest

from sandbox.backbone.config import NOTES, PRESETS, BackboneConfig, preset
from sandbox.params import count

LADDER = {"1m": 1e6, "5m": 5e6, "25m": 25e6, "100m": 100e6, "400m": 400e6, "1b": 1e9}


@pytest.mark.parametrize("name", LADDER)
def test_a_rung_has_the_size_it_is_named_by(name):
    """Guards against a size changed in passing: results of different rungs would not compare."""
    assert count(preset(name))["active"] == pytest.approx(LADDER[name], rel=0.1)


@pytest.mark.parametrize("name", LADDER)
def test_a_rung_keeps_the_proportions_of_scout(name):
    """Guards against a ladder of models that grow into something else than Llama 4."""
    small, scout = preset(name), preset("scout")
    assert small.expert_hidden / small.width == pytest.approx(1.6, rel=0.02)
    assert small.heads * small.head_dim / small.width == pytest.approx(1, rel=0.16)
    assert 4 <= small.heads / small.kv_heads <= 5
    assert small.layers % scout.nope_every == 0
    for key in ("experts", "top_k", "moe_every", "shared_expert", "nope_every", "qk_norm"):
        assert getattr(small, key) == getattr(scout, key), key
    assert small.temperature_floor == small.chunk  # 8192 both in Scout
    # Kernels for narrow types want multiples of 16.
    assert not any(x % 16 for x in (small.width, small.expert_hidden, small.head_dim))


def test_the_ladder_grows_in_depth_and_width():
    """Guards against a rung that is out of order."""
    rungs = [preset(name) for name in LADDER]
    assert [rung.layers for rung in rungs] == [4, 8, 12, 16, 20, 24]
    widths = [rung.width for rung in rungs]
    assert widths == sorted(set(widths))
    assert len({rung.vocab_size for rung in rungs}) == 1


def test_tiny_stays_as_it_was_published():
    """Guards against a default that changes: the README's results are this model's."""
    tiny = preset("tiny")
    assert tiny == BackboneConfig()
    counted = count(tiny)
    assert (counted["total"], counted["active"]) == (1_034_592, 592_224)
    assert (tiny.layers, tiny.width, tiny.heads, tiny.experts) == (4, 96, 3, 4)
    assert (tiny.balance, tiny.balance_rate, tiny.init_std) == ("bias", 0.02, None)


def test_behemoth_meets_what_is_public_and_says_that_it_is_an_estimate():
    """Guards against guessed numbers that pass for Meta's."""
    behemoth = count(preset("behemoth"))
    assert behemoth["active"] == pytest.approx(288e9, rel=0.02)
    assert behemoth["total"] == pytest.approx(2e12, rel=0.02)
    assert preset("behemoth").experts == 16
    assert NOTES["behemoth"].startswith("an estimate")
    assert set(NOTES) <= set(PRESETS)


def test_a_preset_can_have_another_vocabulary():
    """Guards against presets that only the tokenizer they were counted with can train."""
    assert preset("25m", 2048).vocab_size == 2048
    assert preset("25m", 2048).width == preset("25m").width
    assert preset("25m").vocab_size == 1024
