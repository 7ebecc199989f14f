"""The vision-language model: encoder, fusion and backbone composed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from encoders.base import VisionEncoder
from fusion.base import Fused, Fusion
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.loss import chunked_cross_entropy
from sandbox.backbone.moe import Routing, balance_loss, router_z_loss
from sandbox.backbone.transformer import Backbone
from sandbox.data.batch import Batch
from sandbox.data.prompt import Prompt, PromptEncoder
from sandbox.errors import UserError
from sandbox.generate import (
    Sampling,
    generate,
    generate_group_ids,
    generate_groups,
    inference,
    stream,
)
from sandbox.tokenizer import Tokenizer

FusionBuilder = Callable[[int, int, int], Fusion]
"""Builds a fusion from (encoder width V, encoder grid, backbone width D)."""


@dataclass(frozen=True)
class Output:
    """What a forward pass over a batch gives.

    Attributes:
        loss: what training minimises: the parts, weighted and summed.
        parts: ``text`` (mean cross-entropy of labelled tokens) and, where they are on, ``balance``
            and ``router_z`` (means over mixture layers, unweighted).
        correct: bool ``[B, T]``, True where a label was the likeliest token.
        hidden: ``[B, T, D]``, after the last norm, 0 on padding; or ``[n, D]``, of labelled tokens.
        routing: what each mixture layer's router did.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    correct: Tensor
    hidden: Tensor
    routing: tuple[Routing, ...]
    _head: nn.Linear = field(repr=False)

    @property
    def logits(self) -> Tensor:
        """Logits ``[..., V]`` of ``hidden``, made on access: training never holds them all."""
        return self._head(self.hidden)


