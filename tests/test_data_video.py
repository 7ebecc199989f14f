"""Video frames: the right ones, at their true times, whatever the file and the decoder."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from sandbox.data import video
from sandbox.data.media import MediaError
from sandbox.data.video import Clip, load_video
from sandbox.errors import UserError

REAL = Path(__file__).parents[1] / "../shared/data/video"
NASA = REAL / "torchcodec/nasa_13013.mp4"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="no videos at ../shared/data/video")

BACKENDS: tuple[Literal["av", "decord"], ...] = ("av", "decord")
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# Mean difference in grey levels. Both decoders gave the reference to the last bit here; other
# builds of ffmpeg may round some pixels otherwise. Neighbouring frames differ by 0.018 and more.
SAME = 0.01


def difference(a: PILImage.Image | np.ndarray, b: PILImage.Image | np.ndarray) -> float:
    """The mean absolute difference of two frames, in grey levels."""
    return float(np.abs(np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32)).mean())


# --- Numbered frames: files written here ----------------------------------------------------------

H, W, F = 56, 64, 120
STEADY = [index / 25 for index in range(F)]
# A variable frame rate: 20 ms to half a second, and the frames do not fall on multiples of it.
UNSTEADY = np.cumsum([0, *np.random.default_rng(0).choice([0.02, 0.04, 0.2, 0.5], F - 1)]).tolist()


def numbered(index: int) -> np.ndarray:
    """A frame ``[H, W, 3]`` that shows its number: seven squares, its binary digits."""
    frame = np.full((H, W, 3), 20, dtype=np.uint8)
    for digit in range(7):
        frame[8:40, 8 * digit + 4 : 8 * digit + 12] = 235 if index >> digit & 1 else 20
    return frame


def number(frame: PILImage.Image) -> int:
    """The number that a frame shows."""
    pixels = np.asarray(frame.convert("L"))
    return sum(
        int(pixels[12:36, 8 * digit + 6 : 8 * digit + 10].mean() > 127) << digit
        for digit in range(7)
    )


def write(
    path: Path,
    codec: str = "libx264",
    times: Sequence[float] = STEADY,
    unit: Fraction = Fraction(1, 1000),
    rotation: int = 0,
    width: int = W,
    **options: str,
) -> Path:
    """Write numbered frames that show at these times."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        options = {"g": "24", "bf": "3", "crf": "10"} | options
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, H, "yuv420p"
        stream.time_base = stream.codec_context.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        for index, seconds in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(index)[:, :width], format="rgb24")
            frame.pts, frame.time_base = round(seconds / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source: Path, path: Path, seconds: float) -> Path:
    """Copy a file without decoding, so that an edit list hides what came before ``seconds``."""
    av = pytest.importorskip("av")
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts -= round(seconds / stream.time_base)
                packet.dts -= round(seconds / stream.time_base)
                packet.stream = target
                new.mux(packet)
    return path


INDEXED: dict[str, dict[str, Any]] = {
    "steady.mp4": {},
    "unsteady.mp4": {"times": UNSTEADY},
    "unsteady.mkv": {"times": UNSTEADY},
    "late.mp4": {"times": [3 + t for t in STEADY]},  # the first frame is at 3 s
    "open.mp4": {"x264-params": "open-gop=1:keyint=24"},
    "vp9.webm": {"codec": "libvpx-vp9", "b": "0"},
}
STREAMED: dict[str, dict[str, Any]] = {
    "transport.ts": {"unit": Fraction(1, 90_000)},
    "mpeg4.avi": {"codec": "mpeg4", "unit": Fraction(1, 25), "b": "4M", "bf": "2"},
    "program.mpg": {"codec": "mpeg2video", "unit": Fraction(1, 25), "b": "4M", "bf": "2"},
}
REFRESH = {"x264-params": "intra-refresh=1:keyint=24"}


def decodes(path: Path, backend: str, times: Sequence[float]) -> None:
    """Assert that frames chosen in many ways are those that show at these times."""
    times = np.array(times) - times[0]
    for wanted in (range(len(times)), [40], [3, 30, 31, 90, len(times) - 1]):
        asked = [float(times[index]) for index in wanted]
        clip = load_video(path, times=asked, backend=backend)  # type: ignore[arg-type]
        assert list(map(number, clip.frames)) == list(wanted)
        assert clip.times == pytest.approx(asked, abs=1e-3)


