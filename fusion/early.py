"""Early fusion: projected patch features replace the placeholder tokens, and nothing else changes.

The backbone then reads one sequence and never learns that some of its tokens were pixels, as in
Llama 4 (transformers ``Llama4ForConditionalGeneration``); at most it is told which tokens may see
each other in both directions.
"""

from typing import Literal

import torch
from torch import Tensor

from fusion.base import Fused, Fusion, ImageLayout
from fusion.projectors import LinearProjector, PixelShuffleMLP


class EarlyFusion(Fusion):
    """Puts the tokens of each tile where the prompt holds its placeholders.

    With two tokens a tile, for rows of one image, of text alone, and of two images (``P`` is a
    placeholder, ``b1`` the first token of tile b)::

        [ what is    P  P  ?    ]      [ what is    a1 a2 ?    ]
        [ no   image is in here ]  ->  [ no   image is in here ]
        [ P    P     P  P  same ]      [ b1   b2    c1 c2 same ]

    Llama 4 reads images causally, as it does text. With ``bidirectional``, the tokens of an image
    see each other, whichever of its tiles they are of; marks and separators (``|``) stay causal,
    as text does. A token's block is where its image begins, counted from 1. An image of three
    tiles and one of a single tile, one token each::

        tokens  see  (  P  |  P  |  |  P  )  (  |  P  )  ?
        blocks   0   0  2  0  2  0  0  2  0  0  0 10  0  0

    Args:
        encoder_width: V, features per patch; supplied by the model.
        encoder_grid: patches a side of a tile; supplied by the model.
        width: D, of the backbone; supplied by the model.
        projector: ``mlp`` for Llama 4's adapter, ``linear`` for a single linear layer.
        shuffle: patches a side of the square that becomes one token; 1 keeps every patch.
        hidden: width of the ``mlp`` projector; None takes D.
        scale: root mean square of the image tokens at the start. The default is that of the
            backbone's text embeddings; where its ``init_std`` is set, give the same number here.
        bidirectional: let the tokens of an image see each other in both directions, as in Gemma 3
            (transformers ``gemma3``, ``get_block_sequence_ids_for_mask``, whose blocks are runs of
            image tokens without anything between them).

    Raises:
        ValueError: the grid does not divide into squares of ``shuffle``, or ``hidden`` is given
            to the linear projector.
    """

    def __init__(
        self,
        encoder_width: int,
        encoder_grid: int,
        width: int,
        projector: Literal["mlp", "linear"] = "mlp",
        shuffle: int = 2,
        hidden: int | None = None,
        scale: float = 1.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        sizes = (encoder_width, encoder_grid, width)
        self.projector: PixelShuffleMLP | LinearProjector
        if projector == "mlp":
            self.projector = PixelShuffleMLP(*sizes, hidden=hidden, shuffle=shuffle, scale=scale)
        elif projector == "linear" and hidden is None:
            self.projector = LinearProjector(*sizes, shuffle=shuffle, scale=scale)
        else:
            raise ValueError(
                f"projector={projector!r} with hidden={hidden}: choose mlp, or linear and no hidden"
            )
        self.tokens_per_tile = self.projector.tokens_per_tile
        self.patches = encoder_grid**2
        self.bidirectional = bidirectional

    def forward(self, embeds: Tensor, features: Tensor, layout: ImageLayout) -> Fused:
        """Fuse text embeddings ``[B, T, D]`` with patch features ``[N, P, V]``.

        Tiles are taken in order, each row's placeholders from left to right. Summary tokens, which
        some encoders put before the patches, have no place in the grid and are dropped. A batch
        without tiles gives its embeddings back, bit for bit.

        Raises:
            ValueError: a row holds more or fewer placeholders than its tiles have tokens; silence
                would put every later image onto the wrong tokens.
        """
        self._check(len(features), layout)
        tokens = self.projector(features[:, -self.patches :]).flatten(0, 1)
        places = layout.placeholders
        # Out of place: the embeddings may be a leaf, and their own gradient must stay whole.
        fused = embeds.flatten(0, 1).index_copy(0, places, tokens.to(embeds.dtype))
        blocks = None
        if self.bidirectional and len(tokens):
            images = (layout.tile_starts + 1)[:, None].expand(-1, self.tokens_per_tile).flatten()
            blocks = torch.zeros_like(layout.patches, dtype=torch.int64).flatten()
            blocks = blocks.index_copy(0, places, images).view_as(layout.patches)
        return Fused(fused.view_as(embeds), blocks=blocks)

    def _check(self, tiles: int, layout: ImageLayout) -> None:
        """Refuse a batch of which some row holds the wrong number of placeholders."""
        found = layout.placeholder_counts
        needed = [count * self.tokens_per_tile for count in layout.tile_counts]
        if list(found) == needed and sum(layout.tile_counts) == tiles and layout.ordered:
            return
        rows = [
            f"row {row} holds {here} placeholders for {wanted} image tokens"
            for row, (here, wanted) in enumerate(zip(found, needed, strict=True))
            if here != wanted
        ]
        raise ValueError(
            f"the batch holds {sum(found)} image placeholders, but {tiles} tiles make "
            f"{tiles * self.tokens_per_tile} image tokens ({self.tokens_per_tile} a tile): "
            f"{'; '.join(rows[:3]) or 'tile_rows is not in the order of the rows'}. Encode prompts "
            f"with this fusion's tokens_per_tile, and keep the tiles of a row together."
        )
