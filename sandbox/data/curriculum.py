"""A curriculum: training starts on an easy form of the task and moves on once it is mastered."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sandbox.data.generated import check_names, fingerprint
from sandbox.data.task import Task
from sandbox.errors import UserError

SHOWN = 256  # training samples that are searched for their question types


@dataclass(frozen=True)
class Curriculum:
    """One argument of the task takes its values in order, each until it is mastered.

    Attributes:
        field: name of the argument; that of a task inside another one with dots
            (``task.most_items``).
        values: what the argument is, stage by stage. The last one is the task's own.
        at: training accuracy, from 0 to 1, at which the next stage is due.
        window: batches that the accuracy is taken over, always of one stage.
        ahead: batches from that decision to the first batch of the next stage. The batches between
            were drawn before it was known: one by the Trainer, and some by every worker.
        leave_out: question types that do not count in the accuracy.

    Raises:
        UserError: fewer than two values, or a number out of range.
    """

    field: str
    values: list[Any]
    at: float = 0.7
    window: int = 10
    ahead: int = 8
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise UserError(f"curriculum.values: needs at least two, got {self.values}")
        if not 0 < self.at <= 1:
            raise UserError(f"curriculum.at: must be above 0 and at most 1, got {self.at}")
        if self.window < 1:
            raise UserError(f"curriculum.window: must be at least 1, got {self.window}")
        if self.ahead < 2:
            raise UserError(f"curriculum.ahead: must be at least 2, got {self.ahead}")

    def identity(self) -> str:
        """A short hash of every attribute."""
        return fingerprint("Curriculum", *sorted(asdict(self).items()))

    def tasks(self, task: Task) -> tuple[Task, ...]:
        """The task of every stage; the last is ``task`` itself, which is evaluated.

        Raises:
            UserError: no such field, a value that the task refuses, a last value that is not the
                task's own, values that give the train split different sizes, or a question type
                to leave out that the first samples do not ask, or every one that they ask.
        """
        stages = [_changed(task, self.field, value, self.field) for value in self.values]
        if stages[-1].identity() != task.identity():
            raise UserError(
                f"curriculum.values: the last must be the task's own {self.field}, because the "
                f"task as it is configured is evaluated; got {self.values[-1]!r}"
            )
        sizes = [stage.size("train") for stage in stages]
        if len(set(sizes)) > 1:
            raise UserError(
                f"curriculum.values: must leave the size of the train split as it is, got {sizes}"
            )
        if self.leave_out:
            shown = range(SHOWN if sizes[0] is None else min(SHOWN, sizes[0]))
            kinds = {q.kind for index in shown for q in task.questions_of("train", index)}
            check_names("curriculum.leave_out", self.leave_out, sorted(kinds))
            if kinds <= set(self.leave_out):
                raise UserError(
                    "curriculum.leave_out: names every question type, so that no accuracy is left "
                    f"to move on by (types: {', '.join(sorted(kinds))})"
                )
        return (*stages[:-1], task)

    def prefetch(self, workers: int) -> int | None:
        """Batches that each worker may prepare in advance; None where there are no workers.

        Raises:
            UserError: one a worker is too many.
        """
        if not workers:
            return None
        # While one batch is trained on, the Trainer holds the next one.
        most = (self.ahead - 2) // workers
        if not most:
            raise UserError(
                f"curriculum.ahead: {workers} workers need {workers + 2} or more, got {self.ahead}"
            )
        return min(2, most)


def _changed(task: Task, field: str, value: Any, whole: str) -> Task:
    """The task with another value of an argument."""
    name, _, inner = field.partition(".")
    given = dict(task.init_args)
    try:
        check_names(f"argument of {type(task).__name__}", [name], tuple(given))
    except UserError as error:
        raise UserError(f"curriculum.field: {whole}: {error}") from None
    if not inner:
        given[name] = value
    elif isinstance(given[name], dict):  # tasks by name, as those of a mixture
        key, _, inner = inner.partition(".")
        if not isinstance(given[name].get(key), Task) or not inner:
            raise UserError(
                f"curriculum.field: {whole}: write one of {', '.join(given[name])} after "
                f"'{name}', and after it an argument"
            )
        given[name] = given[name] | {key: _changed(given[name][key], inner, value, whole)}
    elif isinstance(given[name], Task):
        given[name] = _changed(given[name], inner, value, whole)
    else:
        raise UserError(f"curriculum.field: {whole}: '{name}' is not a task")
    try:
        return type(task)(**given)
    except (TypeError, ValueError) as error:
        text = str(error)
        if text.startswith("curriculum."):
            raise
        raise UserError(
            f"curriculum.values: {type(task).__name__} refuses {whole}={value!r}: {text}"
        ) from None


class Switch(NamedTuple):
    """A stage, and the place in the training stream from which on it is drawn."""

    place: int
    stage: int


class Mastery:
    """Which stage each place of the training stream has, decided from the answers so far.

    Answers of a batch count once the batch has been trained on. A checkpoint that is written during
    an update therefore lacks those of its batch, which is trained on again.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self.switches = [Switch(place=0, stage=0)]
        self._latest: tuple[int, Tensor, int] | None = None  # a batch's number and its counts
        self._right: Tensor | int = 0  # of the window, on this rank
        self._answers = 0
        self._batches = 0

    def stage_at(self, place: int) -> int:
        """The stage of a place in the training stream; final once the place has been drawn."""
        found = bisect_right(self.switches, place, key=lambda switch: switch.place)
        return self.switches[found - 1].stage

    def watches(self, place: int) -> bool:
        """Whether the answers of a batch at this place count: its stage is the latest, not last."""
        latest = self.switches[-1]
        return place >= latest.place and latest.stage < len(self.curriculum.values) - 1

    def note(self, batch: int, kinds: Sequence[str], right: Tensor) -> None:
        """Take the answers of a batch of this rank, without waiting for the device.

        Args:
            batch: number of the batch.
            kinds: the question type of each answer.
            right: bool ``[len(kinds)]``.
        """
        counted = [kind not in self.curriculum.leave_out for kind in kinds]
        if not all(counted):
            right = right & torch.tensor(counted).to(right.device, non_blocking=True)
        self._latest = batch, right.sum(), sum(counted)

    def settle(self, batches: int) -> bool:
        """Count the answers noted last, if their batch is among the ``batches`` trained on.

        Returns:
            Whether the window has all of its batches.
        """
        if self._latest is not None and self._latest[0] < batches:
            self._right = self._right + self._latest[1]
            self._answers += self._latest[2]
            self._batches += 1
            self._latest = None
        return self._batches >= self.curriculum.window

    def counts(self) -> tuple[int, int]:
        """Right answers and all answers of the window on this rank; waits for the device."""
        return int(self._right), self._answers

    def decide(self, right: int, answers: int, place: int) -> None:
        """End the window; if its accuracy suffices, the next stage begins at ``place``.

        Args:
            right: right answers of the window, of all ranks.
            answers: answers of the window, of all ranks.
            place: a place that has not been drawn yet.
        """
        if answers and right / answers >= self.curriculum.at:
            self.switches.append(Switch(place, self.switches[-1].stage + 1))
        self._right = self._answers = self._batches = 0

    def state(self, right: int, answers: int) -> dict[str, Any]:
        """What a checkpoint holds; the counts are those of all ranks."""
        return {
            "switches": [list(switch) for switch in self.switches],
            "right": right,
            "answers": answers,
            "batches": self._batches,
        }

    def load(self, state: dict[str, Any], *, first: bool) -> None:
        """Go on from a checkpoint; the ``first`` rank takes the counts of all ranks."""
        last = len(self.curriculum.values) - 1
        self.switches = [Switch(place, min(stage, last)) for place, stage in state["switches"]]
        self._right, self._answers = (state["right"], state["answers"]) if first else (0, 0)
        self._batches = state["batches"]
        self._latest = None
