"""The vision tower of Llama 3.2 Vision: the tiles of an image see each other.

Source: transformers ``MllamaVisionModel``, and ``VisionEncoder`` of Meta's reference code
(``models/llama3/multimodal/model.py``); for where the two differ, see ``intermediate_layers``.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.base import VisionEncoder
from encoders.positions import resize_positions

MULTIPLE = 8  # the tokens of a tile are padded to a multiple of this


class MllamaVision(VisionEncoder):
    """Local layers, then gated global ones, over all the tiles of an image at once.

    A feature is the output of the last layer joined with those of some local layers. The class
    token of each tile comes first and is kept, since cross-attention reads it too.

    Every image is padded with blank tiles to ``max_tiles``, and every tile to a multiple of 8
    tokens. The mask only hides padding from padding: what is real attends to it. That is how the
    weights were trained, so it cannot be left out, although it costs ``max_tiles`` times the work.

    Args:
        tile_size: S, pixels a side of a tile.
        patch_size: pixels a side of a patch.
        hidden: width of the layers; V is ``1 + len(intermediate_layers)`` times as wide.
        layers: number of local layers.
        global_layers: number of gated layers behind them.
        heads: attention heads.
        ffn_hidden: hidden width of the feed-forward layers.
        intermediate_layers: local layers, numbered from 0, whose outputs the features hold.
            Transformers 5 so reads the numbers in a checkpoint's configuration; Meta's code keeps
            what *enters* the layers of those numbers, which is ``[2, 6, 14, 22, 29]`` here.
        max_tiles: tiles that an image may have.
        arrangements: the (rows, columns) of tiles that an image may have, in the order of the
            checkpoint's embeddings; None takes every one of at most ``max_tiles``, by rows.
        norm_eps: epsilon of the layers' norms.

    Raises:
        ValueError: sizes do not divide, or an intermediate layer or an arrangement does not exist.
    """

    summary_tokens = 1

    def __init__(
        self,
        tile_size: int = 448,
        patch_size: int = 14,
        hidden: int = 1280,
        layers: int = 32,
        global_layers: int = 8,
        heads: int = 16,
        ffn_hidden: int = 5120,
        intermediate_layers: Sequence[int] = (3, 7, 15, 23, 30),
        max_tiles: int = 4,
        arrangements: Sequence[Sequence[int]] | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, whole, part in (
            ("tile_size by patch_size", tile_size, patch_size),
            ("hidden by heads", hidden, heads),
        ):
            if whole % part:
                raise ValueError(f"{name} must divide evenly, got {whole} / {part}")
        if not all(0 <= layer < layers for layer in intermediate_layers):
            raise ValueError(
                f"intermediate_layers {list(intermediate_layers)}: the layers are 0 to {layers - 1}"
            )
        self.arrangements = [tuple(a) for a in arrangements or every_arrangement(max_tiles)]
        if not all(1 <= rows * columns <= max_tiles for rows, columns in self.arrangements):
            raise ValueError(f"arrangements {self.arrangements} exceed max_tiles={max_tiles}")
        self.width = hidden * (1 + len(intermediate_layers))
        self.grid = tile_size // patch_size
        self.tile_size = tile_size
        self.mean = (0.48145466, 0.4578275, 0.40821073)
        self.std = (0.26862954, 0.26130258, 0.27577711)
        self.intermediate_layers = list(intermediate_layers)
        self.max_tiles = max_tiles

        kinds = len(self.arrangements) + 1  # kind 0 is transformers' "no image", unused here
        self.patch_embed = nn.Conv2d(3, hidden, patch_size, stride=patch_size, bias=False)
        self.class_token = nn.Parameter(nn.init.normal_(torch.empty(hidden), std=hidden**-0.5))
        self.position = Position(kinds, max_tiles, self.grid**2 + 1, hidden)
        self.tile_before = TilePosition(kinds, max_tiles, hidden)
        self.tile_after = TilePosition(kinds, max_tiles, hidden)
        self.norm_before = nn.LayerNorm(hidden)
        self.norm_after = nn.LayerNorm(hidden)
        sizes = (hidden, heads, ffn_hidden, norm_eps)
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(layers))
        self.global_layers = nn.ModuleList(GatedLayer(*sizes) for _ in range(global_layers))

    def forward(self, tiles: Tensor, arrangement: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Encode normalised tiles ``[N, 3, S, S]`` to features ``[N, 1 + P, V]``.

        Args:
            tiles: of all images, each image's row by row.
            arrangement: (rows, columns) of each image in turn; None makes every tile an image of
                its own.

        Raises:
            ValueError: an arrangement is not among those of this tower, or they take more or
                fewer tiles than there are.
        """
        kinds, places = (
            torch.tensor(x, device=tiles.device) for x in self._places(len(tiles), arrangement)
        )
        patches = self.patch_embed(tiles).flatten(2).transpose(1, 2)
        images = (len(kinds), self.max_tiles)
        # A blank tile embeds to zeros: the convolution has no bias.
        x = patches.new_zeros(math.prod(images), *patches.shape[1:])
        x = x.index_copy(0, places, patches).unflatten(0, images)
        x = self.tile_before(x, kinds)
        x = torch.cat((self.class_token.expand(*images, 1, -1), x), dim=2)
        x = self.norm_before(self.position(x, kinds))

        tokens = x.shape[2]
        x = F.pad(x, (0, 0, 0, -tokens % MULTIPLE))
        real = torch.zeros(math.prod(images), x.shape[2], dtype=torch.bool, device=x.device)
        real[places, :tokens] = True
        real = real.view(len(kinds), -1)
        mask = (real.unsqueeze(1) | real.unsqueeze(2)).unsqueeze(1)

        x = x.flatten(1, 2)
        outputs = []
        for layer in self.layers:
            x = layer(x, mask)
            outputs.append(x)
        x = self.norm_after(x).unflatten(1, (self.max_tiles, -1))
        x = self.tile_after(x, kinds).flatten(1, 2)
        for layer in self.global_layers:
            x = layer(x, mask)
        if self.intermediate_layers:  # interleaved, channel by channel
            kept = torch.stack([outputs[layer] for layer in self.intermediate_layers], dim=-1)
            x = torch.cat((x, kept.flatten(-2)), dim=-1)
        return x.view(math.prod(images), -1, self.width)[places, :tokens]

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize the positions in a tile and in an image; the class token's row is the first."""
        adapted = dict(state)
        if (table := state.get("position.patch")) is not None:
            adapted["position.patch"] = resize_positions(table, self.grid, first=1)
        if (table := state.get("position.tile.weight")) is not None:
            tiles = table.view(len(table) * self.max_tiles, -1, len(self.class_token))
            resized = resize_positions(tiles, self.grid, first=1)
            adapted["position.tile.weight"] = resized.view(len(table), -1)
        return adapted

    def _places(
        self, tiles: int, arrangement: Sequence[Sequence[int]] | None
    ) -> tuple[list[int], list[int]]:
        """The kind of every image, and the place of every tile when all images are padded."""
        wanted = [(1, 1)] * tiles if arrangement is None else [tuple(a) for a in arrangement]
        if unknown := set(wanted) - set(self.arrangements):
            raise ValueError(
                f"no tile embeddings for an arrangement of {sorted(unknown)[0]} tiles (rows, "
                f"columns): this tower has {self.arrangements}"
            )
        counts = [rows * columns for rows, columns in wanted]
        if sum(counts) != tiles:
            raise ValueError(f"the arrangements take {sum(counts)} tiles, but {tiles} are given")
        kinds = [self.arrangements.index(a) + 1 for a in wanted]
        places = [
            image * self.max_tiles + tile
            for image, count in enumerate(counts)
            for tile in range(count)
        ]
        return kinds, places


