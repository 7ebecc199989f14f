"""The KV cache: every position for global layers, one chunk for local ones.

A token's slot is its true position (modulo the chunk, on local layers), row by row. Rows of unequal
length therefore need no padding on the left: what padding on the right writes is hidden by the
rule ``slot <= position`` until the tokens that follow overwrite it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sandbox.backbone import backends
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.layers import compute_dtype
from sandbox.backbone.visibility import Visibility
from sandbox.errors import UserError


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
        dtype = compute_dtype(like)
        self.keys = [like.new_zeros(shape, dtype=dtype) for shape in shapes]
        self.values = [like.new_zeros(shape, dtype=dtype) for shape in shapes]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.longest = 0
        self.even = True

    @property
    def bytes(self) -> int:
        """Memory that the keys and values take."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows, int64 ``[B']``: rows that are done can leave."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]
        self.lengths = self.lengths[rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        """Attention of new tokens ``[M, heads, K]`` over their rows so far, which they then join.

        Raises:
            UserError: the row would outgrow the cache.
        """
        T = view.shape[1]
        if self.longest + T > self.capacity:
            raise UserError(
                f"the KV cache holds {self.capacity} tokens a row, {self.longest + T} are needed"
            )
        if self.longest == 0:
            mixed = backends.of(q).attend(q, k, v, view, local=self.local[layer])
            self._write(layer, k, v, view)
        elif T == 1:
            mixed = self._decode(layer, *(x.unsqueeze(1) for x in (q, k, v))).squeeze(1)
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

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token a row: write its slot, then attend over the slots up to it."""
        keys, values, seen = self.keys[layer], self.values[layer], self.longest
        slot = self.lengths
        if self.local[layer]:
            assert self.chunk is not None
            slot, seen = slot % self.chunk, seen % self.chunk if self.even else self.chunk - 1
        if self.even:
            keys[:, seen], values[:, seen] = k[:, 0], v[:, 0]
            return _attend_one(q, keys[:, : seen + 1], values[:, : seen + 1])
        rows = torch.arange(len(slot), device=slot.device)
        keys[rows, slot], values[rows, slot] = k[:, 0], v[:, 0]
        seen = min(seen + 1, keys.shape[1])
        mask = torch.arange(seen, device=slot.device) <= slot[:, None, None]
        return _attend_one(q, keys[:, :seen], values[:, :seen], mask)

    def _extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        """Several tokens after others: attend over what is held and over themselves."""
        held = min(self.longest, self.keys[layer].shape[1])
        chunk = self.chunk if self.local[layer] else None
        k, v = (
            torch.cat((past[layer][:, :held].flatten(0, 1), new.type_as(past[layer])))
            for past, new in ((self.keys, k), (self.values, v))
        )
        return backends.of(q).attend_behind(q, k, v, view, self.lengths, chunk=chunk)

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


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one query a row, ``[B, 1, H, K]``, over ``k, v [B, T, G, K]``.

    ``mask`` is bool ``[B, 1, T]``. The heads that share keys become queries of one head: each key
    is then read once.
    """
    groups = q.reshape(len(q), k.shape[2], -1, q.shape[-1])
    mask = None if mask is None else mask.unsqueeze(1)
    mixed = F.scaled_dot_product_attention(
        groups, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return mixed.reshape(q.shape)
