"""`sandbox evaluate`: the same whatever happens on the way, and worth what it says."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image as PILImage
from rich.console import Console

from sandbox.checkpoint import save_model
from sandbox.cli import main
from sandbox.errors import UserError
from sandbox.evals import asking
from sandbox.evals.answer_files import read_vqa
from sandbox.evals.answering import Ask, Reply
from sandbox.evals.benchmark import evaluate_benchmark
from sandbox.evals.benchmark_scores import ALL, MEAN, figures
from sandbox.evals.predictions import Prediction
from sandbox.evals.progress import Meter
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer
from tests.asked import COLOURS, Colours, mixture


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return mixture()


def says(monkeypatch: pytest.MonkeyPatch, reply: Callable[[Ask], str]) -> None:
    """Put a function in the place of the model's replies."""

    def fake(model: VisionLanguageModel, group: Sequence[Ask], max_tokens: int) -> list[Reply]:
        return [Reply(reply(ask), 0.5) for ask in group]

    monkeypatch.setattr(asking, "answer", fake)


# --- What a score is worth ------------------------------------------------------------------------


def test_who_looks_fails_the_controls(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a control that still shows the right image: a perfect reader must be right
    about its own images, never without one, and with another's only where the colour is the same.
    """

    def look(ask: Ask) -> str:
        tiles = ask.prefix.example.tiles
        if not len(tiles):
            return "?"
        found = tuple(int(value) for value in tiles[0][:, 15, 15])
        return {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}[found]

    says(monkeypatch, look)
    results = evaluate_benchmark(model, Colours())
    controls = results.summary["controls"]
    assert results.summary["score"] == 1
    assert controls["no_image"]["score"] == 0
    alike = [
        float(p.targets == (Colours().sample("test", p.shown).questions[0].answer,))
        for p in results.controls["shuffled_images"]
    ]
    assert all(p.shown != p.index for p in results.controls["shuffled_images"])
    assert controls["shuffled_images"]["score"] == sum(alike) / len(alike) < 0.7
    assert 0 < controls["majority"]["score"] < 1


def test_who_does_not_look_passes_the_controls(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against controls that ask other questions, or score them by other answers: who
    ignores images must score the same in each, and as the commonest answer does.
    """
    says(monkeypatch, lambda ask: "green")
    results = evaluate_benchmark(model, Colours())
    controls = results.summary["controls"]
    asked = {name: [(p.id, p.targets) for p in each] for name, each in results.controls.items()}
    assert asked["no_image"] == asked["shuffled_images"]
    assert asked["no_image"] == [(p.id, p.targets) for p in results.predictions]
    scores = {controls[name]["score"] for name in ("no_image", "shuffled_images", "majority")}
    assert scores == {results.summary["score"]}
    assert 0 < results.summary["score"] < 1


def test_a_control_that_cannot_be_had_is_told(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an exchange of an image with itself, which would look like a control."""
    says(monkeypatch, lambda ask: "green")
    monkeypatch.setattr(Colours, "size", lambda self, split: 1 if split == "test" else 0)
    results = evaluate_benchmark(model, Colours())
    assert set(results.controls) == {"no_image"}
    assert results.summary["controls"]["majority"] is None
    told = " ".join(results.summary["notes"])
    assert "exchanged" in told
    assert "train" in told
    assert results.summary["interval_95"] is None, "one image says nothing of others"
    console = Console(file=io.StringIO(), width=100)
    console.print(results.table())
    assert console.file.getvalue().split()[-2:] == ["-", "1"], "majority, number of questions"


def test_intervals_are_over_images() -> None:
    """Guards against intervals that take questions as independent: the same questions asked four
    times over must not make the interval narrower. And the mean of types weighs each alike.
    """
    single = [
        Prediction(
            *(f"{n}", "test", n, 0, f"{n}", "rare" if n % 5 == 0 else "often", "own", n, "", ()),
            *("", "", 1.0, "", ("x",), float(n % 5 == 0 or n % 3 == 0), 0),
        )
        for n in range(60)
    ]
    scores = [float(each.score or 0) for each in single]
    for headline in (ALL, MEAN):
        one = figures(single, scores, headline)
        four = figures(single * 4, scores * 4, headline)
        assert one["interval_95"] == pytest.approx(four["interval_95"])
        assert one["interval_95"][0] < one["score"] < one["interval_95"][1]
        assert one["by_type"]["rare"]["score"] == 1
    assert figures(single, scores, MEAN)["score"] == pytest.approx((1 + 16 / 48) / 2)
    assert figures(single, scores, ALL)["score"] == pytest.approx((12 + 16) / 60)


# --- Official files -------------------------------------------------------------------------------


def jsonl(folder: Path, records: list[dict], split: str = "test") -> Path:
    """A folder with a file of JSON lines, and the image that all of them are about."""
    PILImage.new("RGB", (16, 16), COLOURS[0]).save(folder / "a.png")
    lines = (json.dumps({"image": "a.png", **record}) + "\n" for record in records)
    (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def test_chartqa_reports_the_mean_of_its_parts_in_both_modes(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a mean over all questions, and against prediction and target exchanged: 95 is
    within 5% of 100, while 100 is not within 5% of 95.
    """
    folder = tmp_path / "test"
    (folder / "png").mkdir(parents=True)
    PILImage.new("RGB", (16, 16)).save(folder / "png" / "1.png")
    human = [{"imgname": "1.png", "query": "How many?", "label": "100"}]
    made = [{"imgname": "1.png", "query": q, "label": label} for q, label in MADE.items()]
    (folder / "test_human.json").write_text(json.dumps(human))
    (folder / "test_augmented.json").write_text(json.dumps(made))
    says(monkeypatch, lambda ask: "95")
    summary = evaluate_benchmark(model, "chartqa", data=tmp_path).summary
    by_type = {kind: found["score"] for kind, found in summary["by_type"].items()}
    assert by_type == {"human": 1.0, "augmented": 0.25}
    assert summary["score"] == 0.625
    assert summary["reported"] == "mean of augmented and human"
    modes = {mode: found["score"] for mode, found in summary["modes"].items()}
    assert modes == {"reference": 0.625, "robust": 0.75}  # robust reads "$95" and years
    robust = evaluate_benchmark(model, "chartqa", data=tmp_path, mode="robust").summary
    assert robust["score"] == 0.75
    assert robust["metric"]["mode"] == "robust"


MADE = {"a?": "95", "b?": "$95", "c?": "no", "d?": "yes"}


def test_vqa_results_are_the_official_file(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a file that the official tools refuse, or score in another way."""
    (tmp_path / "val2014").mkdir()
    PILImage.new("RGB", (16, 16)).save(tmp_path / "val2014" / "COCO_val2014_000000000007.jpg")
    asked = [{"image_id": 7, "question": f"{n}?", "question_id": 70 + n} for n in range(3)]
    given = [["cat"] * 10, ["cat"] * 2 + ["dog"] * 8, [*["dog"] * 9, "a cat."]]
    annotated = [
        {
            "question_id": 70 + n,
            "image_id": 7,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": people[0],
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": i + 1}
                for i, a in enumerate(people)
            ],
        }
        for n, people in enumerate(given)
    ]
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    annotations.write_text(json.dumps({"annotations": annotated}))
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(
        json.dumps({"questions": asked, "data_subtype": "val2014"})
    )
    says(monkeypatch, lambda ask: "cat")
    out = tmp_path / "out"
    results = evaluate_benchmark(model, "vqav2", data=tmp_path, split="val", out=out)
    assert [p.score for p in results.predictions] == pytest.approx([1, 0.6, 0.3])
    assert json.loads((out / "results.json").read_text()) == [
        {"question_id": 70 + n, "answer": "cat"} for n in range(3)
    ]
    assert [r.answers for r in read_vqa(out / "results.json", annotations)] == [
        p.targets for p in results.predictions
    ]


def test_docvqa_without_answers_is_submitted(model: VisionLanguageModel, tmp_path: Path) -> None:
    """Guards against a score of 0 where nobody knows the answers, and a wrong submission file."""
    PILImage.new("RGB", (16, 16)).save(tmp_path / "1.png")
    record = {"questionId": 65, "question": "Who?", "image": "1.png", "docId": 1}
    whole_file = {"dataset_name": "docvqa", "dataset_split": "test", "data": [record]}
    (tmp_path / "test_v1.0.json").write_text(json.dumps(whole_file))
    out = tmp_path / "out"
    results = evaluate_benchmark(model, "docvqa", data=tmp_path, out=out, max_tokens=4)
    (prediction,) = results.predictions
    assert not results.scored
    assert prediction.score is None
    assert "1 of 1 questions have no known answer" in results.summary["notes"][0]
    submission = json.loads((out / "submission.json").read_text())
    assert submission == [{"questionId": 65, "answer": prediction.reply}]
    assert "surest" in (out / "gallery.html").read_text()


# --- From replies to answers ----------------------------------------------------------------------


def test_what_cannot_be_parsed_is_wrong(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a guess, or an empty answer that counts, where no letter can be found."""
    cases = [
        *(("dog", "B"), ("B", "dog"), ("cat", "I cannot tell"), ("cat", "D")),
        *(("a bird", "The answer is (C)."), ("cat", "")),
    ]
    choices = ["cat", "dog", "a bird"]
    records = [
        {"question": f"Which? #{number}", "choices": choices, "answer": answer}
        for number, (answer, _) in enumerate(cases)
    ]
    read: Callable[[Ask], str] = lambda ask: ask.text(model.prompts)  # noqa: E731
    says(monkeypatch, lambda ask: next(r for n, (_, r) in enumerate(cases) if f"#{n}" in read(ask)))
    results = evaluate_benchmark(model, "jsonl", data=jsonl(tmp_path, records))
    found = [(p.answer, p.targets, p.score) for p in results.predictions]
    assert found == [
        *(("B", ("B",), 1), ("B", ("B",), 1), (None, ("A",), 0), (None, ("A",), 0)),
        *(("C", ("C",), 1), (None, ("A",), 0)),
    ]
    assert results.summary["extraction"]["failures"] == 3
    assert results.summary["extraction"]["failure_rate"] == 0.5
    assert "Which? #0\nA. cat\nB. dog\nC. a bird<|eot|>" in results.predictions[0].prompt


@pytest.mark.parametrize("extract", [False, True])
def test_replies_are_taken_whole_unless_told_otherwise(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extract: bool
) -> None:
    """Guards against an extraction that nobody asked for, or whose failures nobody counts."""
    reply = {"a?": "So the answer is red.", "b?": "There is nothing in it that I know of."}
    records = [{"question": q, "answers": ["red", "rot"]} for q in reply]
    says(monkeypatch, lambda ask: reply["a?" if "a?" in ask.text(model.prompts) else "b?"])
    folder = jsonl(tmp_path, records)
    results = evaluate_benchmark(model, "jsonl", data=folder, extract=extract)
    first, second = results.predictions
    assert (first.answer, first.score) == (("red", 1) if extract else (reply["a?"], 0))
    assert (second.answer, second.score) == ((None, 0) if extract else (reply["b?"], 0))
    failures = (results.summary["extraction"] or {}).get("failures")
    assert failures == (1 if extract else None)


def test_wrong_arguments_are_told(model: VisionLanguageModel, tmp_path: Path) -> None:
    """Guards against tracebacks, and against ten people's metric over a single answer."""
    folder = jsonl(tmp_path, [{"question": "a?", "answer": "red", "choices": []}])
    for message, benchmark, options in (
        ("did you mean 'chartqa'", "chartq", {}),
        ("no mode", "jsonl", {"mode": "robust"}),
        ("needs 10 answers", "jsonl", {"metric": "vqa"}),
        ("none of the choices", "jsonl", {"metric": "choice"}),
        ("no val split", "jsonl", {"split": "val"}),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_benchmark(model, benchmark, data=folder, max_tokens=1, **options)


# --- The command ----------------------------------------------------------------------------------


def test_the_command_line(
    model: VisionLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against options that never arrive, and a majority of the answers that are tested."""
    save_model(model, tmp_path / "model.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data, [{"question": f"{n}?", "answer": "red", "id": n} for n in range(4)])
    options = ["--benchmark", "jsonl", "--max-tokens", "2", "--metric", "chartqa"]
    told = ["evaluate", "--checkpoint", str(tmp_path), *options, "--metric-mode", "robust"]
    out = tmp_path / "out"
    assert main([*told, "--data", str(data / "test.jsonl"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "score" in printed
    assert "is one split" in " ".join(printed.split())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metric"] == {"name": "chartqa", "version": "1", "mode": "robust"}
    assert summary["controls"]["majority"] is None
    assert summary["checkpoint"]["path"] == str(tmp_path / "model.safetensors")
    assert summary["model"]["tokenizer"] == Tokenizer.load().fingerprint
    assert main([*told, "--data", str(data), "--out", str(out)]) == 1
    assert "--resume" in capsys.readouterr().err


def test_progress_is_told_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a line a group in a log file, and against a time left that counts what was
    there before.
    """
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    meter.start("own images", total=200, done=100)
    for seconds, samples in ((10, 110), (31, 150), (40, 160)):
        now[0] = float(seconds)
        meter.advance(samples, 10)
    told = capsys.readouterr().err.splitlines()
    assert told == ["own images: 150 of 200 samples, 1 questions/s, about 0 min 31 s left"]
