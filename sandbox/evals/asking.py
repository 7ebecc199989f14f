"""A task's questions through a model: read ahead, answered group by group, judged and kept."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fusion.layout import IMAGE
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.evals.answering import Ask, Prefix, answer, groups
from sandbox.evals.judging import Judge
from sandbox.evals.predictions import Prediction, PredictionFile
from sandbox.evals.progress import Meter
from sandbox.evals.run import Images, as_shown
from sandbox.model import VisionLanguageModel

PASSES: dict[Images, str] = {
    "own": "own images",
    "none": "no image",
    "shuffled": "images exchanged",
}

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class _Asked:
    """A question on its way through the model, as long as its prompt."""

    index: int
    number: int
    shown: int
    content: str
    question: Question
    ask: Ask
    prompt: str

    def __len__(self) -> int:
        return len(self.ask)


@dataclass
class Asking:
    """One evaluation's way through a task.

    Attributes:
        model, task, split: who is asked about what.
        batch_size: questions that are read and encoded ahead.
        max_tokens: of the longest reply.
        judge: what replies are worth.
        file: predictions on disk, if they are kept there.
        meter: is told how far it is.
        group: number of the next group to be computed.
        pictured: by index, the hash of what is shown in each sample that has images and questions.
            The pass over own images finds out, so that the one without need not open any.
    """

    model: VisionLanguageModel
    task: Task
    split: Split
    batch_size: int
    max_tokens: int
    judge: Judge
    file: PredictionFile | None
    meter: Meter
    group: int = 0
    pictured: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file and self.file.kept:
            self.group = self.file.kept[-1].group + 1

    def answer_all(self, images: Images, pairs: Sequence[tuple[int, int]]) -> list[Prediction]:
        """One pass: the predictions that are there already, and then all others.

        Args:
            images: what the model sees; ``none`` only after ``own``.
            pairs: each sample's index, and that of the sample whose images are shown.
        """
        found = [p for p in self.file.kept if p.images == images] if self.file else []
        place = {index: number for number, (index, _) in enumerate(pairs)}
        start = (place[found[-1].index], found[-1].number + 1) if found else (0, 0)
        self.meter.start(PASSES[images], total=len(pairs), done=start[0])
        asked = self._asked(images, pairs, *start)
        for group in groups(ahead(asked, self.batch_size), self.max_tokens):
            replies = answer(self.model, [each.ask for each in group], self.max_tokens)
            new = [
                self._judged(each, images, reply.text, reply.confidence)
                for each, reply in zip(group, replies, strict=True)
            ]
            if self.file:
                self.file.append(new)
            found += new
            self.group += 1
            self.meter.advance(place[new[-1].index] + 1, len(new))
        if images == "own":  # every fusion marks an image in the prompt, by at least this token
            self.pictured = {p.index: p.content for p in found if IMAGE in p.prompt}
        return found

    def _asked(
        self, images: Images, pairs: Sequence[tuple[int, int]], first: int, question: int
    ) -> Iterator[_Asked]:
        """The questions from one on: number ``question`` of sample ``first`` of the pairs."""
        prompts = self.model.prompts
        for place, (index, shown) in enumerate(pairs[first:], start=first):
            view = self._view(images, index, shown)
            if view is None:
                continue
            prefix = Prefix.of(prompts, view)
            for number, each in enumerate(view.questions):
                if (place, number) >= (first, question):
                    ask = Ask.of(prompts, prefix, self.judge.text(each))
                    prompt = ask.text(prompts)
                    yield _Asked(index, number, shown, view.content, each, ask, prompt)

    def _view(self, images: Images, index: int, shown: int) -> Sample | None:
        if images != "none":
            return as_shown(self.task, self.split, index, shown, images)
        return Sample((), self.task.questions_of(self.split, index), self.pictured[index])

    def _judged(self, asked: _Asked, images: Images, reply: str, confidence: float) -> Prediction:
        question = asked.question
        found, targets = self.judge.found(question, reply), self.judge.targets(question)
        return Prediction(
            id=question.id or f"{self.split}/{asked.index}/{asked.number}",
            split=self.split,
            index=asked.index,
            number=asked.number,
            content=asked.content,
            kind=question.kind,
            images=images,
            shown=asked.shown,
            question=question.text,
            choices=question.choices,
            prompt=asked.prompt,
            reply=reply,
            confidence=confidence,
            answer=found,
            targets=targets,
            score=self.judge.score(found, targets) if targets else None,
            group=self.group,
        )


def ahead(things: Iterator[Thing], size: int) -> Iterator[Thing]:
    """The same things, up to ``size`` of them made ahead by another thread."""
    made: queue.Queue[Thing | BaseException | None] = queue.Queue(size)
    enough = threading.Event()

    def hand(thing: Thing | BaseException | None) -> bool:
        while not enough.is_set():
            try:
                made.put(thing, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            if all(hand(thing) for thing in things):
                hand(None)
        except BaseException as error:  # to be raised where the things are used
            hand(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (thing := made.get()) is not None:
            if isinstance(thing, BaseException):
                raise thing
            yield thing
    finally:
        enough.set()
        thread.join()
