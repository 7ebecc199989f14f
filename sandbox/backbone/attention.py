"""Grouped-query attention with iRoPE: local chunked RoPE layers and global NoPE layers.

Which keys a query may see is decided once a forward pass, by ``Visibility``, and shared by all
layers. Rows that are plain sequences never build a mask.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandbox.backbone import rope
from sandbox.backbone.causal import causal_attention
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.layers import Linear, rms_norm

if TYPE_CHECKING:
    from sandbox.backbone.cache import KVCache

NOWHERE = -2  # a document that no token belongs to: its keys are seen by nothing
NO_BLOCK = -1  # no key is of this block


class Coordinates(NamedTuple):
    """What decides who sees whom: int64 ``[B, T]`` each, of queries or of keys.

    Attributes:
        positions: true positions.
        documents: packing ids.
        branches: 0 on the trunk, k on the k-th branch.
        blocks: 0 on ordinary tokens, n > 0 on the tokens of block n.
    """

    positions: Tensor
    documents: Tensor
    branches: Tensor
    blocks: Tensor


def visible(query: Coordinates, key: Coordinates, chunk: int | None) -> Tensor:
    """The visibility rule: bool ``[..., Tq, Tk]`` from the coordinates of each.

    A query sees a key of the same document that is not after it, or in the same block, on the
    trunk (branch 0) or its own branch and, on local layers, in the same chunk of positions. Rows
    are queries. Two packed documents of 3 and 2 tokens (``documents = 0 0 0 1 1``), globally and
    with ``chunk = 2``::

        1 . . . .      1 . . . .
        1 1 . . .      1 1 . . .
        1 1 1 . .      . . 1 . .
        . . . 1 .      . . . 1 .
        . . . 1 1      . . . 1 1

    Two questions behind an image of two tokens (``branches = 0 0 1 1 2``, ``positions = 0 1 2 3
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
    q_position, q_document, q_branch, q_block = (x.unsqueeze(-1) for x in query)
    k_position, k_document, k_branch, k_block = (x.unsqueeze(-2) for x in key)
    mask = (k_position <= q_position) | (k_block == q_block.where(q_block > 0, NO_BLOCK))
    mask &= q_document == k_document
    mask &= (k_branch == 0) | (k_branch == q_branch)
    if chunk is not None:
        mask &= q_position // chunk == k_position // chunk
    return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = True
) -> Tensor:
    """Softmax attention of ``q [B, Tq, H, K]`` over ``k, v [B, Tk, G, K]``.

    Under ``mask``, bool ``[B, Tq, Tk]``; without one, causal or over all keys. Returns
    ``[B, Tq, H, K]``.
    """
    if causal and mask is None:
        return causal_attention(q, k, v)
    if q.shape[1] == 1:
        # The heads that share keys become queries of one head: each key is then read once.
        groups = q.reshape(len(q), k.shape[2], -1, q.shape[-1])
        mask = None if mask is None else mask.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(
            groups, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        return mixed.reshape(q.shape)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


class Visibility:
    """The coordinates of one forward pass, and attention under their rule.

    Attributes:
        positions: int64 ``[B, T]``, true positions.
        turn: rotary turns of them, complex ``[B, T, 1, K / 2]``.
        temperature: fp32 ``[B, T, 1, 1]`` factor of NoPE queries, or None when it is off.
    """

    def __init__(
        self,
        config: BackboneConfig,
        frequency: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
        branches: Tensor | None = None,
        blocks: Tensor | None = None,
        plain: bool = False,
    ) -> None:
        self.chunk = config.chunk
        self.positions = positions
        self.documents = documents
        self.branches = branches
        self.blocks = blocks
        self.plain = plain and documents is None and branches is None and blocks is None
        self.turn = rope.rotation(positions, frequency)
        self.temperature = None
        if config.temperature_scale:
            steps = torch.floor((positions + 1).float() / config.temperature_floor)
            self.temperature = (1 + config.temperature_scale * torch.log1p(steps))[..., None, None]
        self._masks: dict[bool, Tensor] = {}

    @property
    def coordinates(self) -> Coordinates:
        """Of every token; what was not given is 0."""
        zeros = torch.zeros_like(self.positions)
        given = (self.documents, self.branches, self.blocks)
        return Coordinates(self.positions, *(zeros if x is None else x for x in given))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, local: bool) -> Tensor:
        """Self-attention of a whole sequence, ``[B, T, heads, K]`` each, without a cache."""
        T = q.shape[1]
        chunk = self.chunk if local else None
        if self.plain:
            return attend(q, k, v) if chunk is None or chunk >= T else self._folded(q, k, v, chunk)
        folds = 2 if self.blocks is None else 3
        if chunk is not None and self.branches is None and folds * chunk < T:
            return self._folded_with_neighbours(q, k, v, chunk)
        if local not in self._masks:
            self._masks[local] = visible(self.coordinates, self.coordinates, chunk)
        return attend(q, k, v, self._masks[local])

    def _folded(self, q: Tensor, k: Tensor, v: Tensor, C: int) -> Tensor:
        """Local attention of plain rows: chunks become rows of the batch; exact, and no mask."""
        B, T = q.shape[:2]
        # Padding falls behind every true token of the last chunk, where causality hides it.
        q, k, v = (
            F.pad(x, (0, 0, 0, 0, 0, -T % C)).reshape(-1, C, *x.shape[2:]) for x in (q, k, v)
        )
        return attend(q, k, v).reshape(B, -1, *q.shape[2:])[:, :T]

    def _folded_with_neighbours(self, q: Tensor, k: Tensor, v: Tensor, C: int) -> Tensor:
        """Local attention of packed rows: each fold of C queries sees its own and the last fold.

        A chunk of positions is at most C places long and contiguous, so it begins no earlier than
        one fold before the query's, and ends no later than one fold behind it, which matters to
        blocks alone; the mask picks it out.
        """
        B, T = q.shape[:2]
        tail = -T % C
        ahead = 0 if self.blocks is None else C
        end, reach = tail + ahead, 2 * C + ahead
        q = F.pad(q, (0, 0, 0, 0, 0, tail)).reshape(-1, C, *q.shape[2:])
        k, v = (
            F.pad(x, (0, 0, 0, 0, C, end)).unfold(1, reach, C).movedim(-1, 2).flatten(0, 1)
            for x in (k, v)
        )
        if True not in self._masks:
            padded = [
                F.pad(x, (C, end), value=fill)
                for x, fill in zip(self.coordinates, (0, NOWHERE, 0, 0), strict=True)
            ]
            queries = Coordinates(*(x[:, C : C + T + tail].unflatten(1, (-1, C)) for x in padded))
            keys = Coordinates(*(x.unfold(1, reach, C) for x in padded))
            self._masks[True] = visible(queries, keys, C).flatten(0, 1)
        return attend(q, k, v, self._masks[True]).reshape(B, -1, *q.shape[2:])[:, :T]


