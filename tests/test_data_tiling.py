"""Tiles against transformers, against the properties that the rule promises, and in a model."""

import re

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from encoders.patches import Patches
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from fusion.layout import tiles_per_image
from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import build_model
from sandbox.data.batch import collate
from sandbox.data.prompt import Prompt
from sandbox.data.task import Question, Sample
from sandbox.data.tiling import best_grid, cut, shown_size
from sandbox.errors import UserError
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer

LIMITS = (1, 2, 4, 9, 16)
S = 28


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Widths and heights from a pixel to 8 tiles, evenly on a log scale, and corner cases."""
    drawn = np.exp(np.random.default_rng(seed).uniform(0, np.log(8 * S), (count, 2))).astype(int)
    corners = [
        (1, 1),
        (1, 2000),
        (2000, 1),
        (49, 49),
        (S, S),
        (S + 1, S),
        (2 * S, 3 * S),
        (S, 16 * S),
    ]
    return corners + [(int(width), int(height)) for width, height in drawn]


def noise(width: int, height: int) -> PILImage.Image:
    """A picture in which every pixel differs from its neighbours, and none is black."""
    rng = np.random.default_rng(width + 5000 * height)
    return PILImage.fromarray(rng.integers(1, 256, (height, width, 3), dtype=np.uint8))


def assembled(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The picture ``[rows * S, columns * S, 3]`` that the tiles of a grid are laid out to."""
    bands = [np.concatenate(pixels[row * columns : (row + 1) * columns], 2) for row in range(rows)]
    return np.concatenate(bands, axis=1).transpose(1, 2, 0)


# --- The same as Llama 4's ------------------------------------------------------------------------


@pytest.mark.parametrize("max_tiles", LIMITS)
@pytest.mark.parametrize("tile_size", [S, 336])
def test_grids_are_those_of_transformers(tile_size: int, max_tiles: int) -> None:
    """Guards against another canvas than Llama 4's, rows and columns swapped among them."""
    pytest.importorskip("torchvision", reason="their processor needs torchvision")
    theirs = pytest.importorskip("transformers.models.llama4.image_processing_llama4")
    from transformers.image_utils import SizeDict

    square = SizeDict(height=tile_size, width=tile_size)
    canvases = torch.tensor(theirs.find_supported_resolutions(max_tiles, square))
    for w, h in sizes(300, seed=max_tiles):
        width, height = w * tile_size // S or 1, h * tile_size // S or 1
        expected = theirs.get_best_fit((height, width), canvases) // tile_size
        found = best_grid(width, height, tile_size, max_tiles)
        assert found == tuple(expected.tolist()), (width, height)


@pytest.mark.parametrize("max_tiles", LIMITS)
def test_tiles_are_those_of_transformers(max_tiles: int) -> None:
    """Guards against another size, place, padding or order of tiles than Llama 4 was trained on.

    Pillow, which Meta's code resizes with too, and torchvision's antialiased kernel both round to
    whole grey levels after each of their two passes, from weights of unequal precision. So levels
    may differ by one, and where both passes round apart, by two.
    """
    pytest.importorskip("torchvision", reason="their processor needs torchvision")
    theirs = pytest.importorskip("transformers.models.llama4.image_processing_llama4")
    processor = theirs.Llama4ImageProcessor(
        size={"height": S, "width": S}, max_patches=max_tiles, do_rescale=False, do_normalize=False
    )
    differences = []
    for width, height in sizes(60, seed=100 + max_tiles):
        image = noise(width, height)
        expected = processor(image, return_tensors="pt")
        tiles = cut(image, S, max_tiles)
        assert expected["aspect_ratios"].tolist() == [[tiles.rows, tiles.columns]]
        pixels = expected["pixel_values"]
        assert pixels.dtype == torch.uint8, "they round to whole levels, too"
        assert pixels.shape == tiles.pixels.shape
        differences.append(np.abs(pixels.numpy().astype(int) - tiles.pixels).ravel())
    difference = np.concatenate(differences)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-5
    assert (difference > 0).mean() < 0.04