@each_backend
@pytest.mark.parametrize("name", INDEXED)
def test_every_frame_is_the_one_that_shows_at_its_time(
    name: str, backend: str, tmp_path: Path
) -> None:
    """Guards against frames off by some, and against times taken from the number of the frame."""
    pytest.importorskip(backend)
    options = INDEXED[name]
    decodes(write(tmp_path / name, **options), backend, options.get("times", STEADY))


@pytest.mark.parametrize("name", STREAMED)
def test_files_without_an_index(name: str, tmp_path: Path) -> None:
    """Guards against decord's wrong frames: all of an MPEG-TS, most of an AVI after seeking."""
    path = write(tmp_path / name, **STREAMED[name])
    decodes(path, "av", STEADY)
    with pytest.raises(MediaError, match=r"decord needs; PyAV may read it: .*pip install av"):
        load_video(path, backend="decord")


def test_files_whose_start_is_cut_off(tmp_path: Path) -> None:
    """Guards against decord's frames off by two until the first key frame of a trimmed video."""
    path = cut(write(tmp_path / "whole.mp4"), tmp_path / "cut.mp4", 0.4)
    clip = load_video(path, times=[0, 0.2, 3], backend="av")
    assert list(map(number, clip.frames)) == [10, 15, 85]
    pytest.importorskip("decord")
    with pytest.raises(MediaError, match="decord would mix up its frames"):
        load_video(path, backend="decord")


@each_backend
def test_key_frames_that_need_those_before_them(backend: str, tmp_path: Path) -> None:
    """Guards against grey frames after a seek: with intra refresh, pictures build up slowly."""
    pytest.importorskip(backend)
    decodes(write(tmp_path / "refresh.mp4", **REFRESH), backend, STEADY)


