"""Image spans: the drawings of the docstring, and counts over all grids."""

import doctest
import re
from inspect import getdoc
from types import SimpleNamespace

import pytest

from fusion import layout
from fusion.layout import IMAGE, PATCH, TILE_X, TILE_Y, image_span, tiles_per_image

GRIDS = [(rows, columns) for rows in range(1, 5) for columns in range(1, 5)]


def drawings(function: object) -> list[list[str]]:
    """The words of each indented block behind a ``::`` in a docstring."""
    blocks = re.findall(r"::\n\n((?:    .*\n?)+)", getdoc(function) or "")
    return [block.split() for block in blocks]


def test_spans_are_as_drawn() -> None:
    """Guards against code and drawing telling different stories: one tile, a grid, no tokens."""
    assert drawings(image_span) == [
        image_span(tokens_per_tile=2),
        image_span(tokens_per_tile=1, rows=2, columns=3),
        image_span(tokens_per_tile=0),
    ]


def test_a_grid_is_written_out() -> None:
    """Guards the drawing itself: rows and columns swapped in both would agree with each other."""
    x, y = TILE_X, TILE_Y
    assert image_span(1, rows=2, columns=3) == [
        layout.IMAGE_START,
        *[PATCH, x, PATCH, x, PATCH, y],
        *[PATCH, x, PATCH, x, PATCH, y],
        *[IMAGE, PATCH, layout.IMAGE_END],
    ]


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize("tokens_per_tile", [0, 1, 4, 144])
def test_placeholders_match_tiles(rows: int, columns: int, tokens_per_tile: int) -> None:
    """Guards against prompts and encoder disagreeing on the tiles (transformers #38842)."""
    span = image_span(tokens_per_tile, rows, columns)
    assert span.count(PATCH) == tiles_per_image(rows, columns) * tokens_per_tile
    assert span.count(IMAGE) == 1


@pytest.mark.slow  # importing transformers takes longer than all the rest of this file
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_spans_equal_transformers(rows: int, columns: int) -> None:
    """Guards against a layout that Llama 4's weights never saw."""
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    theirs = Llama4Processor._prompt_split_image(SimpleNamespace(), (rows, columns), 3)
    assert "".join(image_span(3, rows, columns)) == theirs


@pytest.mark.parametrize(
    ("tokens_per_tile", "rows", "columns"), [(-1, 1, 1), (4, 0, 1), (4, 1, 0), (0, -1, -1)]
)
def test_impossible_spans_are_refused(tokens_per_tile: int, rows: int, columns: int) -> None:
    """Guards against an empty grid that drops an image without a word."""
    with pytest.raises(ValueError, match=f"tokens_per_tile={tokens_per_tile}, {rows} x {columns}"):
        image_span(tokens_per_tile, rows, columns)


def test_examples_run() -> None:
    """Guards against examples in docstrings that are no longer true."""
    assert doctest.testmod(layout).attempted > 0
    assert doctest.testmod(layout).failed == 0
