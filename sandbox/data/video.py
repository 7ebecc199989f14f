"""Video frames from disk: which ones, and how to read them.

A video is a file, an animated image, a folder of images or a list of frames. Whatever it is, it
becomes a `Clip`: a few frames, and the seconds at which they begin to show.

Decoders are imported only for files that need one: PyAV where it is installed, else decord. Both
return the same pixels of 8-bit video. But decord 0.6 cannot open AV1, and returns wrong frames
without a word after seeks in H.265 and in H.264 with intra refresh (so it does not seek here, and
takes long for what lies late in a long video), for MPEG-TS, MPEG-PS and AVI, at the start of files
with edit lists, and at some widths up to 72 pixels (so these are refused).
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from sandbox.data.media import MediaError, as_rgb, existing_file, load_image, open_image, reading
from sandbox.errors import UserError

MAX_FRAMES = 48  # what `fps` may take: how many frames it means depends on the file
CLOSE = 1e-3  # s: Matroska rounds times to milliseconds, decord to 32-bit floats
FRAME_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # Pillow knows them by their first bytes
INSTALL = "`uv sync --extra video`, or `pip install av`"
TURNS = {  # of a frame's rotation, in degrees counterclockwise
    90: PILImage.Transpose.ROTATE_90,
    180: PILImage.Transpose.ROTATE_180,
    270: PILImage.Transpose.ROTATE_270,
}

Backend = Literal["auto", "av", "decord"]


class Clip(NamedTuple):
    """Frames of a video and when each begins to show, in seconds after the video's first frame."""

    frames: tuple[PILImage.Image, ...]
    times: tuple[float, ...]


class _Footage(NamedTuple):
    """A video whose frames are known, but not yet read.

    Attributes:
        name: the video in error messages.
        starts: seconds ``[F]`` at which the frames begin to show, increasing from 0.
        end: seconds; when the last frame ends.
        read: yields the frames at increasing indices, one at a time.
    """

    name: str
    starts: np.ndarray
    end: float
    read: Callable[[Sequence[int]], Iterator[PILImage.Image]]


def load_video(
    source: str | Path | np.ndarray | Sequence[PILImage.Image | np.ndarray],
    *,
    frames: int | None = None,
    fps: float | None = None,
    times: Sequence[float] | None = None,
    backend: Backend = "auto",
) -> Clip:
    """Pick frames of a video, upright and in RGB, by one of ``frames``, ``fps`` and ``times``.

    Args:
        source: a video file or animated image; a folder of images, in the natural order of their
            names; or the frames: images, uint8 arrays ``[H, W, 3]``, or one array ``[F, H, W, 3]``.
        frames: so many (default: 8): those that show at the centres of equal spans of time, each
            once; all frames where the video has no more.
        fps: one every ``1 / fps`` seconds from the first on, each once, ``MAX_FRAMES`` at most.
            A folder or list is all taken, as recorded at this rate (otherwise 1 a second).
        times: for each of these increasing seconds, the frame that shows then: the last one that
            began before or at that time.
        backend: what decodes files: PyAV (``av``), ``decord``, or the first installed (``auto``).

    Raises:
        UserError: an argument is out of range, or more than one of frames, fps and times is given.
        MediaError: the source cannot be read, ends before one of the times, or has too many frames
            for ``fps``.
    """
    _check(frames, fps, times, backend)
    footage = _open(source, fps, backend)
    chosen = _choose(footage, frames or 8, fps, times)
    once = sorted(set(chosen))
    images = dict(zip(once, footage.read(once), strict=True))
    return Clip(
        tuple(images[index] for index in chosen),
        tuple(float(footage.starts[index]) for index in chosen),
    )


# --- Which frames ---------------------------------------------------------------------------------


def _check(
    frames: int | None, fps: float | None, times: Sequence[float] | None, backend: str
) -> None:
    choices = {"frames": frames, "fps": fps, "times": times}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"video: give one of frames, fps and times, not {' and '.join(given)}")
    if frames is not None and frames < 1:
        raise UserError(f"video: frames must be at least 1, got {frames}")
    if fps is not None and not 0 < fps < float("inf"):
        raise UserError(f"video: fps must be above 0, got {fps}")
    if times is not None:
        increasing = all(a < b for a, b in pairwise([*times, float("inf")]))
        if len(times) == 0 or times[0] < 0 or not increasing:
            raise UserError(f"video: times must increase from 0 or later, got {list(times)}")
    if backend not in ("auto", "av", "decord"):
        raise UserError(f"video: backend must be auto, av or decord, got {backend!r}")


