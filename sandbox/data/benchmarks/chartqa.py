"""ChartQA, from its official folder."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox.data.benchmarks.base import OFFICIAL, Benchmark, chosen, folder_at
from sandbox.data.benchmarks.image_files import items_of
from sandbox.data.benchmarks.records import (
    Entry,
    fields,
    image_name,
    numbered,
    read_entries,
    read_list,
    text,
)
from sandbox.data.task import Question, Split

RELEASE = "ChartQA Dataset"  # the folder that the release's archive unpacks to
PARTS = ("human", "augmented")
LAYOUT = "test/test_human.json, test/test_augmented.json, test/png and the like"


class ChartQA(Benchmark):
    """ChartQA (Masry et al. 2022): charts from four publishers, with questions by people.

    Files: in each of ``train``, ``val`` and ``test`` a ``{split}_human.json`` and a
    ``{split}_augmented.json`` (lists of {imgname, query, label}) and ``png/{imgname}``. Question
    types: ``human`` (written by people) and ``augmented`` (generated from people's summaries). The
    official score is the mean of the two. A question's id is its file and its place in it from 0:
    ``test_human/17``.

    Args:
        root: the folder that holds ``train``, ``val`` and ``test``, or their parent folder
            ``ChartQA Dataset``. Not all three need to be there.
        splits: read only these; None = all that are there.
        limit: the first so many charts of each split; None = all.
        skip_missing: leave out charts whose image is not there, with a warning.

    Raises:
        UserError: a file is damaged, does not follow the layout or names images that are not there
            or outside ``root``; or a split is asked for that is not there.
    """

    def __init__(
        self,
        root: str,
        splits: list[Split] | None = None,
        limit: int | None = None,
        skip_missing: bool = False,
    ) -> None:
        folder = folder_at(root)
        if (folder / RELEASE).is_dir():
            folder /= RELEASE
        where = f"ChartQA in {root}"
        there = {
            split: files
            for split in OFFICIAL
            if (files := [p for part in PARTS if (p := _file(folder, split, part)).is_file()])
        }
        items = {}
        for split, files in chosen(where, there, splits, LAYOUT).items():
            if len(files) < len(PARTS):
                warnings.warn(f"{where}: {split} has {files[0].name} alone", stacklevel=2)
            records = (found for file in files for found in _records(file))
            entries = read_entries(where, split, records, _parse)
            images = folder / split / "png"
            items[split] = items_of(f"{where}, {split}", images, entries, limit, skip_missing)
        super().__init__(where, items)


def _file(folder: Path, split: Split, part: str) -> Path:
    return folder / split / f"{split}_{part}.json"


def _records(path: Path) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Each record of a file with the id of its question, behind where it stands."""
    for number, (where, content) in enumerate(numbered(path, read_list(path))):
        yield where, (f"{path.stem}/{number}", content)


def _parse(found: tuple[str, Any]) -> Entry:
    name, content = found
    record, kind = fields(content), name.partition("/")[0].rpartition("_")[2]
    label = text(record, "label")
    question = Question(text(record, "query"), label, kind, answers=(label,), id=name)
    return Entry((image_name(record.get("imgname"), "imgname"),), question)
