"""From files to pixels: images, tiles and video frames, each against a plain loop of its library.

The files are made on the spot, of smooth noise: nothing has to be downloaded.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image as PILImage

from experiments.bench_measure import Bench, Row, Skip, agree
from sandbox.data.media import load_image
from sandbox.data.tiling import Tiles, cut, shown_size
from sandbox.data.video import Backend, load_video

MAX_TILES = 16
RATE = 30  # of the video, frames a second


def media(bench: Bench) -> Iterator[Row | Skip]:
    """Images, tiles and video frames from files, over plain loops of Pillow and decord."""
    sizes = bench.pick(((640, 480), (1600, 1200)), ((64, 48), (160, 120)))
    with TemporaryDirectory() as name:
        folder = Path(name)
        for width, height in sizes:
            yield from of_image(bench, folder / f"{width}x{height}.jpg", width, height)
        if missing := [package for package in ("av", "decord") if find_spec(package) is None]:
            yield Skip("media", "video", f"{' and '.join(missing)} not installed (uv sync)")
            return
        yield from of_video(bench, folder / "video.mp4")


def of_image(bench: Bench, path: Path, width: int, height: int) -> Iterator[Row]:
    """Reading an image, and making one tile or several of it."""
    S = bench.pick(336, 32)
    image = PILImage.fromarray(noise(width, height))
    image.save(path, quality=90)
    size = f"{width} x {height}"
    yield compare(
        bench,
        f"{size}: read JPEG",
        lambda: np.asarray(load_image(path)),
        "Pillow open, convert",
        lambda: np.asarray(PILImage.open(path).convert("RGB")),
    )
    for max_tiles in (1, MAX_TILES):
        tiles = cut(image, S, max_tiles)
        yield compare(
            bench,
            f"{size}: {tiles.rows} x {tiles.columns} tiles of {S}",
            lambda max_tiles=max_tiles: cut(image, S, max_tiles).pixels,
            "Pillow resize, crop",
            lambda tiles=tiles: plain_tiles(image, S, tiles),
        )


def of_video(bench: Bench, path: Path) -> Iterator[Row]:
    """Reading a few frames by either decoder, over decord alone."""
    width, height, count = bench.pick((640, 360, 240), (64, 48, 24))
    write_video(path, width, height, count)
    chosen = [round(RATE * at) for at in load_video(path, frames=8).times]
    backends: tuple[Backend, ...] = ("av", "decord")
    for backend in backends:
        yield compare(
            bench,
            f"8 of {count} frames, {width} x {height}: {backend}",
            lambda backend=backend: stacked(load_video(path, frames=8, backend=backend).frames),
            "decord, frame by frame",
            lambda: plain_frames(path, chosen),
            tolerance=2 / 255,  # of a decoder's rounding from YUV
        )


def compare(
    bench: Bench,
    what: str,
    ours: Callable[[], np.ndarray],
    against: str,
    peer: Callable[[], np.ndarray],
    tolerance: float = 0.0,
) -> Row:
    """Ours over a plain loop that gives the same pixels."""
    agree(what, *(torch.from_numpy(make().astype(np.float32)) for make in (ours, peer)), tolerance)
    samples = bench.interleave(bench.timer(ours), bench.timer(peer))
    return Row("media", what, samples[0], against, samples[1], gain=False)


# --- The plain loops ------------------------------------------------------------------------------


def pixels(image: PILImage.Image) -> np.ndarray:
    """uint8 ``[3, H, W]``."""
    return np.asarray(image).transpose(2, 0, 1)


def plain_tiles(image: PILImage.Image, S: int, tiles: Tiles) -> np.ndarray:
    """The pixels of ``cut``, uint8 ``[n, 3, S, S]``, where the grid is known already."""
    shown = image.resize(
        shown_size(*image.size, S, tiles.rows, tiles.columns), PILImage.Resampling.BILINEAR
    )
    crops = [
        shown.crop((x * S, y * S, x * S + S, y * S + S))
        for y in range(tiles.rows)
        for x in range(tiles.columns)
    ]
    if len(crops) > 1:
        crops.append(image.resize((S, S), PILImage.Resampling.BILINEAR))
    return np.stack([pixels(crop) for crop in crops])


def plain_frames(path: Path, chosen: list[int]) -> np.ndarray:
    """Frames by their numbers, uint8 ``[n, H, W, 3]``."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return np.stack([reader[index].asnumpy() for index in chosen])


# --- The files ------------------------------------------------------------------------------------


def noise(width: int, height: int) -> np.ndarray:
    """Blobs of colour: uint8 ``[H, W, 3]``."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC)
    return np.asarray(smooth)


def stacked(frames: tuple[PILImage.Image, ...]) -> np.ndarray:
    """uint8 ``[n, H, W, 3]``."""
    return np.stack([np.asarray(frame) for frame in frames])


def write_video(path: Path, width: int, height: int, count: int) -> None:
    """Encode a moving picture in H.264, with a key frame every two seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(2 * RATE)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        picture = noise(width, height)
        for index in range(count):
            moved = np.ascontiguousarray(np.roll(picture, 2 * index, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())
