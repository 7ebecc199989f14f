"""Dynamic tiling: an image becomes a grid of tiles in its own shape, and one tile of the whole.

Pure functions. The rule is Llama 4's. Sources: Meta's reference code, ``models/llama4`` in
``preprocess.py`` and ``chat_format.py``; transformers' ``models/llama4`` in
``image_processing_llama4.py``.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage

from fusion.layout import tiles_per_image
from sandbox.data.media import as_rgb


class Tiles(NamedTuple):
    """An image as the encoder takes it.

    Attributes:
        pixels: uint8 ``[n, 3, S, S]``, n = ``fusion.layout.tiles_per_image(rows, columns)``: the
            grid row by row, then the global tile where the grid has several.
        rows, columns: of the grid.
    """

    pixels: np.ndarray
    rows: int
    columns: int


def best_grid(width: int, height: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The rows and columns of tiles that suit an image of ``width x height`` pixels.

    Of all grids of at most ``max_tiles`` tiles, one that holds the image at its full size, with as
    little room to grow as possible; if none holds it, one that shrinks it least; of equals, the
    smallest. With tiles of 100 pixels and ``max_tiles`` = 4::

        image         grid
         60 x  60     1 x 1     it fits every grid, this one as closely as any
        150 x  90     1 x 2     it fits 1 x 2 to 1 x 4 alike, up to its height, and 2 x 2 loosely
        150 x 150     2 x 2     it fits no other
        900 x 200     1 x 4     it fits none; here it keeps 4/9 of its size, elsewhere 1/3 or less

    Returns:
        (rows, columns), in this order: first down, then across.
    """

    def cost(grid: tuple[int, int]) -> tuple[bool, float, int]:
        rows, columns = grid
        scale = min(columns * tile_size / width, rows * tile_size / height)
        return scale < 1, abs(scale - 1), rows * columns

    grids = (
        (rows, columns)
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles // rows + 1)
    )
    return min(grids, key=cost)


def shown_size(width: int, height: int, tile_size: int, rows: int, columns: int) -> tuple[int, int]:
    """The (width, height) in which the tiles of a grid show an image; its aspect ratio is kept.

    An image too large for the grid shrinks until it fits; one with both sides shorter than a tile's
    grows until one is as long; any other keeps its size.
    """
    # A side may grow up to one tile, and has to shrink to the grid.
    widest = min(max(width, tile_size), columns * tile_size)
    highest = min(max(height, tile_size), rows * tile_size)
    # Quotient, product and floor as in both sources: released weights were trained with their
    # rounding, which at times costs a side its last pixel (49 x 49 becomes 31 x 32).
    if widest / width < highest / height:
        return widest, max(1, math.floor(height * (widest / width)))
    return max(1, math.floor(width * (highest / height))), highest


def cut(image: PILImage.Image, tile_size: int, max_tiles: int) -> Tiles:
    """Cut an image into at most ``max_tiles`` tiles, and a global one if they are several.

    The image, its aspect ratio kept, lies in the upper left of its grid; what is free on the right
    and below is black. The global tile comes last and shows all of the image, stretched to a
    square. An image of 7 x 4 pixels in tiles of 4 (``·`` is black)::

        a a a a|b b b ·
        a a a a|b b b ·     1 row, 2 columns     pixels = [a, b, global]
        a a a a|b b b ·
        a a a a|b b b ·

    A grid of one tile has no global tile: it shows the whole image already. An image of exactly one
    tile's size passes through unchanged.

    Tiles stay uint8, a quarter of the memory that they take as floating-point numbers on their way
    to the encoder, which normalises them in fp32. Nothing is lost by that: both sources round to
    whole grey levels when they resize, too. Black is so before normalising.

    Args:
        image: of any mode; transparent parts show white.
        tile_size: S.
        max_tiles: most tiles of the grid, at least 1.
    """
    S, image = tile_size, as_rgb(image)
    rows, columns = best_grid(*image.size, S, max_tiles)
    shown = _resized(image, shown_size(*image.size, S, rows, columns))
    pixels = np.empty((tiles_per_image(rows, columns), 3, S, S), dtype=np.uint8)
    # One after the other, since the memory of one crop serves the next: all of them at once would
    # be mapped anew for every image, which takes as long as resizing it.
    for n in range(rows * columns):
        top, left = n // columns * S, n % columns * S
        # Where a tile reaches beyond the image, Pillow crops black.
        pixels[n] = _channels(shown.crop((left, top, left + S, top + S)))
    if rows * columns > 1:
        pixels[-1] = _channels(_resized(image, (S, S)))
    return Tiles(pixels, rows, columns)


def _resized(image: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    return image.resize(size, PILImage.Resampling.BILINEAR)


def _channels(image: PILImage.Image) -> np.ndarray:
    """The image as ``[3, S, S]``."""
    return np.asarray(image).transpose(2, 0, 1)
