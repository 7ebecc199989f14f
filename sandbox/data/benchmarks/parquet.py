"""Questions in parquet files with their images inside, as mirrors of benchmarks have them."""

from __future__ import annotations  # pyarrow is named in annotations, and is optional

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.data.benchmarks.base import (
    OFFICIAL,
    Benchmark,
    Item,
    Stored,
    check_limit,
    chosen,
    grouped,
)
from sandbox.data.benchmarks.records import Entry, RecordError, plain_question, read_entries
from sandbox.data.media import MediaError
from sandbox.data.task import Split
from sandbox.errors import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

INSTALL = "`uv sync --extra parquet` or `pip install pyarrow`"
# What columns are called elsewhere, and what they are in the layout of ``JsonlQA``.
ALIASES = {"query": "question", "label": "answers", "human_or_machine": "type"}
OURS = ("question", "answers", "answer", "choices", "id", "type")
CHARTQA = ("human", "augmented")  # the numbers that a mirror gives its two parts
MIRRORED = [f"{part}_{split}" for part in CHARTQA for split in OFFICIAL]


@dataclass(frozen=True)
class ImageRow(Stored):
    """The image in one row of a parquet file, told by the hash of its bytes."""

    file: Path
    group: int
    row: int
    content: str

    @property
    def where(self) -> str:
        """File, row group and row."""
        return f"{self.file}, row group {self.group}, row {self.row}"

    def read(self) -> bytes:
        """Its bytes, by way of the whole row group: the two read last are kept.

        Raises:
            MediaError: the file has been changed, or cannot be read.
        """
        try:
            data = _images(self.file, self.group)[self.row]
        except (UserError, IndexError, ValueError, OSError) as error:
            raise MediaError(f"image {self.where}: cannot be read ({error})") from None
        if data is None or _hash(data) != self.content:
            raise MediaError(f"image {self.where}: the file has changed since it was opened")
        return data

    def told(self) -> object:
        """The hash of its bytes."""
        return self.content


class ParquetQA(Benchmark):
    """Parquet files with a row for each question, and its image in the row.

    Columns are the keys of ``JsonlQA``, or as in two common mirrors of ChartQA: ``image, question,
    answer, type`` (``human_test``, ``augmented_test``) and ``image, query, label (a list),
    human_or_machine`` (0, 1). ``image`` is the bytes of an image file, alone or in a struct with
    ``bytes``. Rows with the same image are one sample. Needs pyarrow.

    All rows are read once at the start, images included, but not decoded. Later a sample costs the
    reading of its row group, unless it was among the last two, so evaluation in order is fast and
    training in random order is not: for that, smaller row groups or files with images help.

    Args:
        train, val, test: a file of each split, several, or a pattern (``data/test-*.parquet``);
            None = there is no such split.
        limit: the first so many images of each split; None = all.

    Raises:
        UserError: pyarrow is missing; a file is missing, damaged or has other columns; or a row
            does not follow the layout.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        check_limit(limit)
        given: dict[Split, str | list[str] | None] = {"train": train, "val": val, "test": test}
        there = {split: _files(named) for split, named in given.items() if named is not None}
        items = {}
        for split, files in chosen(
            "ParquetQA", there, None, "a file for train, val or test"
        ).items():
            images = dict[str, ImageRow]()
            rows = (row for file in files for row in _rows(file))
            entries = read_entries(str(given[split]), split, rows, _parser(images))
            items[split] = [
                Item(tuple(images[content] for content in contents), questions)
                for contents, questions in islice(grouped(entries).items(), limit)
            ]
        names = (str(file) for files in there.values() for file in files)
        super().__init__("ParquetQA of " + ", ".join(names), items)


def _files(named: str | list[str]) -> list[Path]:
    """The files of a split, those of a pattern in the order of their names.

    Raises:
        UserError: a pattern matches none.
    """
    found: list[Path] = []
    for pattern in [named] if isinstance(named, str) else named:
        matches = [pattern] if Path(pattern).is_file() else sorted(glob(pattern))  # noqa: PTH207
        if not matches:
            raise UserError(f"{pattern}: no such file")
        found += map(Path, matches)
    return found


@dataclass(frozen=True)
class _Row:
    """A row: where its image lies, the id it has by default, and what it holds."""

    file: Path
    group: int
    place: int
    name: str
    record: dict[str, Any]
    image: bytes | None


def _rows(path: Path) -> Iterator[tuple[str, _Row]]:
    """Every row of a file, behind where it stands; rows are counted from 0."""
    with _open(path) as file:
        theirs = file.schema_arrow.names
        names = {ALIASES.get(name, name): name for name in theirs}
        for needed in ("image", "question"):
            if needed not in names:
                raise UserError(f"{path}: no column '{needed}', there is {', '.join(theirs)}")
        columns = {ours: names[ours] for ours in OURS if ours in names}
        number = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(columns.values())).to_pylist()
            images = _images_of(path, file, group)
            for place, (row, image) in enumerate(zip(table, images, strict=True)):
                record = {ours: _as_ours(column, row[column]) for ours, column in columns.items()}
                name = f"{path.stem}/{number}"
                yield f"{path}, row {number}", _Row(path, group, place, name, record, image)
                number += 1


def _as_ours(column: str, value: Any) -> Any:
    """A value as the layout of ``JsonlQA`` has it."""
    if column == "human_or_machine" and value in (0, 1):
        return CHARTQA[value]
    if column == "type" and value in MIRRORED:
        return value.partition("_")[0]
    return [value] if column == "label" and isinstance(value, str) else value


def _parser(images: dict[str, ImageRow]) -> Callable[[_Row], Entry]:
    """Parses rows, and notes where each image lies that is new."""

    def parse(row: _Row) -> Entry:
        if not row.image:
            raise RecordError("no bytes in 'image'; a path alone is not followed")
        question = plain_question(row.record, row.name)
        content = _hash(row.image)
        images.setdefault(content, ImageRow(row.file, row.group, row.place, content))
        return Entry((content,), question)

    return parse


# --- pyarrow --------------------------------------------------------------------------------------


def _open(path: Path) -> ParquetFile:
    """The file, of which only the schema is read.

    Raises:
        UserError: pyarrow is missing, or this is no parquet file.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: parquet files need pyarrow: {INSTALL}") from None
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no complete parquet file ({error})") from None


@lru_cache(maxsize=2)
def _images(path: Path, group: int) -> Sequence[bytes | None]:
    with _open(path) as file:
        return _images_of(path, file, group)


def _images_of(path: Path, file: ParquetFile, group: int) -> list[bytes | None]:
    """The images of a row group, None where there is none."""
    values = file.read_row_group(group, columns=["image"])["image"].to_pylist()
    images = [value.get("bytes") if isinstance(value, dict) else value for value in values]
    wrong = [image for image in images if not isinstance(image, bytes | None)]
    if wrong:
        raise UserError(
            f"{path}: 'image' must be bytes or a struct with 'bytes', got {wrong[0]!r:.80}"
        )
    return images


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
