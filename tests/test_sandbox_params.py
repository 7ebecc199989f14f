import pytest

from sandbox.backbone.config import PRESETS, BackboneConfig, preset
from sandbox.params import count


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
