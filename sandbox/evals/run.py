"""A model against a task: what it answers, and what it still answers without the right picture."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from sandbox.data.batch import Batch, collate
from sandbox.data.prompt import Prompt, Turn, context
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError
from sandbox.evals.metrics import wilson_interval
from sandbox.evals.processes import Processes
from sandbox.generate import inference
from sandbox.model import VisionLanguageModel

Images = Literal["own", "shuffled", "reordered", "none"]

ALONE = Processes()


@dataclass(frozen=True)
class Record:
    """One question put to a model.

    Attributes:
        split, index, content: the sample that the question belongs to, and the hash of what it
            shows.
        shown: index of the sample whose images the model saw; another one in the blind control,
            its own where it saw none.
        question: its text, its type and the true answer.
        correct: whether greedy decoding gives exactly this answer.
        reply: the model's own words, where they were generated (see ``with_replies``).
        images: how ``evaluate`` chose what the model saw.
    """

    split: Split
    index: int
    content: str
    shown: int
    question: Question
    correct: bool
    reply: str | None = None
    images: Images = "own"


@dataclass(frozen=True)
class Score:
    """A share of right answers with its 95% Wilson interval.

    The interval takes questions as independent. Several share an image, so it is a little narrow.
    """

    accuracy: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, correct: Sequence[bool]) -> "Score":
        """The score of at least one answer."""
        right, n = sum(correct), len(correct)
        return cls(right / n, *wilson_interval(right, n), n)


@dataclass(frozen=True)
class Summary:
    """Scores of many records: of all questions, of each type, and the types' plain mean."""

    overall: Score
    by_kind: dict[str, Score]
    macro: float


def evaluate(
    model: VisionLanguageModel,
    task: Task,
    split: Split,
    samples: int,
    *,
    batch_size: int = 32,
    images: Images = "own",
    processes: Processes = ALONE,
) -> list[Record]:
    """Ask every question about the first ``samples`` samples of a split.

    No text is generated. An answer is spelled out by greedy decoding if and only if each of its
    tokens, the end of turn included, is the likeliest after the true ones before it. So one forward
    pass scores all questions of an image, which share its tokens. (Stricter than comparing strings
    in one respect: the same text in other tokens counts as wrong.)

    With ``images="shuffled"`` the questions are asked about the images of another sample, the blind
    control: what a model still gets right, it did not see. Every sample's images are shown once,
    and never to a sample of the same content.

    With ``images="reordered"`` they are asked about the sample's own images in another order, while
    times and labels stay where they were: what a model still gets right, it did not read off the
    order of frames, or off which picture is called what. Samples of one image are left out.

    With ``images="none"`` they are asked about nothing, as text alone, without times, labels or the
    text that tells what the images show: what a model still gets right, it has learned to guess.
    Samples without images are left out.

    Several ``processes`` share out the batches, and each returns the records of all.

    Raises:
        UserError: the split is empty, or too small or too uniform to shuffle.
    """
    samples = _available(task, split, samples)
    shift = _shift(task, split, samples) if images == "shuffled" else 0

    def ask(start: int) -> list[Record]:
        indices = range(start, min(start + batch_size, samples))
        views = [
            (index, shown, view)
            for index in indices
            for shown in [(index + shift) % samples]
            if (view := as_shown(task, split, index, shown, images))
        ]
        if not views:
            return []
        name = f"{split} {indices.start}-{indices.stop - 1}"
        batch = _batch(model, (view for *_, view in views), name=name)
        correct = iter(batch.answered(model(batch).correct).tolist())
        return [
            Record(split, index, view.content, shown, question, next(correct), images=images)
            for index, shown, view in views
            for question in view.questions
        ]

    with inference(model):
        batches = processes.each(range(0, samples, batch_size), ask)
    return [record for batch in batches for record in batch]


def with_replies(
    model: VisionLanguageModel,
    task: Task,
    records: Iterable[Record],
    *,
    batch_size: int = 64,
    max_tokens: int = 16,
    processes: Processes = ALONE,
) -> list[Record]:
    """The records with the model's greedy replies; a right one is the answer, and not generated.

    Several ``processes``, which must hold the same records, share out those to generate.
    """
    records = list(records)
    replies = {n: record.question.answer for n, record in enumerate(records) if record.correct}
    missing = [n for n in range(len(records)) if n not in replies]

    def generate(start: int) -> list[str]:
        prompts = [_prompt(task, records[n]) for n in missing[start : start + batch_size]]
        return model.generate(prompts, max_tokens=max_tokens)

    batches = processes.each(range(0, len(missing), batch_size), generate)
    replies.update(zip(missing, (reply for batch in batches for reply in batch), strict=True))
    return [replace(record, reply=replies[n]) for n, record in enumerate(records)]


