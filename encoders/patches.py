"""Encoder-free vision: each patch of pixels becomes one feature through one linear layer."""

import torch
from torch import Tensor, nn

from encoders.base import VisionEncoder
from encoders.positions import resize_line


class Patches(VisionEncoder):
    """Linear patches with learned positions: the decoder has to learn to see by itself.

    The pixels of a patch are projected, a vector of its row and a vector of its column are added,
    and the sum is normalised; no patch ever sees another. The arm of Fuyu (adept.ai/blog/fuyu-8b)
    and EVE (arXiv 2406.11832), with the factorised positions of NaViT (arXiv 2307.06304).

    Args:
        tile_size: S, pixels a side of a tile.
        patch_size: pixels a side of a patch.
        width: V, features per patch.

    Raises:
        ValueError: ``tile_size`` does not divide by ``patch_size``.
    """

    def __init__(self, tile_size: int = 64, patch_size: int = 8, width: int = 96) -> None:
        super().__init__()
        if tile_size % patch_size:
            raise ValueError(
                f"tile_size ({tile_size}) must divide by patch_size ({patch_size}), "
                f"{tile_size % patch_size} pixels are left over"
            )
        self.width = width
        self.grid = tile_size // patch_size
        self.tile_size = tile_size
        self.mean = self.std = (0.5, 0.5, 0.5)
        self.patch_size = patch_size

        self.embed = nn.Linear(3 * patch_size**2, width)
        self.row = nn.Parameter(torch.empty(self.grid, 1, width))
        self.column = nn.Parameter(torch.empty(1, self.grid, width))
        self.norm = nn.LayerNorm(width)
        # Both positions together start as large as a patch of full contrast: neither drowns.
        nn.init.normal_(self.embed.weight, std=self.embed.in_features**-0.5)
        nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.row, std=0.5**0.5)
        nn.init.normal_(self.column, std=0.5**0.5)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode normalised tiles ``[N, 3, S, S]`` to ``[N, P, V]``, row-major."""
        N, G, size = len(tiles), self.grid, self.patch_size
        cut = tiles.view(N, 3, G, size, G, size).permute(0, 2, 4, 1, 3, 5)
        pixels = cut.reshape(N, G * G, self.embed.in_features)  # of a patch in (c, y, x) order
        position = (self.row + self.column).view(G * G, self.width)
        return self.norm(self.embed(pixels) + position)

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize the positions of rows ``[G, 1, V]`` and columns ``[1, G, V]`` to this grid."""
        adapted = dict(state)
        if "row" in state:
            adapted["row"] = resize_line(state["row"].squeeze(1), self.grid).unsqueeze(1)
        if "column" in state:
            adapted["column"] = resize_line(state["column"].squeeze(0), self.grid).unsqueeze(0)
        return adapted
