"""Several tasks as one, by weight: real charts with generated ones among them, for example."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, inf, lcm

import numpy as np

from sandbox.data.generated import check_names, fingerprint
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

LONGEST = 100_000  # samples after which the proportions must come out exactly


class Mixture(Task):
    """Trains on samples of several tasks, and is evaluated on one of them.

    Whose turn it is depends on the index alone: always the task that is furthest behind its share.
    So every prefix of the stream keeps the proportions (no task is ever a whole sample ahead of
    its share), and after some samples all is repeated. With weights 3 for ``a`` and 1 for ``b``::

        index   0   1   2   3   4   5   6   7
        sample  a0  a1  b0  a2  a3  a4  b1  a5

    A task without end is gone through in its own order; of a finite one, each pass shows every
    sample once, in a new order. Nothing is drawn by chance, so a run that is resumed, or spread
    over processes, sees the same samples.

    The mixture's own train split has no end. Its val, test and heldout splits are those of one
    task: figures over several kinds of questions would mix what is compared elsewhere.

    Args:
        tasks: by name, so that one value of one task can be changed on the command line.
        weights: of every task by its name, in any proportion; with 0, a task is not trained on.
        evaluate_on: name of the task that val, test and heldout are of.
        seed: of the orders in which finite tasks are gone through.

    Raises:
        UserError: a task or weight is missing, a weight is negative or all are 0, the proportions
            are too fine, or a task that is to be trained on has no train split.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        weights: dict[str, float],
        evaluate_on: str,
        seed: int = 0,
    ) -> None:
        if not tasks or tasks.keys() != weights.keys():
            raise UserError(
                f"mixture: needs tasks and a weight for each, got tasks {', '.join(tasks) or '-'} "
                f"and weights for {', '.join(weights) or '-'}"
            )
        check_names("task of the mixture", [evaluate_on], tuple(tasks))
        # A saved configuration may list them in another order, and must mean the same.
        self.names = sorted(tasks)
        self.tasks = [tasks[name] for name in self.names]
        self.parts = _parts({name: weights[name] for name in self.names})
        self.turns, self.before = _turns(self.parts)
        self.evaluated = tasks[evaluate_on]
        self.evaluate_on = evaluate_on
        self.seed = seed
        self._sizes = [task.size("train") for task in self.tasks]
        for name, size, part in zip(self.names, self._sizes, self.parts, strict=True):
            if part and size == 0:
                raise UserError(
                    f"mixture: {name} ({type(tasks[name]).__name__}) has no train split: give its "
                    f"train files, or set its weight to 0"
                )

    def size(self, split: Split) -> int | None:
        """None for ``train``, which has no end; else as many as the evaluated task has."""
        return None if split == "train" else self.evaluated.size(split)

    def sample(self, split: Split, index: int) -> Sample:
        """The sample at ``index`` of the mixed stream, or of the evaluated task's split.

        Raises:
            IndexError: index is negative, or not below a finite size.
        """
        if split != "train":
            return self.evaluated.sample(split, index)
        number, place = self._place(index)
        return self.tasks[number].sample(split, place)

    def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
        """The questions of that sample.

        Raises:
            IndexError: index is negative, or not below a finite size.
        """
        if split != "train":
            return self.evaluated.questions_of(split, index)
        number, place = self._place(index)
        return self.tasks[number].questions_of(split, place)

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the task whose turn it is, and the index of its sample."""
        if index < 0:
            raise IndexError(f"a sample's index is 0 or more, got {index}")
        rounds, turn = divmod(index, len(self.turns))
        number = self.turns[turn]
        shown = rounds * self.parts[number] + self.before[turn]  # samples of this task so far
        size = self._sizes[number]
        if size is None:
            return number, shown
        epoch, offset = divmod(shown, size)
        return number, int(_order(self.seed, number, epoch, size)[offset])

    def identity(self) -> str:
        """A short hash of the tasks, their names and proportions, and what is evaluated."""
        tasks = [(type(task).__qualname__, task.identity()) for task in self.tasks]
        return fingerprint("Mixture", self.names, tasks, self.parts, self.evaluate_on, self.seed)


def _parts(weights: Mapping[str, float]) -> list[int]:
    """The weights as the smallest whole numbers of the same proportion.

    >>> _parts({"a": 0.7, "b": 0.3}), _parts({"a": 2, "b": 4, "c": 0})
    ([7, 3], [1, 2, 0])

    Raises:
        UserError: a weight is negative or no number, all are 0, or the numbers are too large.
    """
    for name, weight in weights.items():
        if not 0 <= weight < inf:
            raise UserError(f"mixture: the weight of {name} must be 0 or more, got {weight}")
    # By its text, a float is the decimal fraction that the user wrote.
    exact = [Fraction(str(weight)) for weight in weights.values()]
    if not any(exact):
        raise UserError("mixture: at least one weight must be above 0")
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    parts = [part // gcd(*whole) for part in whole]
    if sum(parts) > LONGEST:
        raise UserError(
            f"mixture: the weights {', '.join(map(str, weights.values()))} are too fine: round "
            f"them, or give whole numbers such as 1 and 2"
        )
    return parts


def _turns(parts: Sequence[int]) -> tuple[list[int], list[int]]:
    """One round: at each turn, the number of the task, and how often it had its turn before.

    It is always the turn of the task with the largest deficit, the share that is due to it once
    the turn is over less what it got; of equals, the first. A round has as many turns as the parts
    together, and at its end every deficit is 0.

    >>> _turns([3, 1])
    ([0, 0, 1, 0], [0, 1, 0, 2])
    """
    total, had = sum(parts), [0] * len(parts)
    turns, before = [], []
    for turn in range(1, total + 1):
        deficits = [part * turn - total * got for part, got in zip(parts, had, strict=True)]
        number = deficits.index(max(deficits))
        turns.append(number)
        before.append(had[number])
        had[number] += 1
    return turns, before


@lru_cache(maxsize=8)  # each of several finite tasks reaches from one pass into the next
def _order(seed: int, number: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, number, epoch]).permutation(size)
