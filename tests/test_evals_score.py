"""`sandbox score`: what it reads, prints and writes, and what it refuses in one line."""

import json
import random
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from sandbox import cli

GOLDEN = Path(__file__).parent / "golden"
TEN = ["cat"] * 4 + ["dog"] * 6


def lines(path: Path, *records: Any) -> Path:
    """A file with a JSON value on every line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def summary(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    """What a successful `sandbox score` prints."""
    assert cli.main(["score", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line that a failed `sandbox score` prints."""
    assert cli.main(["score", *map(str, argv)]) == 1
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("metric", "golden", "mode", "key"),
    [
        ("vqa", "vqa", "official", "official"),
        ("vqa", "vqa", "always", "always"),
        ("chartqa", "chartqa", "reference", "reference"),
        ("chartqa", "chartqa", "robust", "robust"),
        ("anls", "docvqa", None, "score"),
        ("exact", "exact", None, "score"),
    ],
)
def test_golden_files_are_scored_line_by_line(
    metric: str,
    golden: str,
    mode: str | None,
    key: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against a command that loses lines or a mode on the way to the metric."""
    file, out = GOLDEN / f"{golden}.jsonl", tmp_path / "out.jsonl"
    chosen = ["--mode", mode] if mode else []
    told = summary(capsys, metric, file, "--out", out, *chosen)
    expected = [json.loads(line)[key] for line in file.read_text().splitlines()]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["score"] for one in written] == pytest.approx(expected, abs=1e-12)
    assert all(one.keys() == {"score", "normalised"} for one in written)
    assert all(isinstance(one["normalised"], str) for one in written)
    assert told["metric"] == metric and told["mode"] == mode and told["version"]
    assert told["n"] == len(expected)
    assert told["score"] == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    low, high = told["interval_95"]
    assert 0 < low < told["score"] < high < 1
    assert "extraction" not in told


def test_modes_have_a_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a default that is not the official one."""
    file = lines(tmp_path / "a.jsonl", {"prediction": "Cat", "answers": ["cat"] * 10})
    assert summary(capsys, "vqa", file)["score"] == 0
    assert summary(capsys, "vqa", file)["mode"] == "official"
    file = lines(tmp_path / "b.jsonl", {"prediction": "2008", "answers": ["2010"]})
    assert summary(capsys, "chartqa", file)["score"] == 1
    assert summary(capsys, "chartqa", file)["mode"] == "reference"


def test_extraction_is_counted_and_its_failures_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that answered in sentences scored 2%, and nothing said that parsing was to blame."""
    sentence = "It is somewhere between these two bars."
    file = lines(
        tmp_path / "a.jsonl",
        {"prediction": "The answer is 4.", "answers": ["4"]},
        {"prediction": sentence, "answers": [sentence]},
        {"prediction": "", "answers": [""]},
        {"prediction": "5", "answers": ["4"]},
    )
    out = tmp_path / "out.jsonl"
    told = summary(capsys, "chartqa", file, "--extract", "--out", out)
    assert told["extraction"] == {"version": "1", "failures": 2, "failure_rate": 0.5}
    assert told["score"] == 0.25
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["score"] for one in written] == [1, 0, 0, 0]
    assert [one["normalised"] for one in written] == ["4", "", "", "5"]
    assert summary(capsys, "chartqa", file)["score"] == 0.5


def test_choices_are_extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against an unparsed reply that counts as a choice."""
    file = lines(
        tmp_path / "a.jsonl",
        {"prediction": "The answer is (B).", "answers": ["B"]},
        {"prediction": "b", "answers": ["B"]},
        {"prediction": "C", "answers": ["b"]},
        {"prediction": "A cat", "answers": ["A"]},
    )
    told = summary(capsys, "choice", file)
    assert told["score"] == 0.5
    assert told["extraction"]["failures"] == 1


def test_types_are_scored_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ChartQA is reported as two splits and their mean, which differs if the splits do in size."""
    file = lines(
        tmp_path / "a.jsonl",
        {"prediction": "4", "answers": ["4"], "type": "human"},
        {"prediction": "4", "answers": ["5"], "type": "augmented"},
        {"prediction": "5", "answers": ["5"], "type": "augmented"},
        {"prediction": "6", "answers": ["5"], "type": "augmented"},
        {"prediction": "7", "answers": ["5"], "type": "augmented"},
    )
    told = summary(capsys, "chartqa", file)
    assert {kind: one["score"] for kind, one in told["by_type"].items()} == {
        "human": 1,
        "augmented": 0.25,
    }
    assert told["score"] == 0.4 and told["mean_of_types"] == 0.625


def vqa_files(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Official VQA results of two questions, and their annotations, in another order."""
    results = [{"question_id": 7, "answer": "cat"}, {"question_id": 9, "answer": "Two"}]
    annotations = [
        {
            "question_id": number,
            "image_id": 1,
            "question_type": "what",
            "answer_type": kind,
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": place}
                for place, answer in enumerate(answers, start=1)
            ],
        }
        for number, kind, answers in ((9, "number", ["2"] * 2 + ["3"] * 8), (7, "other", TEN))
    ]
    content = {"results": results, "annotations": {"annotations": annotations}} | changes
    for name in content:
        (folder / f"{name}.json").write_text(json.dumps(content[name]))
    return folder / "results.json", folder / "annotations.json"