def expert_load(
    model: VisionLanguageModel, task: Task, split: Split, samples: int
) -> dict[int, dict[str, list[float]]]:
    """How the routers of each mixture layer share out ``image`` and ``text`` tokens.

    The first ``samples`` samples of the split, or all that it has, are read as one batch.

    Returns:
        By layer and modality: the share of visits that each expert gets; they sum to 1. A modality
        without tokens is absent.

    Raises:
        UserError: the split is empty.
    """
    indices = range(_available(task, split, samples))
    with inference(model):
        batch = _batch(model, [task.sample(split, index) for index in indices], name=split)
        patches = batch.patches.flatten()
        if batch.places.real is not None:
            patches = patches[batch.places.real]
        masks = {"image": patches.float(), "text": (~patches).float()}
        return {
            routing.layer: {
                name: (load / load.sum()).tolist()
                for name, mask in masks.items()
                if (load := routing.load(mask)).sum() > 0
            }
            for routing in model(batch).routing
        }


def summarize(records: Sequence[Record]) -> Summary:
    """Scores overall and by question type, types in alphabetical order.

    Raises:
        ValueError: there is no record.
    """
    if not records:
        raise ValueError("there is no record to summarize")
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    for record in records:
        kinds[record.question.kind].append(record.correct)
    by_kind = {kind: Score.of(kinds[kind]) for kind in sorted(kinds)}
    return Summary(
        overall=Score.of([record.correct for record in records]),
        by_kind=by_kind,
        macro=fmean(score.accuracy for score in by_kind.values()),
    )


def write_predictions(path: Path, records: Iterable[Record]) -> None:
    """Write one JSON object a line; a question's fields stand beside the record's."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            fields = asdict(record)
            question = fields.pop("question")
            question["question"] = question.pop("text")
            for known in ("answers", "id", "choices"):  # to benchmarks alone
                if not question[known]:
                    del question[known]
            file.write(json.dumps(fields | question, ensure_ascii=False) + "\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _available(task: Task, split: Split, samples: int) -> int:
    """As many samples as asked for, or as the split has.

    Raises:
        UserError: it has none.
    """
    size = task.size(split)
    samples = samples if size is None else min(samples, size)
    if samples < 1:
        raise UserError(f"the split '{split}' has no sample to evaluate on")
    return samples


def _batch(model: VisionLanguageModel, samples: Iterable[Sample], *, name: str) -> Batch:
    examples = [model.prompts.encode_sample(sample) for sample in samples]
    return collate(examples, name=name).to(model.backbone.embed.weight.device)


def as_shown(task: Task, split: Split, index: int, shown: int, images: Images) -> Sample | None:
    """The sample at ``index`` with the images that the model gets to see; None where it has none.

    Labels stay with the question, which may name them, unless the numbers of images differ.
    """
    sample = task.sample(split, index)
    if images == "own":
        return sample
    if images == "reordered":
        order = reorder(len(sample.images), sample.content)
        if order is None:
            return None
        return replace(sample, images=tuple(sample.images[place] for place in order))
    if images == "none":
        # Its text would take the place of the images, and tell what they show.
        unseen = replace(sample, images=(), times=None, labels=None, text=None)
        return unseen if sample.images else None
    other = task.sample(split, shown)
    alike = len(sample.images) == len(other.images)
    labels = sample.labels if alike else other.labels
    return replace(other, questions=sample.questions, content=sample.content, labels=labels)


def reorder(count: int, content: str) -> list[int] | None:
    """Another order of ``count`` images, always the same for the same content; None for one image.

    No image keeps its place and, where there is another way, the order is neither turned around as
    a whole nor only begun elsewhere: motion would be the opposite, or nearly the same.

    >>> reorder(2, "ab12"), reorder(5, "ab12"), reorder(1, "ab12")
    ([1, 0], [3, 0, 1, 4, 2], None)
    """
    if count < 2:
        return None
    places = list(range(count))
    rolled = [places[n:] + places[:n] for n in range(count)]
    told = [places[::-1], *rolled] if count > 3 else []
    order, rng = places.copy(), random.Random(content)
    while order in told or any(place == old for place, old in enumerate(order)):
        rng.shuffle(order)
    return order


def _shift(task: Task, split: Split, samples: int) -> int:
    shift = exchange([task.sample(split, index).content for index in range(samples)])
    if shift is not None:
        return shift
    raise UserError(
        f"the images of {samples} samples of the split '{split}' cannot be shuffled so that each "
        "shows something else: evaluate more samples"
    )


def exchange(contents: Sequence[str]) -> int | None:
    """The least distance by which rolling the images gives each sample one of another content.

    None where no distance does.
    """
    for shift in range(1, len(contents)):
        rolled = [*contents[shift:], *contents[:shift]]
        if all(own != other for own, other in zip(contents, rolled, strict=True)):
            return shift
    return None


def _prompt(task: Task, record: Record) -> Prompt:
    view = as_shown(task, record.split, record.index, record.shown, record.images)
    assert view is not None  # the record is of it
    return Prompt([Turn("user", [*context(view), record.question.text])])
