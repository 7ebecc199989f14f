"""Images from disk: every kind of file that people have, and every way in which one is broken."""

import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags
from PIL import Image as PILImage

from sandbox.data import media
from sandbox.data.media import MediaError, as_rgb, load_image

# 2 x 3 pixels, and every pixel another colour.
COLOURS = np.array(
    [[[250, 10, 20], [30, 240, 50], [60, 70, 230]], [[0, 0, 0], [255, 255, 255], [200, 100, 0]]],
    dtype=np.uint8,
)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def rgba(alpha: int) -> PILImage.Image:
    """The colours, of which the first pixel is transparent to a degree."""
    image = PILImage.fromarray(COLOURS).convert("RGBA")
    image.putpixel((0, 0), (*map(int, COLOURS[0, 0]), alpha))
    return image


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "ppm"])
def test_lossless_formats_are_read_to_the_pixel(suffix: str, tmp_path: Path) -> None:
    """Guards against swapped channels or axes, and against pixels of a file that is closed."""
    path = tmp_path / f"a.{suffix}"
    PILImage.fromarray(COLOURS).save(path, lossless=True)
    image = load_image(path)
    path.unlink()
    assert image.mode == "RGB"
    for copy in (image, image.copy(), pickle.loads(pickle.dumps(image))):
        assert np.array_equal(np.asarray(copy), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(orientation: int, tmp_path: Path) -> None:
    """Guards against photographs that lie on their side: cameras leave turning to the viewer."""
    undone = {  # what a camera in this orientation stores of an upright scene
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: np.rot90(COLOURS, 1),
        7: np.rot90(COLOURS, 2).transpose(1, 0, 2),
        8: np.rot90(COLOURS, 3),
    }[orientation]
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    PILImage.fromarray(np.ascontiguousarray(undone)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), COLOURS)


def test_transparency_falls_on_white(tmp_path: Path) -> None:
    """Guards against transparent charts on black ground: dark text on it cannot be read."""
    rgba(0).save(tmp_path / "clear.png")
    rgba(128).save(tmp_path / "half.png")
    rgba(0).convert("LA").save(tmp_path / "grey.png")
    rgba(0).quantize(8).save(tmp_path / "palette.png")
    PILImage.fromarray(COLOURS).save(tmp_path / "key.png", transparency=(250, 10, 20))
    corner = {p.stem: load_image(p).getpixel((0, 0)) for p in tmp_path.iterdir()}
    white = (255, 255, 255)
    assert corner.pop("half") == (252, 132, 137)  # 0.5 * colour + 0.5 * white
    assert corner == dict.fromkeys(("clear", "grey", "palette", "key"), white)
    assert load_image(tmp_path / "clear.png").getpixel((1, 0)) == (30, 240, 50)


SHADES = {
    "16.png": (np.array([[0, 0x4000, 0x8000, 0xFFFF]], np.uint16), [0, 64, 128, 255]),
    "32.tiff": (np.array([[0, 0x4000, 0x8000, 0xFFFF]], np.int32), [0, 64, 128, 255]),
    "beyond.tiff": (np.array([[-5, 70_000]], np.int32), [0, 255]),
    "unit.tiff": (np.array([[0, 0.5, 1]], np.float32), [0, 127, 255]),
    "bytes.tiff": (np.array([[0, 128, 300, np.nan]], np.float32), [0, 128, 255, 0]),
    "bits.png": (np.array([[True, False]]), [255, 0]),
}


@pytest.mark.parametrize("name", SHADES)
def test_grey_of_any_depth_keeps_its_shades(name: str, tmp_path: Path) -> None:
    """Guards against deep scans read as white paper: Pillow clips where it should scale."""
    shades, expected = SHADES[name]
    PILImage.fromarray(shades).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[v, v, v] for v in expected]


def test_print_colours_become_screen_colours(tmp_path: Path) -> None:
    """Guards against JPEGs for print shown as negatives."""
    PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert (red > 245, green < 10, blue < 10) == (True, True, True)