@each_backend
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_frames_stand_upright(rotation: int, backend: str, tmp_path: Path) -> None:
    """Guards against phone videos on their side: the file says how to turn its frames."""
    pytest.importorskip(backend)
    plain = load_video(write(tmp_path / "0.mp4"), frames=3)
    path = write(tmp_path / "turned.mp4", rotation=rotation)
    turned = load_video(path, frames=3, backend=backend)  # type: ignore[arg-type]
    for a, b in zip(plain.frames, turned.frames, strict=True):
        assert np.array_equal(np.rot90(np.asarray(a), rotation // 90), np.asarray(b))


def test_a_long_file_is_not_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an hour of decoding for eight frames: what lies between is skipped."""
    path, decoded = write(tmp_path / "a.mp4", g="6", bf="0"), []
    go_to = video._Decoder._go_to

    def counted(self: video._Decoder, pts: int | None) -> None:
        go_to(self, pts)
        self.frames = (decoded.append(frame.pts) or frame for frame in self.frames)

    monkeypatch.setattr(video._Decoder, "_go_to", counted)
    clip = load_video(path, times=[1, 3, 4.6], backend="av")
    assert list(map(number, clip.frames)) == [25, 75, 115]
    assert len(decoded) <= 3 * 6


# --- Real clips -----------------------------------------------------------------------------------


@needs_data
@each_backend
def test_frames_are_those_of_the_reference(backend: str) -> None:
    """Guards against neighbours, and against the smaller of two video streams."""
    pytest.importorskip(backend)
    info = json.loads(NASA.with_name(f"{NASA.name}.stream3.all_frames_info.json").read_text())
    starts = [float(frame["pts_time"]) for frame in info]
    for index in (0, 35, 389):
        reference = torch.load(
            NASA.with_name(f"{NASA.name}.stream3.frame{index:06d}.pt"), weights_only=True
        ).numpy()
        near = [i for i in (index - 1, index, index + 1) if 0 <= i < len(starts)]
        clip = load_video(NASA, times=[starts[i] for i in near], backend=backend)  # type: ignore[arg-type]
        assert clip.times == pytest.approx([starts[i] for i in near], abs=1e-5)
        for i, frame in zip(near, clip.frames, strict=True):
            assert (difference(frame, reference) <= SAME) == (i == index)


@needs_data
@each_backend
def test_times_are_those_of_the_reference(backend: str) -> None:
    """Guards against times that drift, such as index / 30 at 29.97 frames a second."""
    pytest.importorskip(backend)
    info = json.loads(NASA.with_name(f"{NASA.name}.stream3.all_frames_info.json").read_text())
    footage = video._open(NASA, None, backend)  # type: ignore[arg-type]
    assert footage.starts == pytest.approx([float(f["pts_time"]) for f in info], abs=1e-5)
    assert footage.end == pytest.approx(float(info[-1]["pts_time"]) + 0.033367, abs=1e-4)


REAL_CLIPS = (
    "torchcodec/nasa_13013.mp4",
    "torchcodec/h265_video.mp4",
    "torchcodec/bt709_full_range.mp4",
    "torchcodec/h264_10bits.mp4",
    "torchcodec/h265_10bits.mp4",
    "decord/flipping_a_pancake.mkv",
    "decord/unordered.mov",
    *(f"decord/video_{turn}.mov" for turn in (0, 90, 180, 270)),
)


@needs_data
@pytest.mark.parametrize("name", REAL_CLIPS)
def test_both_decoders_agree(name: str) -> None:
    """Guards against colours (range, matrix, depth), turns, times and frames that one gets wrong.

    From 10 bits the decoders scale colour up by different filters, which shows at edges (here 3 to
    4 levels in the mean); everywhere else, so in the median, they agree within rounding.
    """
    pytest.importorskip("av")
    pytest.importorskip("decord")
    by_av, by_decord = (load_video(REAL / name, frames=10, backend=b) for b in BACKENDS)
    assert by_av.times == pytest.approx(by_decord.times, abs=1e-5)
    for a, b in zip(by_av.frames, by_decord.frames, strict=True):
        assert a.size == b.size
        if "10bits" in name:
            assert np.median(np.abs(np.asarray(a, dtype=int) - np.asarray(b))) <= 1
            assert difference(a, b) == min(difference(a, other) for other in by_decord.frames)
        else:
            assert difference(a, b) <= SAME


@needs_data
def test_the_rotated_clips_stand_upright() -> None:
    """Guards against turning the wrong way, and against the metadata of QuickTime unread."""
    sizes = [load_video(REAL / f"decord/video_{t}.mov").frames[0].size for t in (0, 90, 180, 270)]
    assert sizes == [(568, 320), (320, 568), (568, 320), (320, 568)]


@needs_data
def test_av1_needs_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a page of C++ where decord meets a format newer than itself."""
    path = REAL / "torchcodec/av1_video.mkv"
    pytest.importorskip("decord")
    with pytest.raises(MediaError, match=r"av1_video.mkv: decord cannot read it; PyAV may"):
        load_video(path, backend="decord")
    pytest.importorskip("av")
    assert load_video(path, frames=2).times == (1.24, 3.72)


# --- Which frames ---------------------------------------------------------------------------------


def stills(count: int) -> list[PILImage.Image]:
    return [PILImage.fromarray(numbered(index)) for index in range(count)]


def numbers(clip: Clip) -> list[int]:
    return list(map(number, clip.frames))


def test_uniform_frames_show_at_the_centres_of_equal_spans() -> None:
    """Guards against a first or last frame, often black, that stands for the whole."""
    frames = stills(20)
    assert numbers(load_video(frames, frames=1)) == [10]
    assert numbers(load_video(frames, frames=4)) == [2, 7, 12, 17]
    assert numbers(load_video(frames)) == [1, 3, 6, 8, 11, 13, 16, 18]
    assert numbers(load_video(frames[:3])) == [0, 1, 2]
    assert load_video(frames, frames=4).times == (2, 7, 12, 17)


def test_uniform_is_over_time(tmp_path: Path) -> None:
    """Guards against equal steps in the number of the frame where some show for long."""
    first, *rest = stills(4)
    # They show from 0 s, 3.2 s, 3.3 s and 3.4 s on, until 4 s.
    first.save(
        tmp_path / "a.gif", save_all=True, append_images=rest, duration=[3200, 100, 100, 600]
    )
    assert numbers(load_video(tmp_path / "a.gif", frames=2)) == [0]  # at 1 s and 3 s
    assert numbers(load_video(tmp_path / "a.gif", frames=3)) == [0, 2]


def test_frames_per_second() -> None:
    """Guards against a frame that is taken twice or left out where rates do not divide."""
    clip = load_video(stills(6), fps=2)
    assert numbers(clip) == [0, 1, 2, 3, 4, 5]  # a list was recorded at this rate
    assert clip.times == (0, 0.5, 1, 1.5, 2, 2.5)


@each_backend
def test_frames_per_second_of_a_file(backend: Any, tmp_path: Path) -> None:
    """Guards against a grid that slips against the frames: 0.28 s is 7 / 25, and 0.56 / 2."""
    pytest.importorskip(backend)
    path = write(tmp_path / "a.mp4")
    clip = load_video(path, fps=25 / 7, backend=backend)
    assert numbers(clip) == list(range(0, F, 7))
    assert numbers(load_video(path, fps=1, backend=backend)) == [0, 25, 50, 75, 100]
    short = write(tmp_path / "short.mp4", times=STEADY[:5])
    assert numbers(load_video(short, fps=999, backend=backend)) == [0, 1, 2, 3, 4]


def test_too_many_frames_per_second(tmp_path: Path) -> None:
    """Guards against an hour of video in one prompt; the rate that the error names must fit."""
    path = write(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"120 in its 4.8 s, and the limit is 48: 9.95 a second"):
        load_video(path, fps=25)
    assert len(load_video(path, fps=9.95).frames) == 48
    with pytest.raises(MediaError, match="fps takes all 49 images, and the limit is 48"):
        load_video(stills(49), fps=1)


def test_times_take_the_frame_that_shows() -> None:
    """Guards against the nearest frame, which may show what has not happened yet."""
    clip = load_video(stills(4), times=[0, 0.9, 1.0, 2.5, 3.99])
    assert numbers(clip) == [0, 0, 1, 2, 3]
    assert clip.times == (0, 0, 1, 2, 3)
    with pytest.raises(MediaError, match=r"no frame at 4.2 s, it ends at 4.000 s"):
        load_video(stills(4), times=[1, 4.2])


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"fps": 0}, "fps must be above 0"),
        ({"fps": float("nan")}, "fps must be above 0, got nan"),
        ({"fps": float("inf")}, "fps must be above 0, got inf"),
        ({"times": []}, r"times must increase from 0 or later, got \[\]"),
        ({"times": [-1, 2]}, "times must increase"),
        ({"times": [1, 1]}, "times must increase"),
        ({"times": [float("nan")]}, "times must increase"),
        ({"times": [1, float("inf")]}, "times must increase"),
        ({"frames": 8, "fps": 1}, "give one of frames, fps and times, not frames and fps"),
        ({"backend": "opencv"}, "backend must be auto, av or decord, got 'opencv'"),
    ],
)
def test_a_choice_out_of_range_is_named(choice: dict[str, Any], says: str) -> None:
    """Guards against a default that replaces what was asked for, in silence."""
    with pytest.raises(UserError, match=says):
        load_video("absent.mp4", **choice)


