"""Where image spans, tile separators and frame marks stand in the token stream.

Pure functions over the names of special tokens; the tokenizer turns names into ids. Source: Meta's
reference code, ``models/llama4/prompt_format.md`` and the chat format's image span.
"""

IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
IMAGE = "<|image|>"
PATCH = "<|patch|>"
TILE_X = "<|tile_x_separator|>"
TILE_Y = "<|tile_y_separator|>"


def image_span(tokens_per_tile: int, rows: int = 1, columns: int = 1) -> list[str]:
    """The special tokens that stand for one image of ``rows x columns`` tiles.

    One tile (``tokens_per_tile`` = 2)::

        <|image_start|> <|image|> <|patch|> <|patch|> <|image_end|>

    Several: the tiles row by row, then the global tile, which shows the whole image small. For a
    grid of 2 rows x 3 columns (``tokens_per_tile`` = 1)::

        <|image_start|>
        <|patch|> <|tile_x_separator|> <|patch|> <|tile_x_separator|> <|patch|> <|tile_y_separator|>
        <|patch|> <|tile_x_separator|> <|patch|> <|tile_x_separator|> <|patch|> <|tile_y_separator|>
        <|image|> <|patch|> <|image_end|>

    A fusion that keeps features out of the sequence (``tokens_per_tile`` = 0) leaves one mark::

        <|image|>

    Raises:
        ValueError: a count is out of range.
    """
    if tokens_per_tile < 0 or rows < 1 or columns < 1:
        raise ValueError(
            f"an image span needs tokens_per_tile >= 0 and a grid of at least 1 x 1 tiles, "
            f"got tokens_per_tile={tokens_per_tile}, {rows} x {columns}"
        )
    if tokens_per_tile == 0:
        return [IMAGE]
    tile = [PATCH] * tokens_per_tile
    grid: list[str] = []
    if rows * columns > 1:
        for _ in range(rows):
            for column in range(columns):
                grid += tile
                grid.append(TILE_X if column < columns - 1 else TILE_Y)
    return [IMAGE_START, *grid, IMAGE, *tile, IMAGE_END]


def tiles_per_image(rows: int, columns: int) -> int:
    """How many tiles the encoder sees for a grid: the grid itself, and the global tile if any."""
    return rows * columns + (rows * columns > 1)


def frame_mark(seconds: float) -> str:
    """The text before a video frame: its time. Llama 4 has no video path; frames are images.

    >>> frame_mark(3.25)
    '[3.2s]'
    """
    return f"[{seconds:.1f}s]"
