"""What a score is worth: the same questions with the wrong picture, with none, and out of reach."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table

from sandbox.data.task import Question, Split, Task
from sandbox.errors import UserError
from sandbox.evals.metrics import (
    guess_among_present,
    majority_baseline,
    majority_baseline_by_kind,
)
from sandbox.evals.processes import Processes
from sandbox.evals.run import (
    ALONE,
    Images,
    Record,
    Score,
    Summary,
    evaluate,
    expert_load,
    summarize,
    with_replies,
    write_json,
    write_predictions,
)
from sandbox.model import VisionLanguageModel

SUMMARY = "summary.json"
PREDICTIONS = "predictions.jsonl"
LEARNED = 10_000  # training samples that a majority is taken of, where there is no end of them
SHARED = 64  # training samples whose questions a process lists at a time
ROUTED = 32  # test samples that the experts' load is counted over, in one batch


@dataclass(frozen=True)
class Blind:
    """What is right without seeing.

    Attributes:
        majority, majority_by_kind: the commonest answer of the training questions, by wording;
            None, and none for any question type, where there was nothing to train on.
        guess_among_present: a guess among what the picture holds; None where no question tells.
    """

    majority: float | None
    majority_by_kind: dict[str, float]
    guess_among_present: float | None

    @classmethod
    def of(cls, learned: Iterable[Question], asked: list[Question]) -> "Blind":
        """The baselines on the questions ``asked``, after training on those ``learned``."""
        learned = list(learned)
        return cls(
            majority_baseline(learned, asked) if learned else None,
            majority_baseline_by_kind(learned, asked) if learned else {},
            guess_among_present(asked) if any(question.present for question in asked) else None,
        )


@dataclass(frozen=True)
class Results:
    """Every question and its answer: on unseen pictures, on held-out combinations, shuffled.

    ``reordered``: about the same frames, or labelled pictures, in another order; else empty.
    ``no_image``: about no picture at all; empty where there was none to begin with.
    """

    own: list[Record]
    heldout: list[Record]
    shuffled: list[Record]
    reordered: list[Record] = field(default_factory=list)
    no_image: list[Record] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: VisionLanguageModel,
        task: Task,
        samples: int,
        processes: Processes = ALONE,
    ) -> "Results":
        """Ask about ``samples`` pictures of the test split, their own, each other's and none.

        Held-out combinations are asked about too, where the task offers them, and frames or
        labelled pictures in another order, where a sample has several. Several ``processes`` share
        the work, and each gets all results.
        """
        offers = task.size("heldout") != 0
        first = task.sample("test", 0)
        ordered = (first.times or first.labels) and len(first.images) > 1

        def asked(split: Split, images: Images = "own") -> list[Record]:
            return evaluate(model, task, split, samples, images=images, processes=processes)

        def replied(split: Split) -> list[Record]:
            return with_replies(model, task, asked(split), processes=processes)

        return cls(
            own=replied("test"),
            heldout=replied("heldout") if offers else [],
            shuffled=asked("test", "shuffled"),
            reordered=asked("test", "reordered") if ordered else [],
            no_image=asked("test", "none"),
        )

    @property
    def combinations(self) -> list[Record]:
        """The held-out records that ask what belongs together; a count is the same for any."""
        return [record for record in self.heldout if record.question.present]

    @property
    def asked(self) -> list[Question]:
        """The questions about unseen pictures."""
        return [record.question for record in self.own]

    @property
    def summaries(self) -> tuple[Summary, Summary | None, Summary]:
        """Scores of ``own``, ``heldout`` (overall: ``combinations`` alone) and ``shuffled``."""
        heldout = None
        if self.combinations:
            overall = Score.of([record.correct for record in self.combinations])
            heldout = replace(summarize(self.heldout), overall=overall)
        return summarize(self.own), heldout, summarize(self.shuffled)

    @property
    def records(self) -> list[Record]:
        """All of them."""
        return self.own + self.heldout + self.shuffled + self.reordered + self.no_image


def scores(results: Results, blind: Blind) -> dict[str, Any]:
    """Accuracies, their 95% intervals and the controls as plain values, by question type too.

    What is about the order of images stands there only where the images have one, and what is about
    their absence only where there are images.
    """
    own, heldout, shuffled = results.summaries

    def bounds(score: Score) -> list[float]:
        return [score.low, score.high]

    intervals = {
        "accuracy": bounds(own.overall),
        "shuffled_image_accuracy": bounds(shuffled.overall),
    }
    if heldout:
        intervals["heldout_combination_accuracy"] = bounds(heldout.overall)
    summary: dict[str, Any] = {
        "accuracy": own.overall.accuracy,
        "heldout_combination_accuracy": heldout and heldout.overall.accuracy,
        "shuffled_image_accuracy": shuffled.overall.accuracy,
        "blind_majority_accuracy": blind.majority,
        "guess_among_present_accuracy": blind.guess_among_present,
        "macro_accuracy": own.macro,
        "intervals": intervals,
        "by_question": {
            kind: {
                "accuracy": score.accuracy,
                "interval": bounds(score),
                "heldout": heldout.by_kind[kind].accuracy
                if heldout and kind in heldout.by_kind
                else None,
                "shuffled": shuffled.by_kind[kind].accuracy,
                "majority": blind.majority_by_kind.get(kind),
                "n": score.n,
            }
            for kind, score in own.by_kind.items()
        },
        "questions": own.overall.n,
    }
    further = (
        ("reordered_image_accuracy", "reordered", results.reordered),
        ("no_image_accuracy", "no_image", results.no_image),
    )
    for key, column, records in further:
        if records:
            control = summarize(records)
            summary[key] = control.overall.accuracy
            intervals[key] = bounds(control.overall)
            for kind, score in control.by_kind.items():
                summary["by_question"][kind][column] = score.accuracy
    return summary


def inside(model: VisionLanguageModel, task: Task, samples: int = ROUTED) -> dict[str, Any]:
    """What training made of the parts between the modalities, as plain values.

    ``gates``: by layer, how far its adapter is open (``CrossAttention.gates``); ``expert_load``: by
    mixture layer and modality, the shares of the experts over the first ``samples`` test samples.
    What the model has no part for is absent.
    """
    found = {
        "gates": getattr(model.fusion, "gates", {}),
        "expert_load": expert_load(model, task, "test", samples),
    }
    return {name: figures for name, figures in found.items() if figures}


class Controls(Callback):
    """After ``sandbox test``: the score beside its controls, printed and stored with the run.

    Writes ``summary.json`` and ``predictions.jsonl`` into the run directory.

    Args:
        samples: test samples to ask about; None = as many as the data module tests on.
    """

    def __init__(self, samples: int | None = None) -> None:
        self.samples = samples

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate on all processes, which share the questions; the first one writes."""
        driven: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise UserError("Controls needs a data module: it asks its task")
        task: Task = data.task
        processes = Processes(trainer.global_rank, trainer.world_size)
        samples = self.samples or data.size("test")
        with trainer.precision_plugin.forward_context():
            results = Results.of(driven.model, task, samples, processes)
            learned = _learned(task, processes)
            if not trainer.is_global_zero:
                return
            summary = scores(results, Blind.of(learned, results.asked))
            summary |= {"inside": inside(driven.model, task)}
        out = Path(trainer.default_root_dir)
        write_predictions(out / PREDICTIONS, results.records)
        write_json(out / SUMMARY, summary)
        Console(file=sys.stdout).print(table(summary))