# --- Sources that need no decoder -----------------------------------------------------------------


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_decoder")
def test_frames_need_no_decoder(tmp_path: Path) -> None:
    """Guards against 10.png before 2.png, and against a decoder that nobody needs."""
    for index in range(12):
        PILImage.fromarray(numbered(index)).save(tmp_path / f"frame{index}.png")
    (tmp_path / "labels.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    assert numbers(load_video(tmp_path, frames=12)) == list(range(12))
    assert numbers(load_video(str(tmp_path), times=[2, 10])) == [2, 10]
    assert load_video(tmp_path, fps=4).times[:3] == (0, 0.25, 0.5)
    array = np.stack([numbered(index) for index in range(4)])
    assert numbers(load_video(array)) == numbers(load_video(list(array))) == [0, 1, 2, 3]


@pytest.mark.usefixtures("no_decoder")
@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_animations_have_their_own_times(name: str, tmp_path: Path) -> None:
    """Guards against one picture repeated (Pillow shows all frames through one object)."""
    first, *rest = stills(3)
    durations = [200, 500, 300]
    first.save(
        tmp_path / name, save_all=True, append_images=rest, duration=durations, lossless=True
    )
    clip = load_video(tmp_path / name, frames=3)
    assert numbers(clip) == [0, 1, 2]
    assert clip.times == pytest.approx((0, 0.2, 0.7))
    assert numbers(load_video(tmp_path / name, times=[0.69, 0.99])) == [1, 2]


def test_an_animation_that_names_no_durations(tmp_path: Path) -> None:
    """Guards against frames that all stand at 0 s."""
    first, *rest = stills(3)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=0)
    assert load_video(tmp_path / "a.gif").times == pytest.approx((0, 0.1, 0.2))