class VisionLanguageModel(nn.Module):
    """Reads prompts of text and images, and predicts what follows.

    Args:
        encoder: pixels to patch features; None for a language model, which reads text alone.
        fusion: builds the fusion, given the widths it joins; None if there is no encoder.
        backbone: configuration of the decoder.
        tokenizer: of no more tokens than the backbone reads, which may have rows to spare (Llama 4
            has). None if token ids come from elsewhere: such a model reads batches, no prompts.
        max_tiles: most tiles of an image's grid (see ``sandbox.data.tiling``); 1 shows every image
            to the encoder as one tile. The encoder takes each tile by itself: early fusion tells
            the decoder their order, while to cross-attention they are a set.

    Raises:
        UserError: the tokenizer has more tokens than the backbone.
    """

    def __init__(
        self,
        encoder: VisionEncoder | None,
        fusion: FusionBuilder | None,
        backbone: BackboneConfig,
        tokenizer: Tokenizer | None,
        *,
        max_tiles: int = 1,
    ) -> None:
        super().__init__()
        if (encoder is None) != (fusion is None):
            raise ValueError("encoder and fusion come together, or neither for a language model")
        size = backbone.vocab_size + backbone.input_only
        if tokenizer is not None and tokenizer.vocab_size > size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but backbone.vocab_size is "
                f"{backbone.vocab_size}: set it to {tokenizer.vocab_size}"
            )
        self.encoder = encoder
        self.fusion: Fusion | None = None
        if encoder is not None and fusion is not None:
            self.fusion = fusion(encoder.width, encoder.grid, backbone.width)
        self.backbone = Backbone(backbone)
        self.tokenizer = tokenizer
        self.max_tiles = max_tiles

    @property
    def prompts(self) -> PromptEncoder:
        """Turns prompts and samples into what this model reads.

        Raises:
            UserError: the model has no tokenizer, or max_tiles is below 1.
        """
        if self.tokenizer is None:
            raise UserError(
                "the model has no tokenizer: its checkpoint came without one that has Llama 4's "
                "special tokens; it reads batches of token ids"
            )
        if self.encoder is None or self.fusion is None:
            return PromptEncoder(self.tokenizer, tile_size=1, tokens_per_tile=0)
        sizes = (self.encoder.tile_size, self.fusion.tokens_per_tile, self.max_tiles)
        return PromptEncoder(self.tokenizer, *sizes)

    def features(self, batch: Batch) -> Tensor | None:
        """Patch features ``[N, P, V]`` of the batch's tiles; None, text never meets the encoder.

        Raises:
            UserError: a language model is shown images, or placeholders stand for none.
        """
        if not len(batch.tiles):
            if placeholders := sum(batch.placeholder_counts):
                raise UserError(
                    f"{batch.name or 'the batch'}: {placeholders} image placeholders but no image"
                )
            return None
        if self.encoder is None:
            raise UserError(
                f"{batch.name or 'the batch'} holds {len(batch.tiles)} image tiles, and the model "
                "is a language model: it reads text alone"
            )
        return self.encoder(self.encoder.normalize(batch.tiles))

    def fuse(self, batch: Batch, features: Tensor | None = None) -> Fused:
        """Embeddings of a batch with its images in place.

        ``features`` are the batch's, for who has them already.
        """
        embeds = self.backbone.embed(batch.tokens)
        features = self.features(batch) if features is None else features
        if features is None or self.fusion is None:
            return Fused(embeds)
        return self.fusion(embeds, features, batch)

    def forward(
        self,
        batch: Batch | None = None,
        *,
        tokens: Tensor | None = None,
        features: Tensor | None = None,
        labelled_only: bool = False,
    ) -> Output:
        """Loss and bookkeeping of a batch, see ``Output``.

        Args:
            batch: what a task or prompts gave.
            tokens: instead of a batch, int64 ``[B, T]`` of text alone; the loss is then 0.
            features: of the batch's tiles, for callers that have them already.
            labelled_only: compute the last layer at labelled tokens only, where they are at most
                half of all. Loss and gradients are the same, but for that layer's router, which
                then routes, and is balanced over, labelled tokens alone.

        Raises:
            ValueError: both or neither are given.
        """
        if (batch is None) == (tokens is None):
            raise ValueError("the model reads a batch or tokens, one of them")
        if tokens is not None:
            batch = Batch.of(tokens)
        assert batch is not None
        fused = self.fuse(batch, features)
        plain = batch.documents is None and batch.branches is None
        places = batch.places
        real = places.real
        if real is None and batch.documents is not None:  # all are: the decoder need not ask
            real = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
        few = labelled_only and 2 * len(places.labelled) <= places.tokens
        decoded = self.backbone(
            embeds=fused.embeds,
            positions=None if plain else batch.positions,
            documents=batch.documents,
            branches=batch.branches,
            blocks=fused.blocks,
            real=real,
            outputs=places.labelled if few else None,
            adapters=fused.adapters,
            context=fused.context,
        )
        hidden = decoded.hidden
        if not few:
            hidden = hidden.flatten(0, 1).index_select(0, places.labelled)
        labels = batch.labels.flatten().index_select(0, places.labelled)
        text, hits = chunked_cross_entropy(hidden, self.backbone.head.weight, labels)
        correct = torch.zeros_like(batch.labels, dtype=torch.bool).flatten()
        correct = correct.index_copy(0, places.labelled, hits).view_as(batch.labels)
        parts = {"text": text} | self._router_losses(decoded.routing)
        weights = {
            "text": 1.0,
            "balance": self.backbone.config.balance_rate,
            "router_z": self.backbone.config.router_z_loss,
        }
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        kept = hidden if labelled_only else decoded.hidden
        return Output(loss, parts, correct, kept, decoded.routing, self.backbone.head)

    def _router_losses(self, routing: Sequence[Routing]) -> dict[str, Tensor]:
        """The routers' auxiliary losses by name, each the mean over mixture layers.

        Where several processes train, they are those of the tokens of all of them together. Each
        process holds the terms of its own tokens, times the number of processes: the mean over
        processes, of losses as of gradients, is what one process would have that read them all.
        """
        config = self.backbone.config
        balance, router_z = config.balance == "loss", config.router_z_loss > 0
        if not routing or not (balance or router_z):
            return {}
        losses: dict[str, list[Tensor]] = {}
        loads = [layer.load() for layer in routing] if balance else []
        shares = [1.0] * len(routing)
        real = not routing[0].logits.is_meta  # on meta, one process counts a step
        if real and torch.is_grad_enabled() and (processes := _processes()) > 1:
            one = routing[0].logits.new_ones((), dtype=torch.float32)
            tokens = torch.stack([one * len(layer.logits) for layer in routing])
            sums = torch.cat([*loads, tokens])
            dist.all_reduce(sums)  # once for all layers
            *loads, total = sums.split([config.experts] * len(loads) + [len(routing)])
            shares = (processes * tokens / total.clamp(min=1)).unbind()
        if balance:
            pairs = zip(routing, loads, strict=True)
            losses["balance"] = [balance_loss(layer, load) for layer, load in pairs]
        if router_z:
            losses["router_z"] = [router_z_loss(layer) for layer in routing]
        return {
            name: torch.stack([x * part for x, part in zip(each, shares, strict=True)]).mean()
            for name, each in losses.items()
        }

    def generate(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answers to the prompts, one each; greedy unless told otherwise (see ``Sampling``).

        >>> model.generate([Prompt.ask("How many bars?", [image])], max_tokens=8)  # doctest: +SKIP
        ['4']
        """
        return generate(self, prompts, Sampling(**sampling))

    def stream(self, prompts: Sequence[Prompt], **sampling: Any) -> Iterator[tuple[int, str]]:
        """The answers as they are written, as (number of the prompt, further text)."""
        return stream(self, prompts, Sampling(**sampling))

    def generate_groups(
        self, prompts: Sequence[Prompt], *, replies: int, **sampling: Any
    ) -> list[list[str]]:
        """Several answers to each prompt, which is read once: ``[prompts][replies]``.

        Answer n to a prompt draws with ``seed + n``; give a temperature, or all are the same.
        """
        return generate_groups(self, prompts, Sampling(**sampling), replies)

    def generate_ids(self, batch: Batch | Tensor, **sampling: Any) -> list[list[int]]:
        """Token ids that follow a collated batch, or tokens int64 ``[B, T]`` without images.

        Raises:
            ValueError: the batch is packed: a reply continues a row, so it must be one document.
        """
        return [group[0] for group in self.generate_group_ids(batch, replies=1, **sampling)]

    def generate_group_ids(
        self, batch: Batch | Tensor, *, replies: int, **sampling: Any
    ) -> list[list[list[int]]]:
        """Token ids of several replies to each row, ``[rows][replies]``; see ``generate_ids``."""
        chosen = Sampling(**sampling)
        if isinstance(batch, Tensor):
            return generate_group_ids(self.backbone, batch, chosen, replies)
        documents = batch.documents
        if batch.branches is not None or (documents is not None and bool((documents > 0).any())):
            raise ValueError("a reply continues a row, and rows of this batch hold several texts")
        with inference(self):
            return generate_group_ids(self.backbone, self.fuse(batch), chosen, replies, documents)

    def describe(self) -> dict[str, object]:
        """Plain values from which ``checkpoint.build_model`` makes the same architecture."""
        return {
            "encoder": self.encoder and described(self.encoder),
            "fusion": self.fusion and described(self.fusion),
            "backbone": asdict(self.backbone.config),
            "tokenizer": self.tokenizer and self.tokenizer.to_json(),
            "max_tiles": self.max_tiles,
        }


def _processes() -> int:
    """How many processes train together."""
    together = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def described(part: VisionEncoder | Fusion) -> dict[str, object]:
    """Class path and arguments, from which the part is made again."""
    path = f"{type(part).__module__}.{type(part).__qualname__}"
    return {"class_path": path, "init_args": part.init_args}
