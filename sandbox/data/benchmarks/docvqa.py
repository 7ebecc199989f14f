"""DocVQA (single pages), from its official files."""

from pathlib import Path
from typing import Any

from sandbox.data.benchmarks.base import OFFICIAL, Benchmark, chosen, folder_at
from sandbox.data.benchmarks.image_files import items_of
from sandbox.data.benchmarks.records import (
    UNTYPED,
    Entry,
    answer_of,
    fields,
    image_name,
    numbered,
    read_entries,
    read_list,
    text,
    texts,
    whole,
)
from sandbox.data.task import Question, Split


class DocVQA(Benchmark):
    """DocVQA (Mathew et al. 2021): scanned pages, and questions whose answers stand on them.

    Files: ``{split}_v1.0.json`` or, where it is there, ``{split}_v1.0_withQT.json``, in ``root`` or
    in its folder ``{split}``; images lie as ``documents/x_81.png`` beside them. Question types are
    those of ``_withQT``, several of one question joined (``figure/diagram, table/list``), and else
    ``question``. To train on is the first of the accepted answers.

    The answers of ``test`` are with the evaluation server alone: it can be predicted on only.

    Args:
        root: the folder that holds the files. Not all splits need to be there.
        images: the folder that holds ``documents``; None = that of each split's file.
        splits: read only these; None = all that are there.
        limit: the first so many pages of each split; None = all.
        skip_missing: leave out pages whose image is not there, with a warning.

    Raises:
        UserError: a file is damaged, does not follow the layout or names images that are not there
            or outside their folder; or a split is asked for that is not there.
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
        where = f"DocVQA in {root}"
        there = {split: path for split in OFFICIAL if (path := _file(folder, split))}
        items = {}
        for split, path in chosen(where, there, splits, "val_v1.0.json or the like").items():
            records = numbered(path, read_list(path, "data"))
            entries = read_entries(str(path), split, records, _parse)
            pages = path.parent if images is None else folder_at(images)
            items[split] = items_of(f"{where}, {split}", pages, entries, limit, skip_missing)
        super().__init__(where, items)


def _file(folder: Path, split: Split) -> Path | None:
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    paths = (place / name for name in names for place in (folder, folder / split))
    return next((path for path in paths if path.is_file()), None)


def _parse(content: Any) -> Entry:
    record = fields(content)
    answers = texts(record, "answers")
    question = Question(
        text(record, "question"),
        answer_of(answers),
        ", ".join(texts(record, "question_types")) or UNTYPED,
        answers=answers,
        id=str(whole(record, "questionId")),
    )
    return Entry((image_name(record.get("image")),), question)
