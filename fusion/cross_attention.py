"""Gated cross-attention (Llama 3.2 Vision): the baseline that early fusion is measured against.

The sequence stays text. Before some layers of the backbone an adapter looks at the images, so the
backbone itself never learns of them. Sources: Meta's reference code
(``models/llama3/multimodal/model.py``, ``CrossAttentionTransformerBlock``) and transformers
(``models/mllama``); the idea and its gates are Flamingo's (arXiv 2204.14198, section 2.2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.base import Fused, Fusion, ImageLayout

Scope = Literal["every", "latest"]


def own_tiles(
    starts: Tensor, tokens: int, documents: Tensor | None = None, branches: Tensor | None = None
) -> Tensor:
    """Which tiles belong to a token's text, before it or behind: bool ``[B, T, M]``.

    They are those of its row whose image token stands in the same document and on the trunk or
    the token's own branch. Arguments are those of ``visible_tiles``.
    """
    mask = (starts < tokens).unsqueeze(1).repeat(1, tokens, 1)
    place = starts.clamp(max=tokens - 1)
    if documents is not None:
        mask &= documents.gather(1, place).unsqueeze(1) == documents.unsqueeze(2)
    if branches is not None:
        branch = branches.gather(1, place).unsqueeze(1)
        mask &= (branch == 0) | (branch == branches.unsqueeze(2))
    return mask


def visible_tiles(
    starts: Tensor,
    tokens: int,
    scope: Scope,
    documents: Tensor | None = None,
    branches: Tensor | None = None,
) -> Tensor:
    """Which tokens may see which tiles: bool ``[B, T, M]``; rows are tokens.

    A token sees its own tiles (see ``own_tiles``) from their image's token on. With scope
    ``latest``, it sees the last image before it alone, and those that stand right before that
    one, with no text between, as in transformers' ``get_cross_attention_token_mask``. A row ``a
    <1> b <2> <3> c`` of words and image tokens (``starts = 1 3 4``)::

        every      latest

        . . .      . . .
        1 . .      1 . .
        1 . .      1 . .
        1 1 .      . 1 .
        1 1 1      . 1 1
        1 1 1      . 1 1

    Args:
        starts: int64 ``[B, M]``, the place of each tile's image token, ascending; T or more where
            a row has fewer than M tiles.
        tokens: T.
        scope: ``every`` image before a token, or the ``latest``.
        documents: int64 ``[B, T]``, packing ids; None if every row is one document.
        branches: int64 ``[B, T]``, 0 on the trunk; None if every row is a plain sequence.
    """
    before = starts.unsqueeze(1) <= torch.arange(tokens, device=starts.device).unsqueeze(1)
    mask = before & own_tiles(starts, tokens, documents, branches)
    if scope == "latest":
        group = F.pad((starts.diff(dim=1) > 1).cumsum(1), (1, 0)).unsqueeze(1)
        mask &= group == group.where(mask, -1).amax(2, keepdim=True)
    return mask


@dataclass(frozen=True)
class VisionContext:
    """What the adapters see of the images; vision tokens L are those of a row's tiles, padded.

    Attributes:
        memory: by layer, the keys and values ``[B, G, L, K]`` of every row's vision tokens.
        mask: bool ``[B, T, L]``, which vision tokens a token attends to; T is 1 when decoding.
        attends: bool ``[B, T, 1]``, where the attention branch is open. Elsewhere the mask is True
            throughout, since a softmax over nothing is undefined.
        feeds: bool ``[B, T, 1]``, where the feed-forward branch is open.
    """

    memory: Mapping[int, tuple[Tensor, Tensor]]
    mask: Tensor
    attends: Tensor
    feeds: Tensor

    def decoding(self, last: Tensor) -> "VisionContext":
        """The context of the tokens behind the prompts, see ``fusion.base.Context``."""
        rows = torch.arange(len(last), device=last.device)
        return self._masked(lambda mask: mask[rows, last].unsqueeze(1))

    def select(self, rows: Tensor) -> "VisionContext":
        """The context of the given rows, int64 ``[B']``."""
        memory = {layer: (k[rows], v[rows]) for layer, (k, v) in self.memory.items()}
        return replace(self._masked(lambda mask: mask[rows]), memory=memory)

    def _masked(self, change: Callable[[Tensor], Tensor]) -> "VisionContext":
        masks = (self.mask, self.attends, self.feeds)
        return VisionContext(self.memory, *map(change, masks))


class CrossAttention(Fusion):
    """Adapters before chosen layers, through which text looks at the images that precede it.

    All gates start at zero: the model then is the plain language model, bit for bit. So it stays
    for a token that no image precedes, whose adapters contribute nothing.

    Args:
        encoder_width: V, features per patch; supplied by the model.
        encoder_grid: patches a side of a tile; supplied by the model.
        width: D, of the backbone; supplied by the model.
        layers: backbone layers, numbered from 0, that an adapter stands before.
        heads, kv_heads, head_dim: H, G and K of the adapters' attention.
        hidden: hidden width of the adapters' feed-forward.
        norm_eps: epsilon of every RMS norm.
        scope: the images a token sees: ``every`` one before it, or only the ``latest``, as Llama
            3.2 Vision was trained (see ``visible_tiles``).
        hf_compat: do as transformers does, whose attention branch leaks: a token that no image
            precedes attends to those that follow in its text. (There, also to the blank tiles that
            pad an image, which the encoder here does not give.) Without, neither branch adds
            anything to such a token, as in Meta's code.

    Raises:
        ValueError: layers repeat, are negative or none, heads do not divide by kv_heads, or the
            scope is unknown.
    """

    tokens_per_tile = 0

    def __init__(
        self,
        encoder_width: int,
        encoder_grid: int,
        width: int,
        layers: Sequence[int] = (1, 3),
        heads: int = 3,
        kv_heads: int = 1,
        head_dim: int = 32,
        hidden: int = 256,
        norm_eps: float = 1e-5,
        scope: Scope = "every",
        hf_compat: bool = False,
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
            raise ValueError(f"layers={list(layers)}: name each layer once, by its number from 0")
        if heads % kv_heads:
            raise ValueError(f"heads ({heads}) must divide by kv_heads ({kv_heads})")
        if scope not in ("every", "latest"):
            raise ValueError(f"scope={scope!r}: choose every or latest")
        self.scope = scope
        self.hf_compat = hf_compat
        self.projector = nn.Linear(encoder_width, width)
        self.adapters = nn.ModuleDict(
            {
                str(layer): Adapter(layer, width, heads, kv_heads, head_dim, hidden, norm_eps)
                for layer in layers
            }
        )
        nn.init.zeros_(self.projector.bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    @property
    def gates(self) -> dict[int, dict[str, float]]:
        """How far the adapters are open: by layer, tanh of its ``attention`` and its ``ffn`` gate.

        At 0 a branch is shut, at 1 it is added whole, and below 0 it is subtracted.
        """
        return {
            adapter.layer: {
                "attention": adapter.attention_gate.tanh().item(),
                "ffn": adapter.ffn_gate.tanh().item(),
            }
            for adapter in cast("list[Adapter]", list(self.adapters.values()))
        }

    def forward(self, embeds: Tensor, features: Tensor, layout: ImageLayout) -> Fused:
        """Leave text embeddings ``[B, T, D]`` as they are; adapters read features ``[N, P, V]``.

        P counts all that the encoder gives of a tile, its summary tokens included. A batch
        without tiles needs no adapters.

        Raises:
            ValueError: the prompt holds placeholders, or tiles and their places differ in number,
                stand in another order, or outside the batch.
        """
        self._check(len(features), embeds, layout)
        if not len(features):
            return Fused(embeds)
        B, T = embeds.shape[:2]
        N, P = features.shape[:2]
        rows = layout.tile_rows
        M = max(layout.tile_counts)
        # Tile n is the k-th of its row: rows of fewer than M tiles are padded behind theirs.
        first = torch.searchsorted(rows, rows)  # tile of each row, since they are in order
        slots = rows * M + torch.arange(N, device=rows.device) - first
        states = self.projector(features)
        states = states.new_zeros(B * M, *states.shape[1:]).index_copy(0, slots, states)
        states = states.view(B, M * P, -1)
        starts = layout.tile_starts.new_full((B * M,), T).index_copy(0, slots, layout.tile_starts)
        starts = starts.view(B, M)

        texts = (layout.documents, layout.branches)
        mask = visible_tiles(starts, T, self.scope, *texts)
        feeds = mask.any(2, keepdim=True)
        if self.hf_compat:
            mask |= ~feeds & own_tiles(starts, T, *texts)
        attends = mask.any(2, keepdim=True)
        mask = (mask | ~attends).unsqueeze(3).expand(-1, -1, -1, P).flatten(2)
        adapters = {a.layer: a for a in cast("list[Adapter]", list(self.adapters.values()))}
        memory = {layer: a.attention.remember(states) for layer, a in adapters.items()}
        return Fused(embeds, adapters, VisionContext(memory, mask, attends, feeds))

    def _check(self, tiles: int, embeds: Tensor, layout: ImageLayout) -> None:
        """Refuse a batch whose images are not where its tiles say."""
        if placeholders := sum(layout.placeholder_counts):
            raise ValueError(
                f"the batch holds {placeholders} image placeholders, but cross-attention replaces "
                f"0 tokens: encode prompts with tokens_per_tile=0"
            )
        rows, starts = layout.tile_rows, layout.tile_starts
        if not tiles == len(rows) == len(starts):
            raise ValueError(
                f"features of {tiles} tiles, but {len(rows)} tile_rows and {len(starts)} "
                f"tile_starts: each tile needs its row and the place of its image token"
            )
        B, T = embeds.shape[:2]
        if not layout.ordered:
            raise ValueError(
                f"tile_rows {rows.tolist()} and tile_starts {starts.tolist()} must name tokens of "
                f"a batch of {B} rows and {T} tokens, row by row and from left to right"
            )


class Attention(nn.Module):
    """Text queries over vision keys; both RMS-normed over the head, with weights, unrotated."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, width, bias=False)
        self.query_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.key_norm = nn.RMSNorm(head_dim, eps=norm_eps)

    def remember(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, L, K]`` of vision states ``[B, L, D]``."""
        keys, values = self._heads(self.key(states)), self._heads(self.value(states))
        return self._normed(keys, self.key_norm), values

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Attend from ``x [B, T, D]`` over what is remembered, under ``mask [B, T or 1, L]``."""
        keys, values = memory
        queries = self._normed(self._heads(self.query(x)), self.query_norm)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask.unsqueeze(1),
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _normed(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        # Under autocast the projections are of lower precision than the norm's weights.
        return norm(x.type_as(norm.weight)).type_as(x)


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``; gate and up share one matrix, gate first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Adapter(nn.Module):
    """``x + tanh(gate) * attention(norm(x))``, then ``x + tanh(gate) * ffn(norm(x))``."""

    def __init__(
        self,
        layer: int,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads, kv_heads, head_dim, norm_eps)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ffn_norm = nn.RMSNorm(width, eps=norm_eps)
        self.ffn = FeedForward(width, hidden)
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, context: VisionContext) -> Tensor:
        """Map hidden states ``[B, T, D]`` to the same shape."""
        seen = self.attention(self.attention_norm(x), context.memory[self.layer], context.mask)
        x = x + self.attention_gate.tanh() * seen.where(context.attends, 0)
        fed = self.ffn(self.ffn_norm(x))
        return x + self.ffn_gate.tanh() * fed.where(context.feeds, 0)
