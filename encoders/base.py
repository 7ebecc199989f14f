"""The contract of a vision encoder: uint8 tiles are normalised, then become patch features."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class VisionEncoder(nn.Module, ABC):
    """Turns square tiles into a row-major grid of patch features.

    Subclasses set the five attributes below in ``__init__`` and implement ``forward``. One that
    also gives features of the tile as a whole (a class token) says how many. The constructor's
    arguments, defaults included, are recorded in ``init_args``, so that a checkpoint can rebuild
    the encoder from its class path even if a default changes; they must therefore be plain values
    (numbers, strings, lists).
    """

    width: int  # V, features per patch
    grid: int  # patches a side; P = grid * grid
    tile_size: int  # S, pixels a side of one tile (not the patch size)
    mean: tuple[float, float, float]  # of RGB in 0..1, its preprocessing
    std: tuple[float, float, float]
    summary_tokens: int = 0  # features of the whole tile, which stand before those of its patches
    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "VisionEncoder":
        """Record the arguments before ``__init__`` of the subclass sees them."""
        self = super().__new__(cls)
        bound = inspect.signature(cls).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        object.__setattr__(self, "init_args", dict(bound.arguments))
        return self

    @abstractmethod
    def forward(self, tiles: Tensor) -> Tensor:
        """Encode normalised tiles ``[N, 3, S, S]`` to features ``[N, summary_tokens + P, V]``.

        Summaries come first, if there are any, then the patches, row-major.
        """

    def summary(self, tiles: Tensor) -> Tensor:
        """One feature of each normalised tile as a whole, ``[N, V]``: the mean of its patches.

        An encoder with a class token gives that instead.
        """
        return self.patch_mean(self(tiles))

    def patch_mean(self, features: Tensor) -> Tensor:
        """The mean of a tile's patches, ``[N, V]``, given what ``forward`` gave."""
        return features[:, self.summary_tokens :].mean(1)

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the tensors of an encoder of the same kind and another tile size fit this one.

        Args:
            state: what its ``state_dict`` gave, or a part of that; left as it is.

        Returns:
            The same tensors, all as they are unless a subclass has learned positions to resize;
            bit for bit the same where the tile sizes agree.

        Raises:
            ValueError: the positions are those of no square grid.
        """
        return dict(state)

    def normalize(self, tiles: Tensor) -> Tensor:
        """Map uint8 tiles ``[N, 3, S, S]`` to this encoder's floating-point input range.

        Raises:
            ValueError: the tiles have another size than the encoder takes.
        """
        if tiles.shape[1:] != (3, self.tile_size, self.tile_size):
            raise ValueError(
                f"the encoder takes tiles of [3, {self.tile_size}, {self.tile_size}], "
                f"got {list(tiles.shape[1:])}: cut images with its tile_size"
            )
        parameter = next(self.parameters(), None)
        dtype = parameter.dtype if parameter is not None else torch.float32
        # By numbers, not by tensors: a GPU would wait for their copy.
        colors = zip((tiles.float() / 255).unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(color - mean) / std for color, mean, std in colors], dim=1).to(dtype)
