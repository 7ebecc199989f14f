"""Grouped-query attention with iRoPE: local chunked RoPE layers and global NoPE layers."""

import torch
from torch import Tensor, nn

from sandbox.backbone import backends, rope
from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.layers import Linear, rms_norm
from sandbox.backbone.visibility import Visibility


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

    def forward(
        self,
        x: Tensor,
        visibility: Visibility,
        cache: KVCache | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Attend within real tokens ``x [M, D]`` and, with a cache, over what it holds.

        ``chosen``, int64 ``[Mq]`` and ascending, are the tokens whose output is needed; None means
        all. Returns ``[Mq, D]``.
        """
        queries = x if chosen is None else x.index_select(0, chosen)
        q, k, v = (
            project(of).unflatten(-1, (-1, self.head_dim))
            for project, of in ((self.query, queries), (self.key, x), (self.value, x))
        )
        if self.rope and chosen is None:
            both = self._turned(torch.cat((q, k), dim=1), visibility.turn)
            q, k = both[:, : self.heads], both[:, self.heads :]
        elif self.rope:
            assert chosen is not None
            q = self._turned(q, visibility.turn[chosen])
            k = self._turned(k, visibility.turn)
        elif (factor := visibility.temperature) is not None:
            factor = factor if chosen is None else factor[chosen]
            q = (q * factor).type_as(q)  # the factor itself is not rounded
        if cache is None:
            mixed = backends.of(x).attend(q, k, v, visibility, local=self.rope, chosen=chosen)
        else:
            mixed = cache.attend(self.layer, q, k, v, visibility)
        return self.output(mixed.flatten(-2))

    def _turned(self, x: Tensor, turn: Tensor) -> Tensor:
        x = rope.rotate(x, turn)
        return rms_norm(x.float(), None, self.norm_eps).type_as(x) if self.qk_norm else x
