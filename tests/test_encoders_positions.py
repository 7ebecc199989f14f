"""Positions resized: against open_clip's function, and on tables whose result is known."""

import pytest
import torch
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from encoders.llama4_vit import Llama4Vision
from encoders.metaclip import MetaCLIP
from encoders.mllama_vit import MllamaVision
from encoders.patches import Patches
from encoders.positions import resize_line, resize_positions


def table(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ramp(grid: int) -> Tensor:
    """Positions ``[G * G, 2]`` that say where a patch's centre lies in a tile of width 1."""
    centres = (torch.arange(grid) + 0.5) / grid
    return torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1).flatten(0, 1)


@pytest.mark.parametrize(("grid", "wanted"), [(4, 8), (14, 24), (7, 16), (8, 4), (16, 7), (5, 1)])
def test_equals_open_clip(grid: int, wanted: int) -> None:
    """Guards against another filter than the one that released high-resolution towers began with.

    Bilinear, corners aligned or no antialiasing: each is close, and none is equal.
    """
    positions = table(1 + grid**2, 6)
    model = nn.Module()
    model.visual = nn.Module()
    model.visual.grid_size = (wanted, wanted)
    state = {"visual.positional_embedding": positions}
    resize_pos_embed(state, model)
    ours = resize_positions(positions, wanted, first=1)
    assert ours.shape == (1 + wanted**2, 6)
    assert torch.equal(ours, state["visual.positional_embedding"])


def test_an_equal_grid_changes_no_bit() -> None:
    """Guards against rounding in towers that need no resizing."""
    positions = table(17, 6)
    assert resize_positions(positions, 4, first=1) is positions
    assert resize_line(positions, 17) is positions


@pytest.mark.parametrize(("grid", "wanted"), [(8, 16), (8, 24), (16, 8)])
def test_a_ramp_stays_a_ramp(grid: int, wanted: int) -> None:
    """Guards against rows and columns exchanged, and against places that shift by half a patch.

    The filter reaches two patches of the coarser grid; nearer to the border it lacks neighbours.
    """
    resized = resize_positions(ramp(grid), wanted).view(wanted, wanted, 2)
    expected = ramp(wanted).view(wanted, wanted, 2)
    edge = 2 * max(wanted // grid, 1)
    inside = slice(edge, wanted - edge)
    error = (resized - expected).abs()
    assert error[inside, inside].max() < 1e-6
    assert error.max() < 0.5 / min(grid, wanted)


def test_a_line_is_interpolated_within_each_feature() -> None:
    """Guards against vectors mixed across features, and against skipped rows when shrinking.

    On a picture one pixel wide, torch's antialiased modes return the first row over and over.
    """
    doubled = resize_line(torch.tensor([[0.0, 8.0], [4.0, 0.0]]), 4)
    torch.testing.assert_close(doubled, torch.tensor([[0.0, 8], [1, 6], [3, 2], [4, 0]]))
    spike = torch.zeros(8, 1)
    spike[3] = 1.0
    assert resize_line(spike, 2).abs().sum() > 0  # two taps at places 1.5 and 5.5 would miss it


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 1), (2, 1)])
def test_rows_of_the_class_token_stay_in_place(first: int, last: int) -> None:
    """Guards against a class token that takes part in the grid, at whichever end it stands."""
    positions = table(first + 16 + last, 6)
    resized = resize_positions(positions, 8, first=first, last=last)
    patches = resize_positions(positions[first : first + 16], 8)
    behind = positions[first + 16 :]
    assert torch.equal(resized, torch.cat((positions[:first], patches, behind)))


def test_leading_axes_and_dtype_are_kept() -> None:
    """Guards against tables of several tiles that blend into each other, and silent fp32."""
    many = table(2, 3, 17, 6)
    resized = resize_positions(many, 6, first=1)
    assert resized.shape == (2, 3, 37, 6)
    assert torch.equal(resized[1, 2], resize_positions(many[1, 2], 6, first=1))
    half = resize_positions(many.bfloat16(), 6, first=1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), resized, rtol=0, atol=0.03)


@pytest.mark.parametrize(("rows", "first"), [(17, 0), (16, 1), (1, 1), (0, 1)])
def test_a_table_of_no_square_grid_is_refused(rows: int, first: int) -> None:
    """Guards against a class token taken for a patch, or the reverse: all positions would shift."""
    with pytest.raises(ValueError, match=f"{rows} positions, {first} of them .* no square grid"):
        resize_positions(torch.zeros(rows, 6), 8, first=first)


# --- Each encoder's tables ------------------------------------------------------------------------


def test_metaclip_keeps_the_first_row_and_llama4_the_last() -> None:
    """Guards against a class token's position blended into the patches: it is at the other end."""
    sizes = {"patch_size": 8, "width": 24, "layers": 1, "heads": 3}
    for cls, key, row, extra in (
        (MetaCLIP, "visual.positional_embedding", 0, {}),
        (Llama4Vision, "positions", -1, {"hidden": 40}),
    ):
        small, large = (cls(tile_size=size, **sizes, **extra) for size in (32, 64))
        given = {key: table(17, 24)}
        resized = large.adapt(given)[key]
        assert resized.shape == (65, 24)
        assert torch.equal(resized[row], given[key][row])
        assert torch.equal(small.adapt(given)[key], given[key])
        with pytest.raises(ValueError, match="no square grid"):
            large.adapt({key: table(16, 24)})


def test_patches_keep_rows_apart_from_columns() -> None:
    """Guards against a table that is broadcast along the other axis after resizing."""
    given = {"row": table(4, 1, 6), "column": table(1, 4, 6) + 5}
    adapted = Patches(64, 8, 6).adapt(given)
    assert torch.equal(adapted["row"][:, 0], resize_line(given["row"][:, 0], 8))
    assert torch.equal(adapted["column"][0], resize_line(given["column"][0], 8))


def test_mllama_resizes_every_tile_of_every_arrangement() -> None:
    """Guards against positions of one tile that bleed into the next: they share a row."""
    sizes = {"patch_size": 8, "hidden": 12, "layers": 1, "global_layers": 1, "heads": 3}
    rest = {"ffn_hidden": 16, "intermediate_layers": [], "max_tiles": 2}
    encoder = MllamaVision(tile_size=64, **sizes, **rest)
    given = table(4, 2, 17, 12)  # kinds, tiles, places, features
    adapted = encoder.adapt({"position.tile.weight": given.flatten(1)})["position.tile.weight"]
    expected = resize_positions(given, 8, first=1)
    assert torch.equal(adapted.view_as(expected), expected)
