"""An evaluation's way through its questions: the same to the last bit, whatever happens."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fusion.base import Fusion
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.data.task import Question, Sample, Split
from sandbox.errors import UserError
from sandbox.evals import asking
from sandbox.evals.answering import Ask, Reply, answer
from sandbox.evals.benchmark import evaluate_benchmark
from sandbox.evals.predictions import read_predictions
from sandbox.evals.progress import Meter
from sandbox.model import VisionLanguageModel
from tests.asked import Colours, mixture

FILES = ("predictions.jsonl", "evaluation.json", "gallery.html")
SETTINGS = {"limit": 25, "max_tokens": 4}


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return mixture()


@pytest.fixture(scope="module")
def whole(model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    evaluate_benchmark(model, Colours(), out=out, **SETTINGS)
    return out


def same(one: Path, other: Path) -> None:
    """Both evaluations left the same files, but for the time they took."""
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, other)]
    timings = [summary.pop("timing") for summary in summaries]
    assert summaries[0] == summaries[1]
    assert timings[0].keys() == timings[1].keys()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_nothing(
    model: VisionLanguageModel, whole: Path, tmp_path: Path, batch_size: int
) -> None:
    """Guards against results that depend on how many questions are asked at once: sums over rows
    of another number round in another way, and a router's near tie may turn. Bits are compared,
    those of confidences too; the fixture asks 64 at once.
    """
    evaluate_benchmark(model, Colours(), out=tmp_path, batch_size=batch_size, **SETTINGS)
    same(whole, tmp_path)
    own = [p for p in read_predictions(whole / "predictions.jsonl") if p.images == "own"]
    assert {p.group for p in own} == {0, 1}, "one group would prove nothing"


@pytest.mark.parametrize("killed_in", [0, 1, 2, 4])
@pytest.mark.parametrize("half_a_line", [False, True])
def test_a_killed_evaluation_goes_on(
    model: VisionLanguageModel,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_in: int,
    half_a_line: bool,
) -> None:
    """Guards against predictions that are lost, doubled or computed beside others than before when
    an evaluation goes on, in the middle of a sample, of a pass or of a line.
    """
    calls = iter(range(100))

    def until(model: VisionLanguageModel, group: Sequence[Ask], max_tokens: int) -> list[Reply]:
        if next(calls) == killed_in:
            raise KeyboardInterrupt
        return answer(model, group, max_tokens)

    with monkeypatch.context() as patched:
        patched.setattr(asking, "answer", until)
        with pytest.raises(KeyboardInterrupt):
            evaluate_benchmark(model, Colours(), out=tmp_path, **SETTINGS)
    if half_a_line:  # some of the next group had reached the disk
        path = tmp_path / "predictions.jsonl"
        done = path.read_bytes()
        more = (whole / "predictions.jsonl").read_bytes()[len(done) :]
        path.write_bytes(done + more[: len(more) // 5 + 3])
        assert not path.read_bytes().endswith(b"\n")
    evaluate_benchmark(model, Colours(), out=tmp_path, resume=True, **SETTINGS)
    same(whole, tmp_path)


def test_a_finished_evaluation_may_be_resumed(
    model: VisionLanguageModel, whole: Path, tmp_path: Path
) -> None:
    """Guards against a second --resume that asks the last group twice, or nothing at all."""
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    results = evaluate_benchmark(model, Colours(), out=out, resume=True, **SETTINGS)
    same(whole, out)
    assert 0 < results.summary["timing"]["questions"] < results.summary["questions"]


@pytest.mark.parametrize(
    ("seed", "changed", "named"),
    [
        (1, {}, "weights"),
        (0, {"max_tokens": 5}, "max_tokens"),
        (0, {"extract": True}, "extract"),
        (0, {"metric": "anls"}, "metric"),
        (0, {"limit": 24}, "samples"),
        (0, {"controls": False}, "controls"),
    ],
)
def test_another_evaluation_is_not_resumed(
    whole: Path, tmp_path: Path, seed: int, changed: dict, named: str
) -> None:
    """Guards against a file of predictions in which two models or settings are mixed."""
    out = tmp_path / "other"
    shutil.copytree(whole, out)
    with pytest.raises(UserError, match=named):
        evaluate_benchmark(
            mixture(seed=seed), Colours(), out=out, resume=True, **SETTINGS | changed
        )
    same(whole, out)


def test_nothing_is_overwritten(model: VisionLanguageModel, whole: Path) -> None:
    """Guards against hours of predictions replaced by a command given twice."""
    with pytest.raises(UserError, match="--resume"):
        evaluate_benchmark(model, Colours(), out=whole, **SETTINGS)


def test_a_damaged_line_is_named(model: VisionLanguageModel, whole: Path, tmp_path: Path) -> None:
    """Guards against a traceback, or a prediction passed over, where a file was edited."""
    out = tmp_path / "damaged"
    shutil.copytree(whole, out)
    lines = (out / "predictions.jsonl").read_text().splitlines()
    lines[2] = '{"id": "test-1-0"}'
    (out / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"predictions\.jsonl, line 3"):
        evaluate_benchmark(model, Colours(), out=out, resume=True, **SETTINGS)


@pytest.mark.parametrize("fusion", [EarlyFusion, CrossAttention])
@pytest.mark.parametrize("resumed", [False, True])
def test_without_images_none_is_opened(
    fusion: type[Fusion], resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a control without images that decodes them all, in one go or resumed, and
    against one that puts questions of samples which had no image to begin with.
    """
    passes, opened = list[str](), set[str]()
    begin = Meter.start

    def start(self: Meter, name: str, total: int, done: int) -> None:
        passes.append(name)
        begin(self, name, total=total, done=done)

    class Some(Colours):
        """Every third sample is told in words; questions are known without images."""

        def sample(self, split: Split, index: int) -> Sample:
            opened.update(passes[-1:])
            sample = super().sample(split, index)
            return sample if index % 3 else replace(sample, images=(), text="It is dark.")

        def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
            return super().sample(split, index).questions

    model = mixture(fusion)
    evaluate_benchmark(model, Some(), out=tmp_path, **SETTINGS)
    path = tmp_path / "predictions.jsonl"
    before = path.read_bytes()
    if resumed:  # killed in the pass without images
        own = before.count(b'"images": "own"')
        path.write_bytes(b"".join(before.splitlines(keepends=True)[: own + 1]))
    monkeypatch.setattr(Meter, "start", start)
    results = evaluate_benchmark(
        model, Some(), out=tmp_path if resumed else None, resume=resumed, **SETTINGS
    )
    assert set(asking.PASSES.values()) == set(passes)
    assert asking.PASSES["none"] not in opened
    unseen = results.controls["no_image"]
    asked = [(p.index, p.number, p.content, p.question) for p in results.predictions]
    assert [(p.index, p.number, p.content, p.question) for p in unseen] == [
        each for each in asked if each[0] % 3
    ]
    assert not any("<|image" in p.prompt for p in unseen)
    assert path.read_bytes() == before