# --- What the rule promises -----------------------------------------------------------------------


@pytest.mark.parametrize("max_tiles", LIMITS)
def test_tiles_hold_the_image_and_nothing_else(max_tiles: int) -> None:
    """Guards against lost or doubled pixels, padding in the wrong place, and swapped axes (R13)."""
    for width, height in sizes(60, seed=max_tiles):
        image = noise(width, height)
        pixels, rows, columns = cut(image, S, max_tiles)
        assert rows * columns <= max_tiles
        assert pixels.shape == (tiles_per_image(rows, columns), 3, S, S)
        assert pixels.dtype == np.uint8
        assert columns >= rows if width > height else columns <= rows
        across, down = shown_size(width, height, S, rows, columns)
        canvas = assembled(pixels, rows, columns)
        resized = image.resize((across, down), PILImage.Resampling.BILINEAR)
        assert (canvas[:down, :across] == np.asarray(resized)).all()
        assert not canvas[down:].any()
        assert not canvas[:, across:].any()
        if rows * columns > 1:
            whole = image.resize((S, S), PILImage.Resampling.BILINEAR)
            assert (assembled(pixels[-1:], 1, 1) == np.asarray(whole)).all()


@pytest.mark.parametrize("max_tiles", LIMITS)
def test_images_keep_their_shape_and_fill_their_grid(max_tiles: int) -> None:
    """Guards against distortion, a needless loss of resolution, and rows or columns to spare."""
    for width, height in sizes(300, seed=max_tiles):
        rows, columns = best_grid(width, height, S, max_tiles)
        across, down = shown_size(width, height, S, rows, columns)
        # Equal where a last row or column was to hold less than a pixel of an image that shrinks.
        assert (columns - 1) * S <= across <= columns * S
        assert (rows - 1) * S <= down <= rows * S
        longer = max(width, height)
        scale = max(across, down) / longer
        # Within a pixel, and a side is never shorter than one.
        assert abs(across - max(1, width * scale)) <= 1
        assert abs(down - max(1, height * scale)) <= 1
        if -(-width // S) * -(-height // S) <= max_tiles:
            assert scale == pytest.approx(max(1, S / longer), abs=1 / longer), "there is room"


def test_a_tile_passes_through() -> None:
    """Guards against a resize of what fits already: it blurs, and shifts all trained models."""
    image = noise(S, S)
    for max_tiles in LIMITS:
        tiles = cut(image, S, max_tiles)
        assert (tiles.rows, tiles.columns) == (1, 1)
        assert tiles.pixels.tobytes() == np.asarray(image).transpose(2, 0, 1).tobytes()


def test_tiles_are_cut_from_any_mode() -> None:
    """Guards against palettes read as grey levels, and transparent parts that turn black."""
    gray = PILImage.new("L", (2 * S, S), 200)
    assert (cut(gray, S, 2).pixels == 200).all()
    assert (cut(PILImage.new("RGBA", (S, S), (9, 9, 9, 0)), S, 1).pixels == 255).all()
    assert (cut(gray.convert("P"), S, 2).pixels == 200).all()


def test_the_drawings_are_true() -> None:
    """Guards against docstrings that the code no longer follows."""
    table = re.findall(r"(\d+) x +(\d+) +(\d) x (\d) ", best_grid.__doc__ or "")
    assert len(table) == 4
    for width, height, rows, columns in table:
        assert best_grid(int(width), int(height), 100, 4) == (int(rows), int(columns)), table
    drawn = re.findall(r"^ +([ab] .*[b·])(?:  |$)", cut.__doc__ or "", re.MULTILINE)
    image = PILImage.new("RGB", (7, 4), "red")
    image.paste("blue", (4, 0, 7, 4))
    tiles = cut(image, 4, 4)
    assert (len(tiles.pixels), tiles.rows, tiles.columns) == (3, 1, 2)
    letters = {(255, 0, 0): "a", (0, 0, 255): "b", (0, 0, 0): "·"}
    found = [
        [letters[tuple(int(level) for level in pixel)] for pixel in line]
        for line in assembled(tiles.pixels, tiles.rows, tiles.columns)
    ]
    assert [line.replace("|", " ").split() for line in drawn] == found


# --- In a model -----------------------------------------------------------------------------------


def model(fusion: type, max_tiles: int = 4) -> VisionLanguageModel:
    """A toy model; the adapters of cross-attention are open."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("small")
    config = BackboneConfig(tokenizer.vocab_size, width=32, heads=2, head_dim=16, chunk=8)
    encoder = Patches(tile_size=16, patch_size=4, width=24)
    built = VisionLanguageModel(encoder, fusion, config, tokenizer, max_tiles=max_tiles)
    for name, parameter in built.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return built.eval()


@pytest.mark.parametrize("fusion", [EarlyFusion, CrossAttention])
def test_a_model_reads_every_tile(fusion: type) -> None:
    """Guards against a fusion that takes the first tile for the image, or tiles of other images."""
    built = model(fusion)
    question = (Question("what?", "7", "kind"),)
    images = [noise(30, 20), noise(16, 16), noise(10, 60)]
    examples = [
        built.prompts.encode_sample(Sample(tuple(shown), question, "c"))
        for shown in (images, images[1:2], [])
    ]
    batch = collate(examples)
    assert batch.tile_rows.tolist() == [0] * (5 + 1 + 5) + [1]
    hidden = built(batch).hidden
    assert hidden.isfinite().all()
    for row, example in enumerate(examples):
        alone = built(collate([example])).hidden[0]
        torch.testing.assert_close(hidden[row, : len(example)], alone, atol=5e-5, rtol=0)
    last = len(examples[0]) - 1
    for n in range(11):
        batch.tiles[n] = 255 - batch.tiles[n]
        changed = built(batch).hidden
        batch.tiles[n] = 255 - batch.tiles[n]
        # The end of the text sees the tile; what stands before its image, and other rows, do not.
        start = int(batch.tile_starts[n])
        assert (changed[0, last] - hidden[0, last]).abs().max() > 1e-4, n
        torch.testing.assert_close(changed[0, :start], hidden[0, :start], atol=1e-5, rtol=0)
        torch.testing.assert_close(changed[1], hidden[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fusion", [EarlyFusion, CrossAttention])
def test_a_model_answers_about_tiled_images(fusion: type) -> None:
    """Guards against decoding that loses tiles when the prompt has been read."""
    built = model(fusion)
    prompts = [
        Prompt.ask("what?", [noise(30, 20), noise(16, 16)]),
        Prompt.ask("how many?"),
        Prompt.ask("which?", [noise(10, 60)]),
    ]
    together = built.generate(prompts, max_tokens=6)
    assert together == [built.generate([prompt], max_tokens=6)[0] for prompt in prompts]
    # Token by token without a cache: the same greedy words.
    example = built.prompts.encode(prompts[0], reply=True)
    batch = collate([example])
    cached = built.generate_ids(batch, max_tokens=6)[0]
    for token in cached:
        assert int(built(batch).logits[0, -1].argmax()) == token
        batch.tokens = torch.cat([batch.tokens, torch.tensor([[token]])], dim=1)
        batch.patches = torch.nn.functional.pad(batch.patches, (0, 1))
        batch.labels = torch.nn.functional.pad(batch.labels, (0, 1), value=-100)


def test_max_tiles_goes_with_the_model() -> None:
    """Guards against a checkpoint that sees other tiles than in training; old ones saw one."""
    described = model(EarlyFusion, max_tiles=9).describe()
    assert described["max_tiles"] == 9
    assert build_model(described).prompts.max_tiles == 9
    del described["max_tiles"]
    assert build_model(described).prompts.max_tiles == 1
    with pytest.raises(UserError, match="max_tiles is 0"):
        _ = model(EarlyFusion, max_tiles=0).prompts
