"""Where arms disagree: questions that most seeds of one answer rightly, of the other wrongly."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import yaml
from PIL import Image as PILImage

from sandbox.ablation.results import Arm, Reply, Results
from sandbox.data.task import Question, Task
from sandbox.errors import UserError
from sandbox.evals.paired import Key
from sandbox.evals.run import Record
from sandbox.report.gather import card
from sandbox.runs import CONFIG

LARGEST = 480  # pixels a side of a picture
SHOWN = 4  # of the questions that one of two arms does better on


@dataclass(frozen=True)
class Example:
    """A question, and what each seed of the baseline and of the arm replied.

    Attributes:
        asked: the question; its ``reply`` and ``correct`` are of one run alone.
        baseline, arm: by seed, the replies.
        gain: how much larger the arm's share of right seeds is, from -1 to 1.
        picture: what it is about; None where the task could not show it again.
    """

    asked: Reply
    baseline: Mapping[int, Reply]
    arm: Mapping[int, Reply]
    gain: float
    picture: PILImage.Image | None = None


@dataclass(frozen=True)
class Disagreements:
    """Of one arm and the baseline: how many questions each does better, and some of them."""

    better: int
    worse: int
    shown: Sequence[Example]


def disagreements(results: Results, name: str) -> Disagreements:
    """The questions about unseen pictures that an arm and the baseline disagree on.

    Question types take turns, one question a picture, the clearest first. Each has its picture, if
    the task that the run was tested on can be built and still shows the same.
    """
    arm, baseline = results.arms[name], results.arms[results.baseline]
    seeds = [seed for seed in arm.runs if seed in baseline.runs]
    ours, theirs = (_by_question(each, seeds) for each in (arm, baseline))
    found = [
        Example(next(iter(ours[key].values())), theirs[key], ours[key], gain)
        for key in ours
        if key in theirs and (gain := _gain(ours[key], theirs[key]))
    ]
    better = [example for example in found if example.gain > 0]
    worse = [example for example in found if example.gain < 0]
    chosen = [*islice(_varied(better), SHOWN), *islice(_varied(worse), SHOWN)]
    tasks = {seed: _task(arm, seed) for seed in seeds} if chosen else {}
    shown = [_with_picture(example, tasks[next(iter(example.arm))]) for example in chosen]
    return Disagreements(len(better), len(worse), shown)


def _by_question(arm: Arm, seeds: Sequence[int]) -> dict[Key, dict[int, Reply]]:
    """The replies about unseen pictures of the test split, by question and seed."""
    found: dict[Key, dict[int, Reply]] = {}
    for seed in seeds:
        for key, reply in arm.runs[seed].replies.items():
            if reply.split == "test":
                found.setdefault(key, {})[seed] = reply
    return found


def _gain(ours: Mapping[int, Reply], theirs: Mapping[int, Reply]) -> float:
    """How much more of the seeds are right, if a majority of one arm is, and of the other wrong."""
    mine, other = (sum(r.correct for r in each.values()) / len(each) for each in (ours, theirs))
    return mine - other if min(mine, other) < 0.5 < max(mine, other) else 0.0


def _varied(examples: Iterable[Example]) -> Iterator[Example]:
    """The clearest first, the question types taking turns, one a picture."""
    by_kind: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: -abs(example.gain)):  # else in their order
        by_kind.setdefault(example.asked.kind, []).append(example)
    pictures = set()
    for turn in zip_longest(*by_kind.values()):
        for example in turn:
            if example and example.asked.content not in pictures:
                pictures.add(example.asked.content)
                yield example


def _task(arm: Arm, seed: int) -> Task | None:
    """The task of a run, made from its configuration; None where that is no longer possible."""
    from jsonargparse import ArgumentError, ArgumentParser
    from lightning import LightningDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    try:
        config = yaml.safe_load((arm.runs[seed].directory / CONFIG).read_text(encoding="utf-8"))
        data: Any = parser.instantiate(parser.parse_object({"data": config["data"]})).data
    except (ArgumentError, KeyError, OSError, TypeError, UserError, ValueError):
        return None  # such as files of a benchmark that lie elsewhere by now
    task = getattr(data, "task", None)
    return task if isinstance(task, Task) else None


def _with_picture(example: Example, task: Task | None) -> Example:
    asked = example.asked
    split: Any = asked.split
    try:
        if task is None or task.sample(split, asked.index).content != asked.content:
            return example
    except (IndexError, OSError, UserError):
        return example
    question = Question(asked.question, asked.answer, asked.kind)
    record = Record(
        split, asked.index, asked.content, asked.index, question, asked.correct, asked.reply
    )
    picture = card(task, record).picture.copy()
    picture.thumbnail((LARGEST, LARGEST))  # the page holds all of them
    return Example(example.asked, example.baseline, example.arm, example.gain, picture)