def _choose(
    footage: _Footage, frames: int, fps: float | None, times: Sequence[float] | None
) -> list[int]:
    """The indices of the frames to show: increasing, and repeated for ``times`` only."""
    name, starts, end, _ = footage
    if fps is not None:
        # A frame is taken if a multiple of 1 / fps lies in the time that it shows.
        ticks = np.ceil((np.append(starts, end) - CLOSE) * fps)
        chosen = np.flatnonzero(np.diff(ticks) > 0)
        if len(chosen) > MAX_FRAMES:
            fits = float(f"{0.995 * MAX_FRAMES / end:.3g}")  # rounding adds less than 0.5%
            raise MediaError(
                f"{name}: {fps:g} frames a second are {len(chosen)} in its {end:.1f} s, and the "
                f"limit is {MAX_FRAMES}: {fits:g} a second would fit"
            )
        return chosen.tolist()
    if times is not None:
        if times[-1] > end + CLOSE:
            raise MediaError(f"{name}: no frame at {times[-1]:g} s, it ends at {end:.3f} s")
        return _shown(starts, np.asarray(times))
    if frames >= len(starts):
        return list(range(len(starts)))
    return sorted(set(_shown(starts, (np.arange(frames) + 0.5) * (end / frames))))


def _shown(starts: np.ndarray, seconds: np.ndarray) -> list[int]:
    """The index of the frame that shows at each time."""
    return (np.searchsorted(starts, seconds + CLOSE, side="right") - 1).tolist()


# --- Images: lists, folders, animations -----------------------------------------------------------


def _open(source: Any, fps: float | None, backend: Backend) -> _Footage:
    if not isinstance(source, str | Path):
        return _recorded("video", len(source), fps, lambda index: _as_image(source[index]))
    name, path = f"video {source}", Path(source)
    if path.is_dir():
        images = [p for p in path.iterdir() if p.suffix.lower() in FRAME_SUFFIXES and p.is_file()]
        images.sort(key=_natural)
        return _recorded(name, len(images), fps, lambda index: load_image(images[index]))
    path = existing_file(source, "video")
    try:
        animation = open_image(name, path, ANIMATED)
    except UnidentifiedImageError:
        return _open_file(name, path, backend)
    return _animated(name, animation)