def test_only_the_frames_asked_for_are_read() -> None:
    """Guards against a video held in memory whole."""
    read: list[int] = []

    class Frames(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    load_video(Frames(stills(40)), frames=4)
    assert read == [5, 15, 25, 35]


@pytest.mark.parametrize(
    "frame", [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), "a.png"]
)
def test_what_is_no_frame_is_named(frame: Any) -> None:
    """Guards against floats in 0..1 shown black, and against channels that stand first."""
    with pytest.raises(MediaError, match=r"a frame is an image or a uint8 array \[H, W, 3\], got"):
        load_video([frame])


# --- What cannot be read --------------------------------------------------------------------------


def test_a_missing_decoder_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an ImportError, and against giving up where the other decoder is there."""
    path, modules = write(tmp_path / "a.mp4"), sys.modules
    monkeypatch.setitem(modules, "av", None)
    with pytest.raises(MediaError, match=r"needs av, and .*`uv sync --extra video`"):
        load_video(path, backend="av")
    if importlib.util.find_spec("decord"):
        assert numbers(load_video(path, frames=1)) == [60]
    monkeypatch.setitem(modules, "decord", None)
    with pytest.raises(MediaError, match=r"needs a decoder, and .*`uv sync --extra video`"):
        load_video(path)


@each_backend
def test_a_broken_file_is_named_in_one_line(
    backend: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against what ffmpeg and decord print, and against frames made up for lost ones."""
    pytest.importorskip(backend)
    whole = write(tmp_path / "whole.mp4").read_bytes()
    noise = bytearray(whole)
    noise[len(whole) // 4 : len(whole) // 2 : 7] = bytes(
        len(noise[len(whole) // 4 : len(whole) // 2 : 7])
    )
    contents = {
        "cut.mp4": whole[: len(whole) // 2],
        "noise.mp4": bytes(noise),
        "text.mp4": b"red,blue\n" * 40,
        "empty.mp4": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()
    for name in (*contents, "folder.mp4", "absent.mp4"):
        with pytest.raises(MediaError) as caught:
            load_video(tmp_path / name, backend=backend)
        assert str(caught.value).startswith(f"video {tmp_path / name}: ")
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_data
@each_backend
def test_a_corrupted_clip_is_an_error(backend: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against copies of the last good frame in place of the lost ones."""
    pytest.importorskip(backend)
    with pytest.raises(MediaError, match=r"corrupted.mp4: (decord )?cannot"):
        load_video(REAL / "decord/corrupted.mp4", backend=backend)
    assert capfd.readouterr().err == ""


def test_narrow_frames(tmp_path: Path) -> None:
    """Guards against sheared pictures: decord takes the padding of a row for more channels."""
    path = write(tmp_path / "a.mp4", times=STEADY[:2], width=48)
    assert difference(load_video(path, frames=2).frames[1], numbered(1)[:, :48]) < 5
    pytest.importorskip("decord")
    with pytest.raises(MediaError, match="decord cannot decode it"):
        load_video(path, backend="decord")


def test_a_file_of_sound_alone_is_named(tmp_path: Path) -> None:
    """Guards against `NoneType has no attribute`, from the video that is not there."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        sound.rate = 44_100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for backend in BACKENDS:
        pytest.importorskip(backend)
        with pytest.raises(MediaError, match=r"holds no video|decord cannot read it"):
            load_video(tmp_path / "a.mp4", backend=backend)
