"""The controls beside a score, on tasks with and without held-out combinations."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision
from rich.console import Console
from torch import nn

from encoders.patches import Patches
from fusion.base import Fusion
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.data.charts import Charts
from sandbox.data.clips import Clips
from sandbox.data.pictures import Pictures
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.data.words import InWords
from sandbox.evals import controls
from sandbox.evals.controls import Blind, Controls, Results, inside, scores, table
from sandbox.evals.run import Record
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer

WHICH = Question("Which color?", "red", "color", ("red", "blue"))
COUNT = Question("How many?", "2", "count")


def record(question: Question, correct: bool) -> Record:
    return Record("test", 0, "content", 0, question, correct)


def results(
    *, heldout: bool, present: bool = True, reordered: bool = False, no_image: bool = False
) -> Results:
    which = WHICH if present else Question(WHICH.text, WHICH.answer, WHICH.kind)
    own = [record(which, True), record(COUNT, True), record(which, False)]
    beyond = [record(which, False), record(COUNT, True)] if heldout else []
    shuffled = [record(which, False), record(COUNT, True), record(which, False)]
    moved = [record(which, False), record(COUNT, True), record(which, True)] if reordered else []
    unseen = [record(which, False), record(COUNT, True), record(which, True)] if no_image else []
    return Results(own, beyond, shuffled, moved, unseen)


def printed(summary) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(summary))
    return console.file.getvalue()


def test_scores_of_a_task_with_held_out_combinations():
    """Guards against counts, which no combination makes harder, in the held-out figure."""
    found = results(heldout=True)
    learned = [COUNT, COUNT, WHICH]
    summary = scores(found, Blind.of(learned, found.asked))
    assert summary["accuracy"] == 2 / 3
    assert summary["heldout_combination_accuracy"] == 0.0
    assert summary["shuffled_image_accuracy"] == 1 / 3
    assert summary["blind_majority_accuracy"] == 1.0  # it always hears these very questions
    assert summary["guess_among_present_accuracy"] == 0.5
    assert summary["by_question"]["count"]["heldout"] == 1.0
    assert summary["by_question"]["color"]["n"] == 2
    assert "0.667" in printed(summary)


def test_scores_of_a_task_without():
    """Guards against a crash or a zero where a task holds nothing out or lists nothing present."""
    found = results(heldout=False, present=False)
    summary = scores(found, Blind.of([COUNT], found.asked))
    assert summary["heldout_combination_accuracy"] is None
    assert summary["guess_among_present_accuracy"] is None
    assert "heldout_combination_accuracy" not in summary["intervals"]
    assert summary["by_question"]["color"]["heldout"] is None
    assert "-" in printed(summary)


def test_scores_where_nothing_was_learned():
    """Guards against a crash, or a majority of 0, where a benchmark has no train split."""
    found = results(heldout=False)
    summary = scores(found, Blind.of([], found.asked))
    assert summary["blind_majority_accuracy"] is None
    assert [kind["majority"] for kind in summary["by_question"].values()] == [None, None]
    assert summary["guess_among_present_accuracy"] == 0.5, "the other baseline needs no training"
    rows = [line.split() for line in printed(summary).splitlines()]
    assert [row[-2] for row in rows if row and row[-1].isdigit()] == ["-"] * 3


@pytest.mark.parametrize("control", ["reordered", "no_image"])
def test_scores_of_a_control_that_not_every_task_has(control: str):
    """Guards against a control of the order, or of no image, that is lost or taken for the other,
    and against one told of samples that have no order, or no image.
    """
    with_control, without = (
        scores(found, Blind.of([COUNT, WHICH], found.asked))
        for found in (results(heldout=True, **{control: True}), results(heldout=True))
    )
    (key,) = (key for key in with_control if key.startswith(control))
    assert with_control[key] == 2 / 3
    assert with_control["by_question"]["color"][control] == 0.5
    assert with_control["by_question"]["count"][control] == 1.0
    low, high = with_control["intervals"][key]
    assert low < 2 / 3 < high
    header = control.replace("_", " ")
    assert header in printed(with_control)
    assert control not in str(without)
    assert header not in printed(without)
    assert with_control.keys() - without.keys() == {key}, "no other key comes or goes"


def test_all_columns_fit_a_terminal():
    """Guards against a table of all controls whose headings are cut on 80 columns."""
    found = results(heldout=True, reordered=True, no_image=True)
    drawn = printed(scores(found, Blind.of([COUNT], found.asked)))
    headings = "questions accuracy heldout shuffled no image reordered majority n"
    assert headings in " ".join(drawn.split())


@pytest.mark.parametrize("task", [Pictures(), Clips(frames=4), Charts(size=32)])
def test_every_task_is_asked_once_in_every_way(task, monkeypatch):
    """Guards against tasks that go without a control, or pay for it twice."""
    asked = []

    def evaluate(model, task, split, samples, *, images, processes):
        asked.append((split, images))
        return []

    monkeypatch.setattr(controls, "evaluate", evaluate)
    Results.of(None, task, 2)
    expected = [("test", "own"), ("heldout", "own"), ("test", "shuffled")]
    expected += [("test", "reordered")] * (not isinstance(task, Charts))
    assert asked == [*expected, ("test", "none")]


def test_held_out_counts_alone_make_no_figure_of_combinations():
    """Guards against a division by zero after a run on counts only."""
    found = Results([record(COUNT, True)], [record(COUNT, False)], [record(COUNT, False)])
    summary = scores(found, Blind.of([COUNT], found.asked))
    assert summary["heldout_combination_accuracy"] is None


# --- A model ------------------------------------------------------------------------------------


def toy(fusion: type[Fusion], experts: int) -> VisionLanguageModel:
    """A model on random weights, its gates included."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("small")
    config = BackboneConfig(tokenizer.vocab_size, width=32, layers=4, heads=2, experts=experts)
    model = VisionLanguageModel(Patches(32, 8, width=32), fusion, config, tokenizer)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("fusion", "experts", "parts", "modalities"),
    [
        (EarlyFusion, 3, {"expert_load"}, {"image", "text"}),
        (EarlyFusion, 0, set(), None),
        (CrossAttention, 3, {"gates", "expert_load"}, {"text"}),
        (CrossAttention, 0, {"gates"}, None),
    ],
)
def test_inside_tells_what_the_model_has(
    fusion: type[Fusion], experts: int, parts: set[str], modalities: set[str] | None
):
    """Guards against gates or loads told of a model without them, or lost, or not those of its
    layers, and against image tokens where a sequence has none.
    """
    model, task = toy(fusion, experts), Charts(size=32)
    found = inside(model, task, samples=3)
    assert set(found) == parts
    if modalities:
        assert set(found["expert_load"]) == {0, 1, 2, 3}
        for load in found["expert_load"].values():
            assert set(load) == modalities
            assert all(math.isclose(sum(shares), 1, rel_tol=1e-5) for shares in load.values())
    if "gates" in parts:
        assert found["gates"] == model.fusion.gates
        assert set(found["gates"]) == {1, 3}
    assert json.loads(json.dumps(found)).keys() == parts, "plain values"


