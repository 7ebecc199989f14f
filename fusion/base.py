"""The contract of a fusion: text embeddings and patch features become what the backbone reads."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


class ImageLayout(Protocol):
    """What a fusion reads of a batch; the sandbox's ``Batch`` satisfies it."""

    @property
    def patches(self) -> Tensor:
        """Bool ``[B, T]``: True where a token is the placeholder of an image feature."""

    @property
    def placeholders(self) -> Tensor:
        """Int ``[n]``: the places ``b * T + t`` where ``patches`` is True, ascending."""

    @property
    def placeholder_counts(self) -> Sequence[int]:
        """Placeholders of each row, known to the host."""

    @property
    def tile_counts(self) -> Sequence[int]:
        """Tiles of each row, known to the host."""

    @property
    def ordered(self) -> bool:
        """Whether tiles stand in the order of rows and start inside them, from left to right."""

    @property
    def tile_rows(self) -> Tensor:
        """Int ``[N]``: the batch row that each tile belongs to."""

    @property
    def tile_starts(self) -> Tensor:
        """Int ``[N]``: where in its row the tile's image begins; from there on it may be seen."""

    @property
    def documents(self) -> Tensor | None:
        """Int ``[B, T]``: packing ids, negative on padding; None if every row is one document."""

    @property
    def branches(self) -> Tensor | None:
        """Int ``[B, T]``: 0 on the trunk, k on what only branch k may see; None for one trunk."""


class Context(Protocol):
    """What adapters read beside the hidden states; it follows the rows through decoding."""

    def decoding(self, last: Tensor) -> "Context":
        """The context of the tokens behind the prompts: they see what the last of those sees.

        ``last``, int64 ``[B]``, is the place of each row's last prompt token.
        """

    def select(self, rows: Tensor) -> "Context":
        """The context of the given rows, int64 ``[B']``: rows that are done can leave."""


@dataclass
class Fused:
    """What the backbone reads: embeddings ``[B, T, D]``, and modules to call before chosen layers.

    ``adapters`` maps a layer index to a module called as ``module(hidden, context)`` right before
    that layer; ``context`` is what the adapters need (vision keys and values, masks). Early fusion
    leaves both empty.

    ``blocks``, int64 ``[B, T]``, is 0 on ordinary tokens, which are causal, and n > 0 on those of
    block n of their row, which see each other in both directions; None if all are ordinary.
    """

    embeds: Tensor
    adapters: Mapping[int, nn.Module] = field(default_factory=dict)
    context: Context | None = None
    blocks: Tensor | None = None


class Fusion(nn.Module, ABC):
    """Joins both modalities.

    The first three constructor arguments are supplied by the model: ``encoder_width`` (V),
    ``encoder_grid`` (patches a side) and ``width`` (D). All arguments, defaults included, are
    recorded in ``init_args`` and must be plain values, so that a checkpoint can rebuild the fusion.
    """

    tokens_per_tile: int  # placeholder tokens a tile takes in the prompt; 0 for cross-attention
    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Fusion":
        """Record the arguments before ``__init__`` of the subclass sees them."""
        self = super().__new__(cls)
        bound = inspect.signature(cls).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        object.__setattr__(self, "init_args", dict(bound.arguments))
        return self

    @abstractmethod
    def forward(self, embeds: Tensor, features: Tensor, layout: ImageLayout) -> Fused:
        """Fuse text embeddings ``[B, T, D]`` with patch features ``[N, P, V]``.

        Raises:
            ValueError: the placeholders in the prompt and the features differ in number; the
                message names both counts.
        """
