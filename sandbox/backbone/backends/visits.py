"""The visits of tokens to their experts, laid out expert by expert."""

from typing import NamedTuple

import torch
from torch import Tensor


class Visits(NamedTuple):
    """How the visits of M tokens to their k experts are laid out, expert by expert.

    Attributes:
        order: int64 ``[R]``, the visit ``m * k + i`` at each row; anything on blank rows.
        rows: int64 ``[M * k]``, the row of each visit.
        ends: int32 ``[E]``, where each expert's rows end.
        blank: int64, rows without a visit; None if there are none.
    """

    order: Tensor
    rows: Tensor
    ends: Tensor
    blank: Tensor | None


def sorted_visits(chosen: Tensor, experts: int) -> Visits:
    """Visits of ``chosen [M, k]`` without blank rows."""
    ids, order = chosen.flatten().sort(stable=True)
    every = torch.arange(experts, device=ids.device)
    ends = torch.searchsorted(ids, every, right=True, out_int32=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(ids), device=ids.device)
    return Visits(order, rows, ends, None)


def padded_visits(chosen: Tensor, experts: int, multiple: int) -> Visits:
    """Visits of ``chosen [M, k]``; the rows of each expert are a multiple of a number.

    Two visits to each of two experts, in multiples of 3 (``-`` is a blank row)::

        chosen  1 0 1 0      order  1 3 - 0 2 -      rows  3 0 4 1      ends  3 6
    """
    order, rows, ends, _ = sorted_visits(chosen, experts)
    counts = ends.diff(prepend=ends.new_zeros(1))
    room = (counts + multiple - 1) // multiple * multiple
    wide = room.cumsum(0)
    rows = rows + (wide - room - ends + counts)[chosen.flatten()]
    blank = torch.ones(int(wide[-1]), dtype=torch.bool).index_fill_(0, rows, False)
    padded = order.new_zeros(len(blank)).index_copy_(0, rows, torch.arange(len(rows)))
    return Visits(padded, rows, wide.to(torch.int32), blank.nonzero().squeeze(1))
