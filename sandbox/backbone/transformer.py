"""The decoder: blocks of attention and feed-forward between an embedding and a head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.backbone import backends, rope
from sandbox.backbone.attention import Attention
from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.layers import Linear, RMSNorm
from sandbox.backbone.moe import FeedForward, MoE, Routing
from sandbox.backbone.visibility import Visibility


class Block(nn.Module):
    """One decoder layer, pre-norm: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn: FeedForward | MoE = (
            MoE(config, layer)
            if config.is_moe(layer)
            else FeedForward(config.width, config.dense_hidden)
        )

    def forward(
        self,
        x: Tensor,
        visibility: Visibility,
        cache: KVCache | None,
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Map tokens ``[M, D]``, or the chosen ones; mixture layers also say how they route.

        ``chosen``, int64 ``[Mq]``, are the tokens whose output is needed; None means all.
        """
        mixed = self.attention(self.attention_norm(x), visibility, cache, chosen)
        x = (x if chosen is None else x.index_select(0, chosen)) + mixed
        if isinstance(self.ffn, MoE):
            y, routing = self.ffn(self.ffn_norm(x))
            return x + y, routing
        return x + self.ffn(self.ffn_norm(x)), None


@dataclass(frozen=True)
class Decoded:
    """What the backbone returns.

    Attributes:
        hidden: ``[B, T, D]``, after the last norm, 0 on padding; or ``[n, D]``, of the n outputs
            that were asked for. ``Backbone.unembed`` makes logits of it.
        routing: what the router of each mixture layer did, in layer order.
    """

    hidden: Tensor
    routing: tuple[Routing, ...]


class Backbone(nn.Module):
    """Llama 4's text decoder in its trainable form. Text alone, or embeddings from a fusion."""

    frequency_bits: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size + config.input_only, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, config.vocab_size)
        if config.tied:
            self.head.weight = self.embed.weight
        frequency = rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        # As bits, or `backbone.bfloat16()` would round them: by position 1000 a whole radian off.
        self.register_buffer("frequency_bits", frequency.view(torch.int32), persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw every matrix from a normal distribution; what writes to the residual is scaled down.

        The residual stream sums 2 * layers outputs; dividing their scale by the root of that
        number keeps its variance independent of depth (GPT-2, section 2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            writes = name.endswith(("attention.output.weight", "down.weight", "experts.down"))
            depth = (2 * self.config.layers) ** -0.5 if writes else 1.0
            parameter.normal_(std=self._std(name, parameter) * depth)

    def _std(self, name: str, parameter: Tensor) -> float:
        if self.config.init_std is not None:
            return self.config.init_std
        if name == "embed.weight":
            return 1.0
        # Stacked experts are applied as x @ W, linear layers as x @ W.T: fan-in stands elsewhere.
        fan_in = parameter.shape[-2] if parameter.ndim == 3 else parameter.shape[-1]
        return fan_in**-0.5

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        branches: Tensor | None = None,
        blocks: Tensor | None = None,
        cache: KVCache | None = None,
        real: Tensor | None = None,
        outputs: Tensor | None = None,
        adapters: Mapping[int, nn.Module] | None = None,
        context: Any = None,
    ) -> Decoded:
        """Decode tokens or their embeddings.

        Args:
            tokens: int64 ``[B, T]``.
            embeds: ``[B, T, D]``, instead of tokens.
            positions: true positions ``[B, T]``; without, rows count on from what the cache holds.
            documents: packing ids ``[B, T]``; tokens see their own document only, and negative ids
                are padding. With a cache, a row is one document, padded on the right.
            branches: ``[B, T]``, see ``visibility.visible``; not with a cache.
            blocks: ``[B, T]``, 0 or the number of a token's block, whose tokens see each other in
                both directions. With a cache, a block is read whole, in one call.
            cache: keys and values so far; the new tokens join it.
            real: int64 ``[M]``, places ``b * T + t`` of the tokens that are no padding, for callers
                that know them: counting them makes the host wait for a GPU.
            outputs: int64 ``[n]``, ascending places whose hidden states are needed; the last layer
                then computes, and routes, no others. None means all. Not with a cache.
            adapters: modules called as ``module(hidden, context)`` before the given layers.
            context: what the adapters need.

        Raises:
            ValueError: both or neither of tokens and embeds are given, branches with a cache, or
                an adapter before a layer that does not exist.
        """
        if (tokens is None) == (embeds is None):
            raise ValueError("the backbone reads either tokens or embeds, and needs one of them")
        if cache is not None and branches is not None:
            raise ValueError("branches share a prefix within one forward pass: not with a cache")
        if adapters and max(adapters) >= len(self.layers):
            raise ValueError(
                f"an adapter stands before layer {max(adapters)}, but the backbone has "
                f"{len(self.layers)} layers, numbered from 0"
            )
        if cache is not None and outputs is not None:
            raise ValueError("a cache takes the keys of whole layers: no choice of outputs")
        x = self.embed(tokens) if embeds is None else embeds
        B, T = x.shape[:2]
        plain = positions is None
        if positions is None:
            positions = torch.arange(T, device=x.device).expand(B, T)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        plain = plain and (cache is None or cache.longest == 0)
        if real is None and documents is not None:
            real = (documents.flatten() >= 0).nonzero().squeeze(1)
            real = None if len(real) == B * T else real
        view = Visibility(
            self.config,
            self.frequency,
            positions,
            documents,
            branches,
            blocks,
            plain=plain,
            real=real,
            multiple=1 if cache is not None else backends.of(x).tokens_multiple(),
        )
        chosen = outputs
        if outputs is not None and real is not None:
            chosen = torch.searchsorted(real, outputs)
        x, routing = self._layers(view.flat(x), view, cache, chosen, adapters or {}, context)
        if cache is not None:
            cache.advance(T, view)
        hidden = self.norm(x)
        return Decoded(view.rows(hidden) if outputs is None else hidden, tuple(routing))

    def _layers(
        self,
        x: Tensor,
        view: Visibility,
        cache: KVCache | None,
        chosen: Tensor | None,
        adapters: Mapping[int, nn.Module],
        context: Any,
    ) -> tuple[Tensor, list[Routing]]:
        """Run all layers on real tokens ``[M, D]``, the last one for the chosen ones alone."""
        routing: list[Routing] = []
        for i, layer in enumerate(self.layers):
            if i in adapters:
                x = view.flat(adapters[i](view.rows(x), context))
            last = chosen if i == len(self.layers) - 1 else None
            x, routed = layer(x, view, cache, last)
            if routed is not None:
                places = view.real
                if last is not None:
                    places = last if view.real is None else view.real[last]
                elif view.blank:
                    counted = slice(-view.blank)
                    routed = replace(
                        routed, logits=routed.logits[counted], experts=routed.experts[counted]
                    )
                routing.append(replace(routed, places=places))
        return x, routing

    @property
    def frequency(self) -> Tensor:
        """Rotary frequencies, fp32 ``[K / 2]``, whatever the dtype of the weights."""
        return self.frequency_bits.view(torch.float32)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., D]``."""
        return self.head(hidden)

    def mixtures(self) -> dict[int, MoE]:
        """The mixture layers by layer number."""
        return {i: block.ffn for i, block in enumerate(self.layers) if isinstance(block.ffn, MoE)}