def test_official_vqa_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against joining by place: the two official files are ordered differently."""
    results, annotations = vqa_files(tmp_path)
    out = tmp_path / "out.jsonl"
    told = summary(capsys, "vqa", results, "--annotations", annotations, "--out", out)
    assert told["score"] == pytest.approx(0.8)
    assert told["by_type"]["number"]["score"] == pytest.approx(0.6)
    assert told["by_type"]["other"]["score"] == 1
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["normalised"], second["normalised"]) == ("cat", "2")


def test_official_docvqa_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against reading one of the accepted answers only."""
    truth, results = tmp_path / "val_v1.0.json", tmp_path / "submission.json"
    data = [
        {"questionId": 5, "question": "?", "answers": ["xyz", "abcd"]},
        {"questionId": 3, "question": "?", "answers": ["10 March"]},
    ]
    truth.write_text(json.dumps({"dataset_name": "docvqa", "dataset_split": "val", "data": data}))
    results.write_text(
        json.dumps([{"questionId": 3, "answer": "10 march"}, {"questionId": 5, "answer": "abcx"}])
    )
    assert summary(capsys, "anls", results, "--annotations", truth)["score"] == 0.875
    del data[1]["answers"]
    truth.write_text(json.dumps({"data": data}))
    error = refusal(capsys, "anls", results, "--annotations", truth)
    assert f"{truth}, record 1: 'answers'" in error


