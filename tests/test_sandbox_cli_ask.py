"""`sandbox ask` about videos: which frames reach the prompt, and how mistakes are told."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox import checkpoint, cli
from sandbox.backbone.config import BackboneConfig
from sandbox.data.prompt import Image, Video
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a picture, a folder of twelve frames (each a shade), and weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    for index in range(12):
        PILImage.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"clip/{index}.png")
    PILImage.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def ask(*argv: str) -> int:
    """The exit code, whether the command returns or exits."""
    try:
        return cli.main(["ask", "--checkpoint", "model.safetensors", *argv, "what?"])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that would be answered; the model is never loaded."""
    asked: list[Any] = []

    class Model:
        def to(self, *_: Any) -> "Model":
            return self

        def stream(self, prompts: list[Any], **sampling: Any) -> Iterator[tuple[int, str]]:
            asked.extend(prompts)
            yield 0, "red"

    monkeypatch.setattr(checkpoint, "load_model", lambda path: Model())
    return asked


@pytest.mark.parametrize(
    ("choice", "shades", "times"),
    [
        ([], [0, 2, 3, 5, 6, 8, 9, 11], [0, 2, 3, 5, 6, 8, 9, 11]),
        (["--frames", "3"], [2, 6, 10], [2, 6, 10]),
        (["--fps", "4"], list(range(12)), [i / 4 for i in range(12)]),
        (["--times", "0.5,1,10"], [0, 1, 10], [0, 1, 10]),
    ],
)
def test_the_chosen_frames_reach_the_prompt(
    choice: list[str], shades: list[int], times: list[float], prompts: list[Any]
) -> None:
    """Guards against a flag that is parsed and never passed on."""
    assert ask("--video", "clip", *choice) == 0
    (turn,) = prompts[0].turns
    (clip, question) = turn.content
    assert question == "what?"
    assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == shades
    assert list(clip.times) == times


def test_images_come_first_then_videos(prompts: list[Any]) -> None:
    """Guards against a question about "the first" that another order answers otherwise."""
    order = ["--video", "clip", "--image", "a.png", "--video", "clip/3.png", "--frames", "1"]
    assert ask(*order) == 0
    image, clip, still, question = prompts[0].turns[0].content
    assert isinstance(image, Image)
    assert isinstance(clip, Video)
    assert still.frames[0].getpixel((0, 0))[0] == 3
    assert question == "what?"


MISTAKES = [
    (["--video", "clip", "--frames", "0"], "--frames: must be a whole number of at least 1"),
    (["--video", "clip", "--frames", "2", "--fps", "1"], "not allowed with argument --frames"),
    (["--video", "clip", "--fps", "0"], "--fps: must be a number above 0, got '0'"),
    (["--video", "clip", "--fps", "nan"], "--fps: must be a number above 0, got 'nan'"),
    (["--video", "clip", "--times", "2,1"], "--times: must be seconds that increase"),
    (["--video", "clip", "--times=-1,2"], "--times: must be seconds that increase"),
    (["--video", "clip", "--times", "1,,2"], "--times: must be seconds that increase"),
    (["--frames", "4"], "--frames, --fps and --times choose from a --video, and there is none"),
    (["--image", "a.png", "--times", "0"], "choose from a --video, and there is none"),
]


@pytest.mark.parametrize(("argv", "says"), MISTAKES)
def test_a_mistake_is_one_line(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a default in place of what was asked for."""
    assert ask(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--video", "absent.mp4"], "error: video absent.mp4: no such file"),
        (["--video", "clip", "--times", "1,50"], "error: video clip: no frame at 50 s"),
        (["--video", "text.mp4"], "error: video text.mp4: "),
        (["--image", "clip"], "error: image clip: is a folder, not a file"),
    ],
)
def test_a_bad_file_is_one_line(
    argv: list[str], says: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against tracebacks, and against an exit code that blames the command line."""
    (workplace / "text.mp4").write_text("hello\n" * 50)
    assert ask(*argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert error.count("\n") == 1


def test_mistakes_and_bad_files_do_not_wait_for_torch() -> None:
    """Guards against seconds of imports before a mistyped path is told."""
    mistakes = [argv for argv, _ in MISTAKES] + [["--help"], ["--video", "absent.mp4"]]
    script = (
        "import sys\n"
        "from sandbox.cli import main\n"
        f"for argv in {mistakes}:\n"
        "    try: main(['ask', '--checkpoint', 'model.safetensors', *argv, 'what?'])\n"
        "    except SystemExit: pass\n"
        "print(','.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "absent.mp4: no such file" in done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split(",")}
    assert not loaded & {"torch", "lightning", "tokenizers", "decord", "av"}


def test_a_question_about_a_folder_of_frames(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a chain that breaks between its tested parts; no decoder is needed."""
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "decord", None)
    torch.manual_seed(0)
    small = BackboneConfig(width=32, layers=2, heads=2, head_dim=16)
    encoder = Patches(tile_size=16, patch_size=8, width=16)
    model = VisionLanguageModel(encoder, EarlyFusion, small, Tokenizer.load())
    checkpoint.save_model(model, workplace / "model.safetensors")

    def answer(times: str) -> str:
        sampling = ["--max-tokens", "12", "--temperature", "1.5", "--seed", "3"]
        assert ask("--video", "clip", "--times", times, *sampling) == 0
        return capsys.readouterr().out

    assert answer("0,3,7") == answer("0,3,7") != answer("0,3,8")