def _learned(task: Task, processes: Processes) -> list[Question]:
    """The questions of the training split, or of its first samples where there is no end of them.

    A large split takes minutes, so ``processes`` share it out; each gets all questions.
    """
    size = task.size("train")
    count = LEARNED if size is None else size

    def questions(start: int) -> list[Question]:
        indices = range(start, min(start + SHARED, count))
        return [question for index in indices for question in task.questions_of("train", index)]

    parts = processes.each(range(0, count, SHARED), questions)
    return [question for part in parts for question in part]


def table(summary: dict[str, Any]) -> Table:
    """The output of ``scores`` for people: a row for each question type, a column a control."""
    overall = {
        "accuracy": "accuracy",
        "heldout": "heldout_combination_accuracy",
        "shuffled": "shuffled_image_accuracy",
        "no_image": "no_image_accuracy",
        "reordered": "reordered_image_accuracy",
        "majority": "blind_majority_accuracy",
    }
    overall = {column: key for column, key in overall.items() if key in summary}
    headers = ("questions", *(column.replace("_", " ") for column in overall), "n")
    drawn = Table(*headers, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # all of it on 80 columns

    def row(name: str, values: Iterable[float | None], n: int) -> None:
        drawn.add_row(name, *("-" if v is None else f"{v:.3f}" for v in values), f"{n:,}")

    for kind, found in summary["by_question"].items():
        row(kind, (found.get(column) for column in overall), found["n"])
    drawn.add_section()
    row("all", (summary[key] for key in overall.values()), summary["questions"])
    return drawn
