"""Learned positions for another grid of patches: how a tower takes tiles of another size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(table: Tensor, grid: int, first: int = 0, last: int = 0) -> Tensor:
    """Interpolate a table of positions to ``grid`` x ``grid`` patches.

    Rows of the class token belong to no place and stay as they are. The patches between them are
    a picture of V channels, resized as open_clip does (``resize_pos_embed`` in its ``model.py``):
    bicubic, antialiased where it shrinks, pixel centres at half places. So 2 x 2 patches with a
    class token first become 3 x 3::

        class  0 1       class  0 . 1
               2 3   ->         . . .
                                2 . 3

    Args:
        table: ``[..., first + G * G + last, V]``, the patches row-major.
        grid: patches a side of the result.
        first: rows before the patches.
        last: rows behind them.

    Returns:
        ``[..., first + grid * grid + last, V]`` in the same dtype; the table itself if G is
        ``grid``.

    Raises:
        ValueError: the rows between ``first`` and ``last`` fill no square.
    """
    rows, width = table.shape[-2] - first - last, table.shape[-1]
    side = math.isqrt(max(rows, 0))
    if side == 0 or side**2 != rows:
        raise ValueError(
            f"a table of {table.shape[-2]} positions, {first + last} of them of class tokens, "
            f"leaves {rows} for patches, which fill no square grid"
        )
    if side == grid:
        return table
    before, places, after = table.split((first, rows, last), dim=-2)
    picture = places.reshape(-1, side, side, width).permute(0, 3, 1, 2)
    resized = F.interpolate(picture.float(), (grid, grid), mode="bicubic", antialias=True)
    resized = resized.to(table.dtype).permute(0, 2, 3, 1)
    return torch.cat((before, resized.reshape(*before.shape[:-2], grid**2, width), after), dim=-2)


def resize_line(table: Tensor, places: int) -> Tensor:
    """Interpolate positions along one axis, ``[G, V]``, linearly to ``[places, V]``.

    Centres stand at half places and shrinking is antialiased, as in ``resize_positions``. The
    result has the same dtype; it is the table itself if G is ``places``.
    """
    if len(table) == places:
        return table
    # Only the modes for pictures know antialiasing. One pixel high, not wide: there torch 2.15
    # repeats the first row.
    picture = table.float().T[None, :, None, :]
    resized = F.interpolate(picture, (1, places), mode="bilinear", antialias=True)
    return resized[0, :, 0].T.to(table.dtype)