def _natural(path: Path) -> list[str | int]:
    """Sorts 2.png before 10.png. Texts and numbers take turns, so like is compared with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _recorded(
    name: str, count: int, fps: float | None, load: Callable[[int], PILImage.Image]
) -> _Footage:
    """Images that need no decoder."""
    if not count:
        raise MediaError(f"{name}: holds no images")
    if fps is not None and count > MAX_FRAMES:
        raise MediaError(
            f"{name}: fps takes all {count} images, and the limit is {MAX_FRAMES}: "
            "choose by frames or times"
        )
    rate = fps or 1.0
    return _Footage(name, np.arange(count) / rate, count / rate, lambda chosen: map(load, chosen))


def _as_image(frame: PILImage.Image | np.ndarray) -> PILImage.Image:
    if isinstance(frame, PILImage.Image):
        return as_rgb(frame)
    pixels = np.asarray(frame)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise MediaError(
            "video: a frame is an image or a uint8 array [H, W, 3], "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )
    return PILImage.fromarray(pixels)


def _animated(name: str, file: PILImage.Image) -> _Footage:
    """GIF, APNG, WebP or AVIF; a still image is a video of one frame."""
    starts = [0.0]
    with reading(name):
        for index in range(getattr(file, "n_frames", 1)):
            file.seek(index)
            file.load()  # WebP tells how long a frame shows only once it is decoded
            milliseconds = file.info.get("duration") or 100  # for 0, do as browsers do
            starts.append(starts[-1] + milliseconds / 1000)

    def read(chosen: Sequence[int]) -> Iterator[PILImage.Image]:
        with file, reading(name):
            for index in chosen:
                file.seek(index)
                yield as_rgb(file).copy()  # the file itself goes on to the next frame

    return _Footage(name, np.array(starts[:-1]), starts[-1], read)


# --- Files that need a decoder --------------------------------------------------------------------


def _open_file(name: str, path: Path, backend: Backend) -> _Footage:
    openers = {"av": _open_av, "decord": _open_decord}
    for open_with in openers.values() if backend == "auto" else [openers[backend]]:
        try:
            return open_with(name, path)
        except ImportError:
            continue
    needed = "a decoder" if backend == "auto" else backend
    raise MediaError(f"{name}: needs {needed}, and none is installed; PyAV is by {INSTALL}")


def _open_av(name: str, path: Path) -> _Footage:
    """Read the times of all packets; decode nothing yet."""
    import av

    file = str(path.absolute())  # a bare `12:30.mp4` would name a protocol
    try:
        with av.open(file) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise MediaError(f"{name}: holds no video")
            index, second = stream.index, float(1 / stream.time_base)
            # In order of showing, not of decoding. An edit list discards what it cuts off.
            packets = sorted(
                (packet.pts, packet.is_keyframe, packet.duration or 0)
                for packet in container.demux(stream)
                if packet.pts is not None and not packet.is_discard
            )
    except av.error.FFmpegError as error:
        raise MediaError(f"{name}: cannot be decoded ({error.strerror})") from None
    if not packets:
        raise MediaError(f"{name}: holds no frames with times")
    keys = [pts for pts, is_key, _ in packets if is_key]
    pts = np.unique([pts for pts, _, _ in packets])
    last, _, duration = packets[-1]
    end = last + (duration or (last - pts[0]) / max(1, len(pts) - 1))  # MPEG-TS gives no duration

    def read(chosen: Sequence[int]) -> Iterator[PILImage.Image]:
        try:
            decoder = _Decoder(file, index, keys)
            for at in pts[chosen].tolist():
                frame = decoder.frame(at)
                if frame is None or frame.is_corrupt:
                    seconds = (at - pts[0]) / second
                    raise MediaError(f"{name}: the frame at {seconds:.3f} s is damaged")
                turn = TURNS.get(frame.rotation % 360)
                yield frame.to_image() if turn is None else frame.to_image().transpose(turn)
        except av.error.FFmpegError as error:
            raise MediaError(f"{name}: cannot be decoded ({error.strerror})") from None

    return _Footage(name, (pts - pts[0]) / second, float(end - pts[0]) / second, read)


class _Decoder:
    """PyAV, asked for frames by increasing time stamps (pts), some of which are ``keys``."""

    def __init__(self, file: str, stream: int, keys: Sequence[int]) -> None:
        self.file, self.stream, self.keys = file, stream, keys
        self.reached = keys[0] if keys else 0  # pts up to which no seek is needed
        self._go_to(None)

    def frame(self, pts: int) -> Any:
        """The frame, or None if it cannot be decoded.

        It is reached from where the decoder stands, unless a key frame lies between. A seek may
        land behind the key frame that it names (MPEG-TS), and that may itself need frames before it
        (intra refresh), so the one before and then the beginning of the file are tried too.
        """
        before = bisect_right(self.keys, pts)
        near = self.keys[max(0, before - 2) : before]
        found = self._decode_to(pts) if not near or near[-1] <= self.reached else None
        for start in (*reversed(near), None):
            if found is None:
                self._go_to(start)
                found = self._decode_to(pts)
        self.reached = pts
        return found

    def _go_to(self, pts: int | None) -> None:
        """Go to a key frame, or open the file anew: not every format can seek to its beginning."""
        import av

        if pts is None:
            self.container = av.open(self.file)
        else:
            self.container.seek(pts, stream=self.container.streams[self.stream])
        self.frames = self.container.decode(self.container.streams[self.stream])

    def _decode_to(self, pts: int) -> Any:
        frame = next((f for f in self.frames if f.pts is not None and f.pts >= pts), None)
        return frame if frame is not None and frame.pts == pts else None


def _open_decord(name: str, path: Path) -> _Footage:
    """Let decord read the times, and refuse the files of which it is known to mix up frames."""
    import decord

    instead = f"PyAV may read it: {INSTALL}"
    if not _is_indexed(path):
        raise MediaError(f"{name}: not a whole MP4 or Matroska file, as decord needs; {instead}")
    broken = (decord.DECORDError, RuntimeError, AssertionError)
    decord.logging.set_level(decord.logging.QUIET)  # ffmpeg, to stderr
    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        shown = reader.get_frame_timestamp(np.arange(len(reader))).astype(np.float64)
    except broken:
        raise MediaError(f"{name}: decord cannot read it; {instead}") from None
    starts = shown[:, 0] - shown[0, 0]
    if shown[0, 0] < 0 or (np.diff(starts) <= 0).any():  # an edit list cuts its start
        raise MediaError(f"{name}: decord would mix up its frames; {instead}")

    def read(chosen: Sequence[int]) -> Iterator[PILImage.Image]:
        try:
            wanted = set(chosen)
            for index in range(chosen[-1] + 1):  # without seeking: it may end at a neighbour
                frame = reader.next()
                if index in wanted:
                    pixels = frame.asnumpy()
                    if pixels.shape[2] != 3:  # rows of narrow frames are padded, and misread
                        raise RuntimeError
                    yield PILImage.fromarray(pixels)
        except broken:
            raise MediaError(f"{name}: decord cannot decode it; {instead}") from None

    return _Footage(name, starts, float(shown[-1, 1] - shown[0, 0]), read)


def _is_indexed(path: Path) -> bool:
    """Whether a file is Matroska, or an MP4 (QuickTime) whose table of frames is there."""
    with path.open("rb") as file:
        if file.read(4) == b"\x1aE\xdf\xa3":
            return True
        at, end = 0, path.stat().st_size
        while at + 8 <= end:  # box by box: 4 bytes of size, 4 of kind, perhaps 8 of a large size
            file.seek(at)
            size, kind = int.from_bytes(file.read(4)), file.read(4)
            if kind == b"moov":
                return True
            large = int.from_bytes(file.read(8))
            if size == 0 or (size == 1 and large < 16) or 1 < size < 8:
                return False
            at += large if size == 1 else size
    return False
