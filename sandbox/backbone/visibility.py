"""The visibility rule: which keys a query may see, as one pure function of coordinates."""

from typing import NamedTuple

import torch
from torch import Tensor

from sandbox.backbone import rope
from sandbox.backbone.config import BackboneConfig

NOWHERE = -2  # a document that no token belongs to: its keys are seen by nothing


class Coordinates(NamedTuple):
    """What decides who sees whom: int64 tensors of one shape, of queries or of keys.

    Attributes:
        positions: true positions.
        documents: packing ids, different for different rows where rows are joined.
        branches: 0 on the trunk, k on the k-th branch.
        blocks: 0 on ordinary tokens, n > 0 on the tokens of block n.
    """

    positions: Tensor
    documents: Tensor
    branches: Tensor
    blocks: Tensor

    def at(self, index: Tensor) -> "Coordinates":
        """The coordinates of chosen tokens, by index into the first axis."""
        return Coordinates(*(x[index] for x in self))


def sees(query: Coordinates, key: Coordinates, chunk: int | None) -> Tensor:
    """The rule, elementwise: bool, as queries and keys broadcast.

    A query sees a key of the same document that is not after it, or in the same block, on the
    trunk (branch 0) or its own branch and, on local layers, in the same chunk of positions.
    """
    same_block = (key.blocks == query.blocks) & (query.blocks > 0)
    seen = (key.positions <= query.positions) | same_block
    seen = seen & (query.documents == key.documents)
    seen = seen & ((key.branches == 0) | (key.branches == query.branches))
    if chunk is not None:
        seen = seen & (query.positions // chunk == key.positions // chunk)
    return seen


def visible(query: Coordinates, key: Coordinates, chunk: int | None) -> Tensor:
    """The rule as a mask: bool ``[..., Tq, Tk]`` of coordinates ``[..., Tq]`` and ``[..., Tk]``.

    Rows are queries. Two packed documents of 3 and 2 tokens (``documents = 0 0 0 1 1``), globally
    and with ``chunk = 2``::

        1 . . . .      1 . . . .
        1 1 . . .      1 1 . . .
        1 1 1 . .      . . 1 . .
        . . . 1 .      . . . 1 .
        . . . 1 1      . . . 1 1

    Two questions after an image of two tokens (``branches = 0 0 1 1 2``, ``positions = 0 1 2 3
    2``)::

        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 1 1 1 .
        1 1 . . 1

    Text around an image of three tokens (``blocks = 0 1 1 1 0``), globally and with ``chunk = 2``::

        1 . . . .      1 . . . .
        1 1 1 1 .      1 1 . . .
        1 1 1 1 .      . . 1 1 .
        1 1 1 1 .      . . 1 1 .
        1 1 1 1 1      . . . . 1
    """
    queries = Coordinates(*(x.unsqueeze(-1) for x in query))
    return sees(queries, Coordinates(*(x.unsqueeze(-2) for x in key)), chunk)


def cached_coordinates(
    new: Coordinates, lengths: Tensor, slots: int, chunk: int | None
) -> Coordinates:
    """Coordinates of keys that a cache holds, ``slots`` a row, followed by those of new tokens.

    A row holds its ``lengths [B]`` earlier tokens in the slots of their positions or, with chunks,
    those of the chunk that it is in. Slots without a token are of no document.
    """
    lengths = lengths[:, None]
    positions = torch.arange(slots, device=lengths.device).expand(len(lengths), slots)
    if chunk is not None:
        positions = lengths // chunk * chunk + positions
    rows = torch.arange(len(lengths), device=lengths.device)[:, None] << 32
    documents = torch.where(positions < lengths, rows, NOWHERE)
    zeros = torch.zeros_like(positions)
    old = (x.flatten() for x in (positions, documents, zeros, zeros))
    return Coordinates(*(torch.cat(pair) for pair in zip(old, new, strict=True)))


def tempered(config: BackboneConfig, positions: Tensor) -> Tensor | None:
    """The factor of NoPE queries, fp32 ``[M, 1, 1]`` of positions ``[M]``; None when it is off."""
    if not config.temperature_scale:
        return None
    steps = torch.floor((positions + 1).float() / config.temperature_floor)
    return (1 + config.temperature_scale * torch.log1p(steps))[:, None, None]


class Visibility:
    """The coordinates of one forward pass, and what layers derive from them once.

    Layers compute real tokens only: M of them, those of all rows end to end, without the padding
    of rows. A few blank tokens may follow, which see nothing but themselves: they make M a multiple
    of the number that products are fast for.

    Attributes:
        shape: (B, T), of the rows with their padding.
        real: int64 ``[M - blank]``, places ``b * T + t`` of real tokens; None without padding.
        blank: tokens that were added.
        row: int64 ``[M]``, the row of each token.
        coordinates: of each token, ``[M]``; documents differ between rows.
        plain: whether every row is one document of T tokens at positions 0, 1, ...
        blocked: whether tokens may be in blocks.
        turn: rotary turns, complex ``[M, 1, K / 2]``.
        temperature: fp32 ``[M, 1, 1]`` factor of NoPE queries, or None when it is off.
        plans: what a backend keeps of this pass from one layer to the next.
    """

    def __init__(
        self,
        config: BackboneConfig,
        frequency: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
        branches: Tensor | None = None,
        blocks: Tensor | None = None,
        *,
        plain: bool = False,
        real: Tensor | None = None,
        multiple: int = 1,
    ) -> None:
        """Derive them of ``[B, T]`` each; missing ones are zeros. Padding is what is not real.

        Rows with padding get blank tokens, to a ``multiple`` of tokens in all.
        """
        self.chunk = config.chunk
        B, T = positions.shape
        self.shape = (B, T)
        self.real = real
        self.blank = 0 if real is None else -len(real) % multiple
        self.plain = plain and documents is None and branches is None and blocks is None
        self.blocked = blocks is not None
        self.row = self.flat(torch.arange(B, device=positions.device)[:, None].expand(B, T))
        zeros = torch.zeros_like(positions)
        given = (zeros if x is None else x for x in (documents, branches, blocks))
        flat = Coordinates(self.flat(positions), *(self.flat(x) for x in given))
        documents = flat.documents + (self.row << 32)
        if self.blank:  # each a document of its own
            documents[-self.blank :] = -1 - torch.arange(self.blank)
        self.coordinates = flat._replace(documents=documents)
        self.turn = rope.rotation(flat.positions, frequency)
        self.temperature = tempered(config, flat.positions)
        self.plans: dict[object, object] = {}

    def flat(self, x: Tensor) -> Tensor:
        """Real and blank tokens ``[M, ...]`` of rows ``[B, T, ...]``; blank ones are 0."""
        x = x.flatten(0, 1)
        if self.real is None:
            return x
        real = x.index_select(0, self.real)
        return torch.cat((real, real.new_zeros(self.blank, *x.shape[1:]))) if self.blank else real

    def rows(self, x: Tensor) -> Tensor:
        """Rows ``[B, T, ...]`` of tokens ``[M, ...]``; padding is 0."""
        if self.real is not None:
            whole = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            x = whole.index_copy(0, self.real, x[: len(self.real)])
        return x.unflatten(0, self.shape)
