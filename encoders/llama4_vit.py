"""Llama 4's own vision tower: a plain vision transformer with two-dimensional rotary positions.

Source: transformers ``Llama4VisionModel`` and Meta's reference code, ``models/llama4/vision``. Both
end in an adapter that shuffles patches into tokens; here that is ``fusion.projectors``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.base import VisionEncoder
from encoders.positions import resize_positions

THETA = 10_000.0


class Llama4Vision(VisionEncoder):
    """A vision transformer whose patches know their row and column in every attention layer.

    The defaults are the tower of Scout and Maverick; a toy of its kind is
    ``Llama4Vision(tile_size=64, patch_size=8, width=96, layers=2, heads=3, hidden=384)``.

    The class token stands **behind** the patches, and so does its row in ``positions``. Patches
    attend to it, but it is not returned. All linear layers of ``layers`` have biases, the patch
    embedding has none. With V features, F hidden units and p pixels a side of a patch, the
    parameters are::

        patch_embed.weight                           [V, 3 * p * p], pixels in (c, y, x) order
        class_token                                  [V]
        positions                                    [P + 1, V], row-major, then the class token
        norm_pre, norm_post                          [V]
        layers.N.attention_norm, layers.N.mlp_norm   [V]
        layers.N.attention.query|key|value|output    [V, V]
        layers.N.mlp.fc1                             [F, V]
        layers.N.mlp.fc2                             [V, F]

    Args:
        tile_size: S, pixels a side of a tile.
        patch_size: pixels a side of a patch.
        width: V, features per patch.
        layers: transformer blocks.
        heads: attention heads.
        hidden: hidden width of the MLPs.

    Raises:
        ValueError: ``tile_size`` does not divide by ``patch_size``, ``width`` by ``heads``, or the
            width of a head by 4.
    """

    rotation_bits: Tensor

    def __init__(
        self,
        tile_size: int = 336,
        patch_size: int = 14,
        width: int = 1408,
        layers: int = 34,
        heads: int = 16,
        hidden: int = 5632,
    ) -> None:
        super().__init__()
        if tile_size % patch_size:
            raise ValueError(
                f"tile_size ({tile_size}) must divide by patch_size ({patch_size}), "
                f"{tile_size % patch_size} pixels are left over"
            )
        if width % heads:
            raise ValueError(f"width ({width}) must divide by heads ({heads})")
        if width // heads % 4:
            raise ValueError(
                f"the width of a head ({width} / {heads} = {width // heads}) must divide by 4: "
                f"pairs of features turn by the column, and as many by the row"
            )
        self.width = width
        self.grid = tile_size // patch_size
        self.tile_size = tile_size
        self.mean = self.std = (0.5, 0.5, 0.5)
        self.patch_size = patch_size

        self.patch_embed = nn.Linear(3 * patch_size**2, width, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(self.grid**2 + 1, width))
        self.norm_pre = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm_post = nn.LayerNorm(width)
        # Kept as the bits of its floats, since `.to(torch.bfloat16)` would round a table of floats.
        bits = rotation(self.grid, width // heads).view(torch.int32)
        self.register_buffer("rotation_bits", bits, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Draw weights that keep unit scale; what writes to the residual is scaled down with depth.

        The residual stream sums 2 * layers outputs (GPT-2, section 2.3). A patch of full contrast,
        its position and the class token start equally large: none drowns the others.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith(("attention.output", "mlp.fc2"))
                depth = (2 * len(self.layers)) ** -0.5 if writes else 1.0
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * depth)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_token)
        nn.init.normal_(self.positions)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode normalised tiles ``[N, 3, S, S]`` to ``[N, P, V]``, row-major."""
        N, side, size = len(tiles), self.grid, self.patch_size
        cut = tiles.view(N, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        patches = self.patch_embed(cut.reshape(N, side**2, 3 * size**2))
        x = torch.cat((patches, self.class_token.expand(N, 1, -1)), dim=1)
        x = self.norm_pre(x + self.positions)
        turn = self.rotation_bits.view(torch.float32)
        for block in self.layers:
            x = block(x, turn)
        return self.norm_post(x[:, :-1])

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize ``positions [G * G + 1, V]``, whose last row is the class token's.

        The rotary positions are counted in patches and not stored: a larger grid has rows and
        columns whose angles the weights have never seen.
        """
        adapted = dict(state)
        if "positions" in state:
            adapted["positions"] = resize_positions(state["positions"], self.grid, last=1)
        return adapted


class Block(nn.Module):
    """One layer, pre-norm: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Map ``x [N, T, V]`` to the same shape, with the table of ``rotation``."""
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Every token sees every token of its tile; queries and keys are rotated by their places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Attend within ``x [N, T, V]``, with the table of ``rotation``."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.query, self.key, self.value)
        )
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, turn), rotate(k, turn), v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them (by erf, not its tanh approximation)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [N, T, V]`` to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


def rotation(grid: int, head_dim: int) -> Tensor:
    """How each token's features turn: fp32 ``[2, P + 1, 1, K]``, for ``rotate``.

    Adjacent features are a pair, which turns by one angle. The first half of the pairs turns by the
    column, the second by the row, both counted from 1, each half at K / 4 frequencies from 1
    downwards (theta 10,000). The class token, last, does not turn. For a grid of 2 x 2 and a head
    of 8, with frequencies 1 and 0.01, the angles of the four pairs are::

        patch 0, column 1, row 1      1  0.01  1  0.01
        patch 1, column 2, row 1      2  0.02  1  0.01
        patch 2, column 1, row 2      1  0.01  2  0.02
        patch 3, column 2, row 2      2  0.02  2  0.02
        class token                   0  0     0  0

    A pair (a, b) at an angle t becomes (a cos t - b sin t, b cos t + a sin t). So the table holds
    what each feature is multiplied by, (cos t, cos t), and then its partner, (-sin t, sin t).

    Source: transformers ``Llama4VisionRotaryEmbedding``; rotary embeddings are RoFormer's
    (arXiv 2104.09864).
    """
    # On the CPU even where a model is built on the meta device: no checkpoint holds these numbers.
    frequency = THETA ** -(torch.arange(0, head_dim, 4, device="cpu") / head_dim)
    place = torch.arange(grid**2, device="cpu")
    column, row = place % grid + 1, place // grid + 1
    angle = torch.cat((column[:, None] * frequency, row[:, None] * frequency), dim=1)
    angle = F.pad(angle, (0, 0, 0, 1))
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack((torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)))
    return table.flatten(-2).unsqueeze(2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn adjacent pairs (2i, 2i + 1) of ``x [N, T, H, K]`` in fp32, by ``rotation``."""
    own, partner = turn
    exact = x.float()
    even, odd = exact.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack((odd, even), dim=-1).flatten(-2)
    return torch.addcmul(exact * own, swapped, partner).type_as(x)