def every_arrangement(max_tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most ``max_tiles`` tiles, in the order of the embeddings.

    >>> every_arrangement(3)
    [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]
    """
    sides = range(1, max_tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]


class TilePosition(nn.Module):
    """Adds one vector to all tokens of a tile: its place in an image of that arrangement."""

    def __init__(self, kinds: int, max_tiles: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Embedding(kinds, max_tiles * hidden)
        self.gate = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.table.weight, std=hidden**-0.5)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        """Map images ``[images, max_tiles, tokens, hidden]`` of ``kinds`` to the same shape."""
        vectors = self.table(kinds).view(len(kinds), x.shape[1], 1, -1)
        return x + self.gate.tanh() * vectors


class Position(nn.Module):
    """Adds a vector to each token: between one of its place in the tile and one in the image."""

    def __init__(self, kinds: int, max_tiles: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.patch = nn.Parameter(nn.init.normal_(torch.empty(tokens, hidden), std=hidden**-0.5))
        self.tile = nn.Embedding(kinds, max_tiles * tokens * hidden)
        self.gate = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.tile.weight, std=hidden**-0.5)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        """Map images ``[images, max_tiles, tokens, hidden]`` of ``kinds`` to the same shape."""
        share = self.gate.tanh()
        return x + (1 - share) * self.patch + share * self.tile(kinds).view_as(x)


class Attention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend within ``x [images, T, hidden]`` under ``mask [images, 1, T, T]``."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` with biases and the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., width]``."""
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """Pre-norm: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, hidden: int, heads: int, ffn_hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden, eps=norm_eps)
        self.attention = Attention(hidden, heads)
        self.ffn_norm = nn.LayerNorm(hidden, eps=norm_eps)
        self.ffn = FeedForward(hidden, ffn_hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map ``x [images, tokens, hidden]`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.ffn(self.ffn_norm(x))


class GatedLayer(Layer):
    """A layer whose two branches are each scaled by the tanh of a gate."""

    def __init__(self, hidden: int, heads: int, ffn_hidden: int, norm_eps: float) -> None:
        super().__init__(hidden, heads, ffn_hidden, norm_eps)
        self.attention_gate = nn.Parameter(torch.full((1,), math.pi / 4))
        self.ffn_gate = nn.Parameter(torch.full((1,), math.pi / 4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map ``x [images, tokens, hidden]`` to the same shape."""
        x = x + self.attention_gate.tanh() * self.attention(self.attention_norm(x), mask)
        return x + self.ffn_gate.tanh() * self.ffn(self.ffn_norm(x))