@pytest.mark.parametrize(
    ("metric", "line", "says"),
    [
        ("exact", '{"prediction": "a"', "no JSON in UTF-8 (Expecting"),
        ("exact", "[" * 10**5, "no JSON in UTF-8"),
        ("exact", '{"prediction": "\xff"}', "no JSON in UTF-8"),
        ("exact", '["a", ["b"]]', "expected a JSON object, got ['a', ['b']]"),
        ("exact", '{"answers": ["a"]}', "'prediction' must be a text, got None"),
        ("exact", '{"prediction": 4, "answers": ["4"]}', "'prediction' must be a text, got 4"),
        ("exact", '{"prediction": "a"}', "'answers' must be a list of at least one, got None"),
        ("exact", '{"prediction": "a", "answers": []}', "at least one, got []"),
        ("exact", '{"prediction": "a", "answers": "a"}', "at least one, got 'a'"),
        ("exact", '{"prediction": "a", "answers": [1]}', "'answer' must be a text, got 1"),
        ("exact", '{"prediction": "a", "answers": ["a"], "type": 1}', "'type' must be a text"),
        ("vqa", '{"prediction": "a", "answers": ["a"]}', "needs 10 answers, got 1"),
        (
            "vqa",
            json.dumps({"prediction": "a", "answers": [{"answer": "a", "answer_id": 1}] * 10}),
            "an answer_id stands twice",
        ),
        ("choice", '{"prediction": "A", "answers": ["E"]}', "one of the letters ABCD, got 'E'"),
        ("choice", '{"prediction": "A", "answers": ["AB"]}', "one of the letters ABCD, got 'AB'"),
    ],
)
def test_a_bad_line_is_named(
    metric: str, line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback from line 40 000 of a file says nothing of the file."""
    good = {"prediction": "A", "answers": ["A"] * 10}
    file = tmp_path / "bad.jsonl"
    file.write_bytes(f"{json.dumps(good)}\n\n{line}\n".encode("latin-1"))
    error = refusal(capsys, metric, file)
    assert error.startswith(f"error: {file}, line 3: ")
    assert says in error


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"results": {}}, "results.json: expected a list of records with 'question_id'"),
        ({"results": [{"answer": "a"}]}, "results.json, record 0: 'question_id' must be a whole"),
        ({"results": []}, "results.json lacks 2 of 2 questions, the first with question_id 7"),
        (
            {"results": [{"question_id": 7, "answer": "a"}]},
            "results.json lacks 1 of 2 questions, the first with question_id 9",
        ),
        (
            {"results": [{"question_id": n, "answer": "a"} for n in (7, 9, 11)]},
            "annotations.json lacks 1 of 3 questions, the first with question_id 11",
        ),
        (
            {"results": [{"question_id": 7, "answer": "a"}] * 2},
            "record 1: question_id 7 stands in",
        ),
        (
            {"results": [{"question_id": 7, "answer": ["a"]}, {"question_id": 9, "answer": "a"}]},
            "results.json, record 0: 'answer' must be a text, got ['a']",
        ),
        ({"annotations": []}, "annotations.json: expected a JSON object"),
        ({"annotations": {}}, "annotations.json: expected a list of records"),
    ],
)
def test_official_files_that_do_not_fit_are_named(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A score over the questions that happen to be in both files compares with nothing."""
    results, annotations = vqa_files(tmp_path, **changes)
    assert says in refusal(capsys, "vqa", results, "--annotations", annotations)


def test_a_file_without_records_or_without_a_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a division by zero, and against scores written over the predictions."""
    empty = lines(tmp_path / "empty.jsonl")
    assert "holds no record" in refusal(capsys, "exact", empty)
    assert "No such file" in refusal(capsys, "exact", tmp_path / "none.jsonl")
    file = lines(tmp_path / "a.jsonl", {"prediction": "a", "answers": ["a"]})
    before = file.read_text()
    assert "would replace" in refusal(capsys, "exact", file, "--out", file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["score"], "required: <metric>"),
        (["score", "bleu", "a"], "invalid choice: 'bleu'"),
        (["score", "chartqa", "a", "--mode", "official"], "invalid choice: 'official'"),
        (["score", "exact", "a", "--mode", "official"], "unrecognized arguments: --mode"),
        (["score", "chartqa", "a", "--annotations", "b"], "unrecognized arguments: --annotations"),
    ],
)
def test_usage_errors(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a mode that a metric takes and ignores."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert says in capsys.readouterr().err


def test_half_characters_and_line_separators_survive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lone surrogate from a byte-level model broke the output, a U+2028 a line in two."""
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    record = {"prediction": "\ud800 a\u2028b", "answers": ["\ud800 A\u2028B"]}
    file.write_text(json.dumps(record) + "\n" + json.dumps(record | {"prediction": "é"}) + "\n")
    assert summary(capsys, "exact", file, "--out", out)["score"] == 0.5
    assert json.loads(out.read_text().split("\n")[0])["normalised"] == record["prediction"]


def test_scoring_loads_nothing_heavy() -> None:
    """Scoring a file of text waited for torch to load."""
    script = (
        "import sys\n"
        "from sandbox.cli import main\n"
        f"assert main(['score', 'vqa', {str(GOLDEN / 'vqa.jsonl')!r}]) == 0\n"
        "print(','.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split(",")}
    assert not loaded & {"torch", "lightning", "numpy", "PIL", "tokenizers", "rich", "matplotlib"}


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "seconds"), [("vqa", 2), ("chartqa", 1), ("anls", 2)])
def test_ten_thousand_predictions_take_no_time(
    metric: str, seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against patterns compiled, or tables built, once for every answer."""
    rng = random.Random(1)
    words = ["the", "cat", "two", "isn't", "t-shirt,", "1,000", "$5", "3%", "red/white", "no."]
    records = []
    for _ in range(10_000):
        known = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(4)]
        records.append({"prediction": rng.choice(known), "answers": rng.choices(known, k=10)})
    file = lines(tmp_path / "many.jsonl", *records)
    start = process_time()
    summary(capsys, metric, file)
    assert process_time() - start < seconds
