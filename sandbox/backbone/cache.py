"""The KV cache: every position for global layers, one chunk for local ones.

A token's slot is its true position (modulo the chunk, on local layers), row by row. Rows of unequal
length therefore need no padding on the left: what padding on the right writes is hidden by the
rule ``slot <= position`` until the tokens that follow overwrite it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sandbox.backbone import backends
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.layers import compute_dtype
from sandbox.backbone.visibility import Visibility
from sandbox.errors import UserError


class Slots(NamedTuple):
    """Where one new token of every row goes in the layers of one kind, and what it sees there.

    Attributes:
        at: slot of the new token, one for all rows or int64 ``[B]``.
        seen: slots to attend over, from 0 on.
        mask: ``[B, 1, 1, seen]``, 0 or minus infinity; None where every row sees all of them.
    """

    at: int | Tensor
    seen: int
    mask: Tensor | None


def close_up(going: Sequence[int]) -> list[int]:
    """An order of the places in ``going`` (ascending) that ``KVCache.select`` need not copy.

    Places that stay within the new number of rows stay, the others fill what is free::

        going 0 2 3 5  ->  0 5 2 3
    """
    count = len(going)
    stay = {place for place in going if place < count}
    rest = iter(place for place in going if place >= count)
    return [place if place in stay else next(rest) for place in range(count)]


class KVCache:
    """Preallocated keys and values ``[B, slots, G, K]`` of every layer.

    Attributes:
        lengths: int64 ``[B]``, tokens that each row has seen.
        longest: the largest of them, known without asking the device.
        even: whether all rows are equally long, so that decoding needs no mask.
    """

    def __init__(self, config: BackboneConfig, rows: int, capacity: int, like: Tensor) -> None:
        """Room for ``rows`` rows of ``capacity`` tokens, for products with ``like``."""
        self.chunk = config.chunk
        self.capacity = capacity
        self.local = [
            config.uses_rope(i) and config.chunk is not None for i in range(config.layers)
        ]
        slots = [min(config.chunk or capacity, capacity) if x else capacity for x in self.local]
        shapes = [(rows, s, config.kv_heads, config.head_dim) for s in slots]
        self.dtype = compute_dtype(like)
        self.keys = [like.new_zeros(shape, dtype=self.dtype) for shape in shapes]
        self.values = [like.new_zeros(shape, dtype=self.dtype) for shape in shapes]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.longest = 0
        self.even = True

    @property
    def bytes(self) -> int:
        """Memory that the keys and values take."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows, int64 ``[B']``: rows that are done can leave.

        Rows in the order of ``close_up`` are moved within the memory there is; only those that
        change their place are copied.
        """
        count = len(rows)
        holes = (rows != torch.arange(count, device=rows.device)).nonzero().squeeze(1)
        fillers = rows[holes]
        if count <= len(self.lengths) and bool((fillers >= count).all()):

            def picked(x: Tensor) -> Tensor:
                x[holes] = x[fillers]
                return x[:count]
        else:

            def picked(x: Tensor) -> Tensor:
                return x[rows]

        self.keys = [picked(x) for x in self.keys]
        self.values = [picked(x) for x in self.values]
        self.lengths = picked(self.lengths)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        """Attention of new tokens ``[M, heads, K]`` over their rows so far, which they then join.

        Raises:
            UserError: the row would outgrow the cache.
        """
        T = view.shape[1]
        self._check(T)
        if self.longest == 0:
            mixed = backends.of(q).attend(q, k, v, view, local=self.local[layer])
            self._write(layer, k, v, view)
        elif T == 1:
            mixed = self.decode(layer, q, k, v, self.slots(local=self.local[layer]))
        else:
            mixed = self._extend(layer, q, k, v, view)
            self._write(layer, k, v, view)
        return mixed

    def advance(self, T: int, view: Visibility) -> None:
        """Count the T tokens that every layer has now seen; padding (right of a row) is not one."""
        self.even = self.even and view.real is None
        self.lengths = self._ends(view)
        self.longest += T

    def _ends(self, view: Visibility) -> Tensor:
        """Tokens of each row, those of this pass among them: int64 ``[B]``."""
        if view.real is None:
            return self.lengths + view.shape[1]
        return self.lengths.index_add(0, view.row, torch.ones_like(view.row))

    def slots(self, *, local: bool) -> Slots:
        """Where the next token of every row goes, on local or on global layers.

        Raises:
            UserError: the row would outgrow the cache.
        """
        self._check(1)
        slot, last = self.lengths, self.longest
        if local:
            assert self.chunk is not None
            slot, last = slot % self.chunk, last % self.chunk if self.even else self.chunk - 1
        if self.even:
            return Slots(last, last + 1, None)
        seen = min(last + 1, self.chunk if local and self.chunk else self.capacity, self.capacity)
        places = torch.arange(seen, device=slot.device)
        hidden = (places > slot[:, None])[:, None, None]
        mask = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
        return Slots(slot, seen, mask)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Slots) -> Tensor:
        """Attention of one token a row, ``[B, heads, K]``, over the row and itself; it joins them.

        ``slots`` are those of the layer's kind.
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(slots.at, int):
            keys.select(1, slots.at).copy_(k)
            values.select(1, slots.at).copy_(v)
        else:
            rows = torch.arange(len(q), device=q.device)
            keys[rows, slots.at], values[rows, slots.at] = k, v
        # The heads that share keys become queries of one head: each key is then read once.
        return F.scaled_dot_product_attention(
            q.reshape(q.shape[0], k.shape[1], -1, q.shape[2]),
            keys[:, : slots.seen].transpose(1, 2),
            values[:, : slots.seen].transpose(1, 2),
            attn_mask=slots.mask,
        ).flatten(1, 2)

    def _check(self, T: int) -> None:
        if self.longest + T > self.capacity:
            raise UserError(
                f"the KV cache holds {self.capacity} tokens a row, {self.longest + T} are needed"
            )

    def _extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        """Several tokens after others: attend over what is held and over themselves."""
        held = min(self.longest, self.keys[layer].shape[1])
        chunk = self.chunk if self.local[layer] else None
        k, v = (
            torch.cat((past[layer][:, :held].flatten(0, 1), new.type_as(past[layer])))
            for past, new in ((self.keys, k), (self.values, v))
        )
        return backends.of(q).attend_cached(q, k, v, view, self.lengths, chunk=chunk)

    def _write(self, layer: int, k: Tensor, v: Tensor, view: Visibility) -> None:
        """Store new keys and values ``[M, G, K]``; a local layer keeps the open chunk alone."""
        slots = self.keys[layer].shape[1]
        if not self.local[layer] and view.real is None and self.even:
            span = slice(self.longest, self.longest + view.shape[1])
            for held, new in ((self.keys[layer], k), (self.values[layer], v)):
                held[:, span] = new.unflatten(0, view.shape)
            return
        slot = view.coordinates.positions
        places = view.row * slots + slot
        if self.local[layer]:
            assert self.chunk is not None
            if "open" not in view.plans:  # found once for all layers: the host waits for it
                open_chunk = self._ends(view) // self.chunk
                view.plans["open"] = (slot // self.chunk == open_chunk[view.row]).nonzero()[:, 0]
            kept = view.plans["open"]
            assert isinstance(kept, Tensor)
            places = view.row[kept] * slots + slot[kept] % self.chunk
            k, v = k[kept], v[kept]
        for held, new in ((self.keys[layer], k), (self.values[layer], v)):
            held.flatten(0, 1).index_copy_(0, places, new.type_as(held))
