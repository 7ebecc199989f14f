"""Images from disk, as RGB images of Pillow, and their way to uint8 tiles."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from sandbox.errors import UserError

MAX_IMAGE_PIXELS = 80_000_000  # 320 MB decoded; below the size at which Pillow starts to warn


class MediaError(UserError):
    """An image or video could not be read; the message names file and cause in one line."""


def load_image(path: str | Path) -> PILImage.Image:
    """Read an image completely, upright (EXIF), as RGB; transparency falls on white.

    Raises:
        MediaError: the file is missing, no image, cut short, larger than ``MAX_IMAGE_PIXELS``, or
            holds several frames or pages.
    """
    return decode_image(f"image {path}", existing_file(path, "image"))


def decode_image(name: str, source: Path | IO[bytes]) -> PILImage.Image:
    """Read an image as ``load_image`` does, from a path or from memory.

    Args:
        name: what to call it in a message.
        source: where its bytes are.

    Raises:
        MediaError: see ``load_image``.
    """
    try:
        file = open_image(name, source)
    except UnidentifiedImageError:
        raise MediaError(f"{name}: not an image file that Pillow can read") from None
    with file, reading(name):
        # The second picture of an MPO is a phone's preview or depth map, not another page.
        if getattr(file, "is_animated", False) and file.format != "MPO":
            raise MediaError(
                f"{name}: holds several frames or pages: pass an animation as a video, "
                "or save the one that is meant"
            )
        file.load()
        ImageOps.exif_transpose(file, in_place=True)
        return as_rgb(file)


def as_rgb(image: PILImage.Image) -> PILImage.Image:
    """The image in RGB; transparent parts show white.

    Whole numbers beyond 8 bits are 16-bit grey. Floats are grey in 0..1, or in 0..255 if any is
    larger than 1.
    """
    if image.mode.startswith("I"):  # convert() would clip all but black to white
        return _grey(np.asarray(image) >> 8)
    if image.mode == "F":
        shades = np.nan_to_num(np.asarray(image))
        return _grey(shades if shades.max() > 1 else shades * 255)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, "white")
        return PILImage.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(shades: np.ndarray) -> PILImage.Image:
    return PILImage.fromarray(shades.clip(0, 255).astype(np.uint8)).convert("RGB")


def existing_file(path: str | Path, kind: str) -> Path:
    """The path of a file that is there and not empty."""
    path = Path(path)
    if path.is_dir():
        raise MediaError(f"{kind} {path}: is a folder, not a file")
    if not path.exists():
        raise MediaError(f"{kind} {path}: no such file")
    if not path.stat().st_size:
        raise MediaError(f"{kind} {path}: the file is empty")
    return path


def open_image(
    name: str, source: Path | IO[bytes], formats: tuple[str, ...] | None = None
) -> PILImage.Image:
    """An image of which the header alone is read, and which is not too large to decode."""
    with reading(name):
        try:
            file = PILImage.open(source, formats=formats)
            pixels = file.width * file.height
            if pixels <= MAX_IMAGE_PIXELS:
                return file
            file.close()
        except PILImage.DecompressionBombError as error:  # at twice the size that Pillow warns of
            pixels = int(re.findall(r"\d+", str(error))[0])
        raise MediaError(
            f"{name}: {pixels:,} pixels, and at most {MAX_IMAGE_PIXELS:,} are decoded: "
            "make it smaller"
        )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what Pillow's parsers raise on a broken file, which may be anything, into one line."""
    try:
        yield
    except (MediaError, UnidentifiedImageError):
        raise
    except Exception as error:
        raise MediaError(f"{name}: cannot be decoded ({error})") from None