class Attention(nn.Module):
    """One attention layer; RoPE and local, or NoPE, global and tempered, by its number.

    Source: Meta's reference code, ``models/llama4/model.py``, ``Attention``. The qk-norm follows
    the rotation and exists on RoPE layers only; it has no weights.
    """

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.rope = config.uses_rope(layer)
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.norm_eps = config.norm_eps
        self.heads = config.heads
        self.query = Linear(config.width, config.heads * config.head_dim)
        self.key = Linear(config.width, config.kv_heads * config.head_dim)
        self.value = Linear(config.width, config.kv_heads * config.head_dim)
        self.output = Linear(config.heads * config.head_dim, config.width)

    def forward(self, x: Tensor, visibility: Visibility, cache: "KVCache | None" = None) -> Tensor:
        """Attend within ``x [B, T, D]`` and, with a cache, over what it holds."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.query, self.key, self.value)
        )
        if self.rope:
            both = rope.rotate(torch.cat((q, k), dim=2), visibility.turn)
            if self.qk_norm:
                both = rms_norm(both.float(), None, self.norm_eps).type_as(q)
            q, k = both[:, :, : self.heads], both[:, :, self.heads :]
        elif visibility.temperature is not None:
            q = (q * visibility.temperature).type_as(q)  # the factor itself is not rounded
        if cache is None:
            mixed = visibility.attend(q, k, v, local=self.rope)
        else:
            mixed = cache.attend(self.layer, q, k, v, visibility)
        return self.output(mixed.flatten(-2))