def alone(data: object, folder: Path) -> SimpleNamespace:
    """What the callback reads of a Trainer of one process."""
    one: dict[str, object] = {"is_global_zero": True, "global_rank": 0, "world_size": 1}
    one["precision_plugin"] = Precision()
    return SimpleNamespace(datamodule=data, default_root_dir=folder, **one)


@pytest.mark.parametrize(
    ("task", "sees"), [(Charts(size=32), True), (InWords(Charts(size=32)), False)]
)
def test_a_test_stores_its_controls(
    task: Task,
    sees: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Guards against controls that are computed but neither written nor printed, and against a
    crash of the whole test where a task in words has no image to leave out.
    """
    monkeypatch.setattr(controls, "LEARNED", 20)
    data = SimpleNamespace(task=task, size=lambda split: 4)
    trainer = alone(data, tmp_path)
    Controls(samples=3).on_test_end(trainer, SimpleNamespace(model=toy(CrossAttention, 3)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["inside"]) == {"gates", "expert_load"}
    assert set(summary["inside"]["gates"]) == {"1", "3"}
    lines = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
    unseen = [line["correct"] for line in lines if line["images"] == "none"]
    assert ("no image" in capsys.readouterr().out) == sees
    assert ("no_image_accuracy" in summary) == sees
    assert len(unseen) == sees * summary["questions"]
    if sees:
        assert summary["no_image_accuracy"] == sum(unseen) / len(unseen)


@pytest.mark.parametrize("train", [0, 2])
def test_a_majority_opens_no_image(
    train: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Guards against `sandbox test` that has evaluated a benchmark without a train split and then
    crashes, and against one that decodes the train split for questions alone.
    """
    task = Charts(size=32)
    learned = {index: task.sample("train", index).questions for index in range(train)}
    sample = task.sample

    def of_test(split: Split, index: int) -> Sample:
        assert split == "test"
        return sample(split, index)

    monkeypatch.setattr(task, "size", lambda split: {"train": train, "test": 4}.get(split, 0))
    monkeypatch.setattr(task, "sample", of_test)
    monkeypatch.setattr(task, "questions_of", lambda split, index: learned[index])
    data = SimpleNamespace(task=task, size=task.size)
    trainer = alone(data, tmp_path)
    Controls().on_test_end(trainer, SimpleNamespace(model=toy(EarlyFusion, 0)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["blind_majority_accuracy"] is None) == (not train)
    assert summary["shuffled_image_accuracy"] is not None
    assert "majority" in capsys.readouterr().out
