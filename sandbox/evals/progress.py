"""How far an evaluation is: a bar on a terminal, else a line now and then; on stderr."""

import sys
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between two lines, where there is no terminal


class Meter:
    """Counts samples and questions through the passes of an evaluation.

    Attributes:
        questions: so many were answered since it was made.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.questions = 0
        self._clock = clock
        self._began = self._told = clock()
        self._name, self._first, self._done, self._total = "", 0, 0, 0
        self._pass_began = self._began
        self._bar: Progress | None = None
        console = Console(file=sys.stderr)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Questions a second since it was made."""
        return self.questions / max(self.seconds, 1e-9)

    def start(self, name: str, total: int, done: int) -> None:
        """Begin a pass over ``total`` samples, of which ``done`` were done in another run."""
        self._name, self._total, self._first, self._done = name, total, done, done
        self._pass_began = self._clock()
        if self._bar:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(name, total=total, completed=done, rate="")

    def advance(self, samples: int, questions: int) -> None:
        """So many samples of the pass are done now, and so many more questions."""
        self._done, self.questions = samples, self.questions + questions
        if self._bar:
            rate = f"{self.rate:.0f} questions/s"
            self._bar.update(self._bar.task_ids[-1], completed=samples, rate=rate)
        elif self._clock() - self._told >= EVERY:
            self._told = self._clock()
            print(self.line, file=sys.stderr, flush=True)

    @property
    def line(self) -> str:
        """Where the pass is, and how long the rest of it may take."""
        spent = self._clock() - self._pass_began
        each = spent / max(1, self._done - self._first)
        left = round(each * (self._total - self._done))
        return (
            f"{self._name}: {self._done:,} of {self._total:,} samples, {self.rate:.0f} questions/s,"
            f" about {left // 60} min {left % 60} s left"
        )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
