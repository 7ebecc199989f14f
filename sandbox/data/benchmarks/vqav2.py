"""VQAv2, from its official question and annotation files and COCO's images."""

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from sys import intern
from typing import Any

from sandbox.data.benchmarks.base import Benchmark, chosen, folder_at
from sandbox.data.benchmarks.image_files import items_of
from sandbox.data.benchmarks.records import (
    UNTYPED,
    Entry,
    RecordError,
    answer_of,
    fields,
    listed,
    numbered,
    read_entries,
    read_json,
    read_list,
    text,
    whole,
)
from sandbox.data.task import Question, Split
from sandbox.errors import UserError

SUBTYPES: dict[Split, tuple[str, ...]] = {
    "train": ("train2014",),
    "val": ("val2014",),
    "test": ("test2015", "test-dev2015"),
}
PEOPLE = 10  # who answered each question


class VQAv2(Benchmark):
    """VQA 2.0 (Goyal et al. 2017): questions about COCO's photographs, each answered by ten people.

    Files, for a subtype such as ``val2014``: ``v2_OpenEnded_mscoco_val2014_questions.json``,
    ``v2_mscoco_val2014_annotations.json`` and ``val2014/COCO_val2014_000000000042.jpg``. They lie
    in ``root``, or, as the official tools expect them, in its folders ``Questions``,
    ``Annotations`` and ``Images/mscoco``. Question types are the annotations' ``answer_type``:
    ``yes/no``, ``number``, ``other``.

    To train on is ``multiple_choice_answer``; a question's ``answers`` are those of the ten people
    in the order of their ``answer_id``. ``test`` is ``test2015`` or else ``test-dev2015``: nobody
    but the evaluation server has its answers, so it can be predicted on only.

    Args:
        root: the folder that holds all of it. Not all splits need to be there.
        images: the folder that holds ``train2014`` and so on; None = see above.
        splits: read only these (each takes seconds); None = all that are there.
        limit: the first so many images of each split; None = all.
        skip_missing: leave out images that are not there, with a warning.

    Raises:
        UserError: a file is damaged, does not follow the layout or names images that are not there;
            questions and annotations do not match; or a split is asked for that is not there.
    """

    def __init__(
        self,
        root: str,
        images: str | None = None,
        splits: list[Split] | None = None,
        limit: int | None = None,
        skip_missing: bool = False,
    ) -> None:
        folder = folder_at(root)
        where = f"VQAv2 in {root}"
        there = {
            split: (subtype, path)
            for split, subtypes in SUBTYPES.items()
            for subtype in reversed(subtypes)
            if (path := _questions_of(folder, subtype)).is_file()
        }
        items = {}
        photos = folder / "Images" / "mscoco"
        if images is not None or not photos.is_dir():
            photos = folder_at(images or root)
        expected = f"{_questions_of(folder, 'val2014').name} or the like"
        for split, (subtype, path) in chosen(where, there, splits, expected).items():
            with _many_objects():
                annotations = None if split == "test" else _annotations(folder, subtype)
                entries = _entries(path, split, annotations)
            del annotations  # a gigabyte, in the largest split
            items[split] = items_of(f"{where}, {split}", photos, entries, limit, skip_missing)
        super().__init__(where, items)


def _questions_of(folder: Path, subtype: str) -> Path:
    return _either(folder, "Questions", f"v2_OpenEnded_mscoco_{subtype}_questions.json")


def _either(folder: Path, official: str, name: str) -> Path:
    """A file in the folder, or in the one that the official tools look into."""
    below = folder / official / name
    return below if below.is_file() else folder / name


def _entries(
    path: Path, split: Split, annotations: Mapping[int, Mapping[str, Any]] | None
) -> list[Entry]:
    """The questions of one subtype, joined with their annotations by ``question_id``."""
    whole_file = read_json(path)
    questions = listed(path, whole_file, "questions")
    subtype = whole_file.get("data_subtype")
    if not isinstance(subtype, str) or not re.fullmatch(r"[a-z]+(-dev)?[0-9]{4}", subtype):
        raise UserError(
            f"{path}: 'data_subtype' must be one such as 'val2014', got {subtype!r:.80}"
        )
    photos = subtype.replace("-dev", "")  # the test-dev questions are about photos of the test set

    def parse(content: Any) -> Entry:
        record = fields(content)
        name, image = whole(record, "question_id"), whole(record, "image_id")
        answer, kind, answers = "", UNTYPED, tuple[str, ...]()
        if annotations is not None:
            try:
                answer, kind, answers = _annotated(annotations.get(name), image)
            except RecordError as error:
                raise RecordError(f"the annotation of question_id {name}: {error}") from None
        file = f"{photos}/COCO_{photos}_{image:012d}.jpg"
        asked = text(record, "question")
        return Entry((file,), Question(asked, answer, kind, answers=answers, id=str(name)))

    return read_entries(str(path), split, numbered(path, questions), parse)


def _annotations(folder: Path, subtype: str) -> dict[int, Mapping[str, Any]]:
    """The annotations of a subtype by their question.

    Raises:
        UserError: two are of one question, or one is of none.
    """
    path = _either(folder, "Annotations", f"v2_mscoco_{subtype}_annotations.json")
    found: dict[int, Mapping[str, Any]] = {}
    first, faulty, records = "", 0, read_list(path, "annotations")
    for number, content in enumerate(records):
        try:
            record = fields(content)
            name = whole(record, "question_id")
            if found.setdefault(name, record) is not record:
                raise RecordError(f"question_id {name} is annotated already")
        except RecordError as fault:
            first, faulty = first or f"record {number}: {fault}", faulty + 1
    if faulty:
        raise UserError(f"{path}, {first} ({faulty} of {len(records)} records are faulty)")
    return found


def _annotated(
    annotation: Mapping[str, Any] | None, image: int
) -> tuple[str, str, tuple[str, ...]]:
    """The answer to train on, its type, and what the ten people said by their ``answer_id``.

    Raises:
        RecordError: there is no annotation, it is of another image, or the ten are not told apart.
    """
    if annotation is None:
        raise RecordError("there is none")
    if annotation.get("image_id") != image:
        told = annotation.get("image_id")
        raise RecordError(f"is about image {told!r:.80}, the question about {image}")
    common, given = annotation.get("multiple_choice_answer"), annotation.get("answers")
    if not isinstance(common, str):
        raise RecordError(f"'multiple_choice_answer' must be a text, got {common!r:.80}")
    if not isinstance(given, list) or len(given) != PEOPLE:
        raise RecordError(f"'answers' must be a list of {PEOPLE}, got {given!r:.80}")
    try:
        by_person = {each["answer_id"]: intern(each["answer"]) for each in given}
    except (TypeError, KeyError):
        raise RecordError(f"'answers' must hold answer and answer_id, got {given!r:.80}") from None
    if len(by_person) < PEOPLE or not all(type(person) is int for person in by_person):
        raise RecordError(f"'answers' must have {PEOPLE} different numbers as answer_id")
    answers = tuple(by_person[person] for person in sorted(by_person))
    return intern(answer_of(answers, common)), intern(text(annotation, "answer_type")), answers


@contextmanager
def _many_objects() -> Iterator[None]:
    """Make millions of objects, none of which is garbage: to look for it takes 3 s of 10."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
