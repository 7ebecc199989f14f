"""The controls beside a score, on tasks with and without held-out combinations."""

import io

from rich.console import Console

from sandbox.data.task import Question
from sandbox.evals.controls import Blind, Results, scores, table
from sandbox.evals.run import Record

WHICH = Question("Which color?", "red", "color", ("red", "blue"))
COUNT = Question("How many?", "2", "count")


def record(question: Question, correct: bool) -> Record:
    return Record("test", 0, "content", 0, question, correct)


def results(*, heldout: bool, present: bool = True) -> Results:
    which = WHICH if present else Question(WHICH.text, WHICH.answer, WHICH.kind)
    own = [record(which, True), record(COUNT, True), record(which, False)]
    beyond = [record(which, False), record(COUNT, True)] if heldout else []
    return Results(own, beyond, [record(which, False), record(COUNT, True), record(which, False)])


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