def test_a_misnamed_file_is_read_by_what_it_holds(tmp_path: Path) -> None:
    """Guards against trust in suffixes: scraped PNGs are often called .jpg."""
    PILImage.fromarray(COLOURS).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.jpg")), COLOURS)


@pytest.mark.parametrize(
    "name", ["a.gif", "a.png", "a.webp", "a.tiff"], ids=["GIF", "APNG", "WebP", "pages"]
)
def test_several_frames_are_no_image(name: str, tmp_path: Path) -> None:
    """Guards against answers about the first frame, or page, as if it were all."""
    red, blue = (PILImage.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / name, save_all=True, append_images=[blue], duration=50)
    with pytest.raises(MediaError, match=rf"{name}: holds several frames or pages: .*as a video"):
        load_image(tmp_path / name)
    red.save(tmp_path / name)
    assert load_image(tmp_path / name).getpixel((0, 0))[0] > 250


def test_the_preview_in_a_photograph_is_not_a_page(tmp_path: Path) -> None:
    """Guards against phones' photographs taken for animations: a preview lies in the file."""
    photograph, preview = PILImage.fromarray(NOISE), PILImage.new("RGB", (4, 4))
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert load_image(tmp_path / "a.jpg").size == photograph.size


def broken_files(folder: Path) -> dict[str, str]:
    """Broken files by name, each with what its error must say."""
    PILImage.fromarray(NOISE).save(folder / "whole.jpg")
    PILImage.fromarray(NOISE).save(folder / "whole.png")
    for name in ("whole.jpg", "whole.png"):
        content = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(content[: len(content) // 2])
    content = bytearray((folder / "whole.png").read_bytes())
    content[-40] ^= 1
    (folder / "flipped.png").write_bytes(content)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("red,blue\n" * 40)
    (folder / "folder.png").mkdir()
    return {
        "cut-whole.jpg": "cannot be decoded",
        "cut-whole.png": "cannot be decoded",
        "flipped.png": "cannot be decoded",
        "empty.png": "the file is empty",
        "text.png": "not an image file that Pillow can read",
        "folder.png": "is a folder, not a file",
        "absent.png": "no such file",
    }


def test_a_broken_file_is_named_in_one_line(tmp_path: Path) -> None:
    """Guards against tracebacks, and against half-grey images that train as if they were whole."""
    for name, says in broken_files(tmp_path).items():
        with pytest.raises(MediaError) as caught:
            load_image(tmp_path / name)
        assert str(caught.value).startswith(f"image {tmp_path / name}: {says}")
        assert "\n" not in str(caught.value)


def claim(path: Path, width: int, height: int) -> None:
    """Let a PNG claim another size in its header."""
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


@pytest.mark.filterwarnings("error", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a file of kilobytes that takes gigabytes: it is refused before decoding."""
    before = PILImage.MAX_IMAGE_PIXELS
    PILImage.fromarray(NOISE).save(tmp_path / "a.png")
    PILImage.fromarray(NOISE).save(tmp_path / "bomb.png")
    for width in (9_000, 20_000):  # Pillow itself warns of the first, and refuses the second
        claim(tmp_path / "bomb.png", width, 10_000)
        with pytest.raises(
            MediaError, match=rf"bomb.png: {width // 100},000,000 pixels, and at most"
        ):
            load_image(tmp_path / "bomb.png")
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 64 * 48)
    load_image(tmp_path / "a.png")
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError, match=r"3,072 pixels, and at most 3,071"):
        load_image(tmp_path / "a.png")
    assert before == PILImage.MAX_IMAGE_PIXELS


def test_a_plain_image_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a copy of every image: `exif_transpose` makes one if there is none to turn."""
    PILImage.fromarray(NOISE).save(tmp_path / "a.png")

    def copy(self: PILImage.Image) -> Any:
        raise AssertionError("copied")

    monkeypatch.setattr(PILImage.Image, "copy", copy)
    image = load_image(tmp_path / "a.png")
    assert as_rgb(image) is image
