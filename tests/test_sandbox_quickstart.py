"""The quickstart, end to end on two steps: its files, its summary, and what can go wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sandbox import quickstart as module
from sandbox.checkpoint import load_model, read_checkpoint
from sandbox.data.charts import Charts
from sandbox.data.curriculum import Curriculum
from sandbox.data.media import load_image
from sandbox.data.module import VQAData
from sandbox.data.prompt import Prompt
from sandbox.data.task import Question
from sandbox.errors import UserError
from sandbox.evals.controls import Results
from sandbox.evals.run import Record, evaluate, summarize
from sandbox.lightning_cli import SandboxCLI
from sandbox.quickstart import quickstart


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quick") / "new" / "run"
    quickstart(path, seed=3, steps=2, samples=6)
    return path


@pytest.fixture
def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_summary_has_every_figure(summary: dict[str, Any]):
    """Guards against a figure that readers of the summary rely on going missing."""
    assert summary.keys() >= {
        "accuracy",
        "heldout_combination_accuracy",
        "shuffled_image_accuracy",
        "no_image_accuracy",
        "blind_majority_accuracy",
        "guess_among_present_accuracy",
        "by_question",
        "params_total",
        "params_active",
        "train_seconds",
        "seed",
        "steps",
        "stages",
        "intervals",
        "inside",
        "provenance",
    }
    assert summary["seed"] == 3
    assert summary["steps"] == 2
    assert summary["params_active"] < summary["params_total"]
    assert set(summary["by_question"]) == {"value", "extremum", "count"}
    for figures in summary["by_question"].values():
        assert figures.keys() >= {"accuracy", "heldout", "shuffled", "no_image", "majority", "n"}
    assert sum(f["n"] for f in summary["by_question"].values()) == summary["questions"]


def test_saved_model_gives_the_reported_accuracy(out: Path, summary: dict[str, Any]):
    """Guards against a checkpoint of other weights than were evaluated, or other test questions."""
    path = out / "model.safetensors"
    records = evaluate(load_model(path), Charts(seed=3), "test", 6)
    assert summarize(records).overall.accuracy == summary["accuracy"]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["split"] == "test" and line["images"] == "own"]
    assert [line["correct"] for line in own] == [record.correct for record in records]
    assert all(isinstance(line["reply"], str) for line in own)
    assert read_checkpoint(path)[0]["seed"] == 3


def test_examples_can_be_asked_about(out: Path):
    """Guards against a printed command whose picture is not the one in the test split."""
    picture = load_image(out / "examples" / "0.png")
    assert picture.tobytes() == Charts(seed=3).sample("test", 0).images[0].tobytes()
    (reply,) = load_model(out / "model.safetensors").generate(
        [Prompt.ask("How many bars are there?", [picture])], max_tokens=4
    )
    assert isinstance(reply, str)


def test_saved_configuration_trains_the_same_model(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Guards against a quickstart that no configuration reproduces."""
    monkeypatch.chdir(tmp_path)
    again = SandboxCLI("fit", [f"--config={out / 'config.yaml'}"])
    _, tensors = read_checkpoint(out / "model.safetensors")
    for name, tensor in again.model.model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_report_and_curve_are_written(out: Path):
    """Guards against a learning curve that does not find its figures in the metrics."""
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<polyline" in page
    assert "extremum" in page


def test_a_finished_run_is_not_overwritten(out: Path):
    """Guards against the loss of results to a second run in the same directory."""
    before = (out / "summary.json").read_text()
    with pytest.raises(UserError, match="name another directory"):
        quickstart(out, steps=1)
    assert (out / "summary.json").read_text() == before


def test_unusable_directories_fail_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against minutes of training whose results then have no place to go."""
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        quickstart(tmp_path / "file" / "run")
    monkeypatch.setattr(module, "SPACE", 2**60)
    with pytest.raises(UserError, match="disk space"):
        quickstart(tmp_path / "run")


STAGES = {"switches": [[0, 0], [4, 1]], "right": 0, "answers": 0, "batches": 0}


def results(content: str) -> Results:
    record = Record("test", 0, content, 0, Question("How many?", "2", "count"), correct=True)
    bound = replace(record, correct=False, question=Question("Which?", "a", "which", ("a", "b")))
    return Results(own=[record, bound], heldout=[record, bound], shuffled=[record])


def test_a_training_chart_in_the_test_split_is_an_error():
    """Guards against an accuracy on charts that the model has seen."""
    seen = Charts().sample("train", 5).content
    assert module._learned(VQAData(Charts()), 5, results(seen))
    with pytest.raises(RuntimeError, match="training sample 5"):
        module._learned(VQAData(Charts()), 6, results(seen))


def test_the_questions_learned_are_those_of_each_stage():
    """Guards against a commonest answer of charts that training never showed."""
    data = VQAData(Charts(), curriculum=Curriculum("most_items", [2, None]))
    data.load_state_dict(data.state_dict() | {"curriculum": STAGES})
    learned = module._learned(data, 6, results("ab"))
    drawn = [Charts(most_items=2).sample("train", index) for index in range(4)]
    drawn += [Charts().sample("train", index) for index in (4, 5)]
    assert learned == [question for sample in drawn for question in sample.questions]
    # The first stage's charts are no longer what the whole task draws at these places.
    assert learned != module._learned(VQAData(Charts()), 6, results("ab"))


def test_held_out_figure_leaves_out_what_joins_nothing():
    """Guards against counts, which no combination makes harder, in the held-out accuracy."""
    _, heldout, _ = results("ab").summaries
    assert heldout.overall.accuracy == 0.0
    assert heldout.overall.n == 1
    assert heldout.by_kind["count"].accuracy == 1.0
