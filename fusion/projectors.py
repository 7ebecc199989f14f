"""From the encoder's patch features to vectors the backbone can read as tokens.

Both projectors take features ``[N, P, V]`` to tokens ``[N, tokens_per_tile, D]``, row-major, and
start so that features of unit scale (every encoder here ends in a norm) give tokens of root mean
square ``scale``, whatever the widths. Linear layers drawn with PyTorch's default would shrink them
by a factor that depends on depth and width, and an image would start fainter than its text.
"""

import math

from torch import Tensor, nn

# Root mean square of GELU(z) for z ~ N(0, 1), by quadrature: what a GELU leaves of unit scale.
GELU_RMS = 0.6521


def pixel_shuffle(features: Tensor, block: int) -> Tensor:
    """Merge every ``block x block`` square of patches into one token, losing nothing.

    Tokens stay row-major; the channels of a square are ordered (dy, dx, c), as in Llama 4's
    reference code (``models/llama4/vision/embedding.py``); ``torch.pixel_unshuffle`` orders them
    (c, dy, dx). For a grid of 4 x 4 patches of one channel and a block of 2::

         0  1 |  2  3
         4  5 |  6  7          [ 0  1  4  5]  [ 2  3  6  7]
        ------+------    ->    [ 8  9 12 13]  [10 11 14 15]
         8  9 | 10 11
        12 13 | 14 15

    Args:
        features: ``[N, P, V]``, row-major patches of a square grid.
        block: patches a side of a square.

    Returns:
        ``[N, P / block**2, block**2 * V]``.
    """
    N, P, V = features.shape
    side = math.isqrt(P) // block
    squares = features.view(N, side, block, side, block, V).transpose(2, 3)
    return squares.reshape(N, side * side, block * block * V)


def shuffled_tokens(encoder_grid: int, block: int) -> int:
    """Tokens that ``pixel_shuffle`` makes of a grid of ``encoder_grid`` patches a side.

    Raises:
        ValueError: the grid does not divide into blocks.
    """
    if block < 1 or encoder_grid % block:
        raise ValueError(
            f"an encoder grid of {encoder_grid} x {encoder_grid} patches does not divide into "
            f"blocks of shuffle={block}; choose a divisor of {encoder_grid}, or another patch size"
        )
    return (encoder_grid // block) ** 2


class PixelShuffleMLP(nn.Module):
    """Llama 4's adapter and projector: pixel shuffle, fc1, GELU, fc2, GELU, a last linear layer.

    No layer has a bias. Source: transformers ``Llama4VisionPixelShuffleMLP`` and
    ``Llama4MultiModalProjector``.

    Args:
        encoder_width: V, features per patch.
        encoder_grid: patches a side of a tile.
        width: D, of the tokens.
        hidden: width of the adapter; None takes D.
        shuffle: patches a side of the square that becomes one token; 1 keeps every patch.
        scale: root mean square of the tokens at the start.

    Raises:
        ValueError: the grid does not divide into squares of ``shuffle``.
    """

    def __init__(
        self,
        encoder_width: int,
        encoder_grid: int,
        width: int,
        hidden: int | None = None,
        shuffle: int = 2,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokens_per_tile = shuffled_tokens(encoder_grid, shuffle)
        self.shuffle = shuffle
        hidden = hidden or width
        self.fc1 = nn.Linear(encoder_width * shuffle**2, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, hidden, bias=False)
        self.project = nn.Linear(hidden, width, bias=False)
        self.gelu = nn.GELU()
        nn.init.normal_(self.fc1.weight, std=self.fc1.in_features**-0.5)
        nn.init.normal_(self.fc2.weight, std=hidden**-0.5 / GELU_RMS)
        nn.init.normal_(self.project.weight, std=hidden**-0.5 / GELU_RMS * scale)

    def forward(self, features: Tensor) -> Tensor:
        """Project features ``[N, P, V]`` to tokens ``[N, tokens_per_tile, D]``."""
        merged = pixel_shuffle(features, self.shuffle)
        return self.project(self.gelu(self.fc2(self.gelu(self.fc1(merged)))))


class LinearProjector(nn.Module):
    """One linear layer without bias, on each patch or on squares of patches.

    Args:
        encoder_width: V, features per patch.
        encoder_grid: patches a side of a tile.
        width: D, of the tokens.
        shuffle: patches a side of the square that becomes one token; 1 keeps every patch.
        scale: root mean square of the tokens at the start.

    Raises:
        ValueError: the grid does not divide into squares of ``shuffle``.
    """

    def __init__(
        self,
        encoder_width: int,
        encoder_grid: int,
        width: int,
        shuffle: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokens_per_tile = shuffled_tokens(encoder_grid, shuffle)
        self.shuffle = shuffle
        self.project = nn.Linear(encoder_width * shuffle**2, width, bias=False)
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5 * scale)

    def forward(self, features: Tensor) -> Tensor:
        """Project features ``[N, P, V]`` to tokens ``[N, tokens_per_tile, D]``."""
        return self.project(pixel_shuffle(features, self.shuffle))
