"""Images from disk and their way to uint8 tiles."""

from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from sandbox.errors import UserError


class MediaError(UserError):
    """An image could not be read; the message names the file and the cause in one line."""


def load_image(path: str | Path) -> PILImage.Image:
    """Read an image completely, upright (EXIF), as RGB; transparency falls on white.

    Raises:
        MediaError: the file is missing, no image, or cut short.
    """
    path = Path(path)
    try:
        with PILImage.open(path) as file:
            file.load()
            return as_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise MediaError(f"image {path}: no such file") from None
    except UnidentifiedImageError:
        raise MediaError(f"image {path}: not an image file that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise MediaError(f"image {path}: cannot be decoded ({error})") from None


def as_rgb(image: PILImage.Image) -> PILImage.Image:
    """The image in RGB; transparent parts show white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip all but black to white
        eight_bits = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return PILImage.fromarray(eight_bits).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, "white")
        return PILImage.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def to_tile(image: PILImage.Image, tile_size: int) -> np.ndarray:
    """The whole image as one tile: uint8 ``[3, S, S]``, a plain bilinear resize."""
    image = as_rgb(image)
    if image.size != (tile_size, tile_size):
        image = image.resize((tile_size, tile_size), PILImage.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)
