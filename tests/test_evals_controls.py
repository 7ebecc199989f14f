"""The controls beside a score, on tasks with and without held-out combinations."""

import io

import pytest
from rich.console import Console

from sandbox.data.charts import Charts
from sandbox.data.clips import Clips
from sandbox.data.pictures import Pictures
from sandbox.data.task import Question
from sandbox.evals import controls
from sandbox.evals.controls import Blind, Results, scores, table
from sandbox.evals.run import Record

WHICH = Question("Which color?", "red", "color", ("red", "blue"))
COUNT = Question("How many?", "2", "count")


def record(question: Question, correct: bool) -> Record:
    return Record("test", 0, "content", 0, question, correct)


def results(*, heldout: bool, present: bool = True, reordered: bool = False) -> Results:
    which = WHICH if present else Question(WHICH.text, WHICH.answer, WHICH.kind)
    own = [record(which, True), record(COUNT, True), record(which, False)]
    beyond = [record(which, False), record(COUNT, True)] if heldout else []
    shuffled = [record(which, False), record(COUNT, True), record(which, False)]
    moved = [record(which, False), record(COUNT, True), record(which, True)] if reordered else []
    return Results(own, beyond, shuffled, moved)


def printed(summary) -> str:
    console = Console(file=io.StringIO(), width=100)
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


def test_scores_where_images_have_an_order():
    """Guards against a control of the order that is lost, or told of samples that have none."""
    with_order, without = (
        scores(found, Blind.of([COUNT, WHICH], found.asked))
        for found in (results(heldout=True, reordered=True), results(heldout=True))
    )
    assert with_order["reordered_image_accuracy"] == 2 / 3
    assert with_order["by_question"]["color"]["reordered"] == 0.5
    assert with_order["by_question"]["count"]["reordered"] == 1.0
    low, high = with_order["intervals"]["reordered_image_accuracy"]
    assert low < 2 / 3 < high
    assert "reordered" in printed(with_order)
    assert "reordered" not in str(without)
    assert "reordered" not in printed(without)
    for key in without:
        assert key in with_order, "no key is lost"


@pytest.mark.parametrize("task", [Pictures(), Clips(frames=4), Charts(size=32)])
def test_frames_and_labelled_pictures_are_asked_about_in_another_order(task, monkeypatch):
    """Guards against tasks of several images that go without the control, or pay for it twice."""
    asked = []

    def evaluate(model, task, split, samples, *, images="own"):
        asked.append((split, images))
        return []

    monkeypatch.setattr(controls, "evaluate", evaluate)
    Results.of(None, task, 2)
    expected = [("test", "own"), ("heldout", "own"), ("test", "shuffled")]
    assert asked == expected + [("test", "reordered")] * (not isinstance(task, Charts))


def test_held_out_counts_alone_make_no_figure_of_combinations():
    """Guards against a division by zero after a run on counts only."""
    found = Results([record(COUNT, True)], [record(COUNT, False)], [record(COUNT, False)])
    summary = scores(found, Blind.of([COUNT], found.asked))
    assert summary["heldout_combination_accuracy"] is None
