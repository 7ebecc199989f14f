"""What benchmarks on disk share: samples of stored images, each with all that is asked about it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from sandbox.data.benchmarks.records import Entry
from sandbox.data.media import decode_image
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

OFFICIAL: tuple[Split, ...] = ("train", "val", "test")

Found = TypeVar("Found")


class Stored(ABC):
    """An image whose bytes are on disk."""

    @property
    @abstractmethod
    def where(self) -> str:
        """What to call it in a message."""

    @abstractmethod
    def read(self) -> bytes:
        """Its bytes, not decoded.

        Raises:
            MediaError: they cannot be read.
        """

    @abstractmethod
    def told(self) -> object:
        """What tells it apart without reading it: plain values, the same on every machine."""


@dataclass(frozen=True)
class Item:
    """A sample that is still on disk."""

    images: tuple[Stored, ...]
    questions: tuple[Question, ...]


class Benchmark(Task):
    """Samples in the order in which the files name their images first.

    Nothing is decoded before a sample is asked for, and nothing is kept in memory.

    Args:
        where: what to call it in a message.
        items: of each split that is there.
    """

    def __init__(self, where: str, items: Mapping[Split, Sequence[Item]]) -> None:
        self._where = where
        self._items = items

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that are there."""
        return tuple(self._items)

    def size(self, split: Split) -> int:
        """How many samples the split holds; 0 where it is not there."""
        return len(self._items.get(split, ()))

    def sample(self, split: Split, index: int) -> Sample:
        """The images at ``index`` of ``split`` and all their questions.

        Raises:
            IndexError: the split holds fewer.
            UserError: the split is not there.
            MediaError: an image cannot be read or decoded.
        """
        item = self._item(split, index)
        content, pictures = blake2b(digest_size=8), []
        for image in item.images:
            data = image.read()
            content.update(data)
            pictures.append(decode_image(f"image {image.where}", BytesIO(data)))
        return Sample(tuple(pictures), item.questions, content.hexdigest())

    def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
        """All questions about the images at ``index`` of ``split``, which are not read.

        Raises:
            IndexError: the split holds fewer.
            UserError: the split is not there.
        """
        return self._item(split, index).questions

    def _item(self, split: Split, index: int) -> Item:
        if split in OFFICIAL:
            require(self._where, self._items, split)
        if not 0 <= index < self.size(split):
            raise IndexError(f"{self._where}, {split}: {self.size(split)} samples, and no {index}")
        return self._items[split][index]

    def identity(self) -> str:
        """A short hash of all questions, answers, ids and splits, and what tells images apart.

        Of an image file these are name and size, not its pixels: tens of thousands would have to
        be read. An image in a parquet file is told by its bytes.
        """
        return self._identity

    @cached_property
    def _identity(self) -> str:
        told = blake2b(type(self).__qualname__.encode(), digest_size=8)
        for split, items in self._items.items():
            told.update(repr((split, len(items))).encode())
            for item in items:
                images = [image.told() for image in item.images]
                asked = [tuple(vars(question).values()) for question in item.questions]
                told.update(repr((images, asked)).encode(errors="backslashreplace"))
        return told.hexdigest()


def chosen(
    where: str, there: Mapping[Split, Found], asked: Sequence[Split] | None, expected: str
) -> dict[Split, Found]:
    """Those of the splits that are there which are asked for; None asks for all.

    Args:
        where: the benchmark, for messages.
        there: what is there of each split.
        asked: splits.
        expected: what should be there.

    Raises:
        UserError: none is there, or one that is asked for is not.
    """
    if not there:
        raise UserError(f"{where}: no split is there, expected {expected}")
    for split in asked or ():
        require(where, there, split)
    return {split: found for split, found in there.items() if asked is None or split in asked}


def require(where: str, there: Collection[Split], split: Split) -> None:
    """Refuse a split that is not there.

    Raises:
        UserError: it is not; the message names those that are.
    """
    if split not in there:
        raise UserError(f"{where}: no {split} split, there is {', '.join(there)}")


def grouped(entries: Iterable[Entry]) -> dict[tuple[str, ...], tuple[Question, ...]]:
    """All questions about the same images together, so that they share one prompt prefix."""
    found: dict[tuple[str, ...], list[Question]] = {}
    for images, question in entries:
        found.setdefault(images, []).append(question)
    return {images: tuple(questions) for images, questions in found.items()}


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves nothing.

    Raises:
        UserError: it is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give at least 1 sample of each split, or null for all")


def folder_at(root: str) -> Path:
    """The folder that a benchmark lies in.

    Raises:
        UserError: there is none.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root}: no such folder; point the task at the official files")
    return folder
