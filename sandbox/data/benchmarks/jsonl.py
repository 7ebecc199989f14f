"""Questions in JSON lines: the plain layout, for whatever has no loader of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox.data.benchmarks.base import Benchmark, chosen, folder_at
from sandbox.data.benchmarks.image_files import items_of
from sandbox.data.benchmarks.records import (
    Entry,
    RecordError,
    fields,
    image_name,
    plain_question,
    read_bytes,
    read_entries,
)
from sandbox.data.prompt import MAX_IMAGES
from sandbox.data.task import Split


class JsonlQA(Benchmark):
    """One JSON object a line: ``{"image": "a/1.png", "question": "...", "answers": ["...", ...]}``.

    ============  ====================================  =======================================
    key           value                                 where it is missing
    ============  ====================================  =======================================
    ``image``     a path, or a list of them             an error
    ``question``  text                                  an error
    ``answers``   all accepted answers                  ``answer`` alone
    ``answer``    the one to train on                   the first of ``answers``
    ``choices``   the options of multiple choice        none
    ``id``        text or number, unique in its file    file and line: ``test/17`` (from 1)
    ``type``      what scores are broken down by        ``question``
    ============  ====================================  =======================================

    Lines about the same images are one sample. Other keys are not read, and blank lines neither.
    A ``test`` file may lack all answers: then it can be predicted on only.

    Args:
        train, val, test: the file of each split; None = there is no such split.
        images: the folder that images are relative to; None = that of each file.
        limit: the first so many samples of each split; None = all.
        skip_missing: leave out samples of which an image is not there, with a warning.

    Raises:
        UserError: a file or one of its lines is damaged, does not follow the layout or names images
            that are not there or outside their folder.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        images: str | None = None,
        limit: int | None = None,
        skip_missing: bool = False,
    ) -> None:
        given: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        there = {split: Path(path) for split, path in given.items() if path is not None}
        items = {}
        for split, path in chosen("JsonlQA", there, None, "a file for train, val or test").items():
            folder = path.parent if images is None else folder_at(images)
            entries = read_entries(str(path), split, _lines(path), _parse)
            items[split] = items_of(str(path), folder, entries, limit, skip_missing)
        super().__init__("JsonlQA of " + ", ".join(map(str, there.values())), items)


def _lines(path: Path) -> Iterator[tuple[str, tuple[str, bytes]]]:
    """Each line that is not blank with the id it has by default, behind where it stands."""
    # Not splitlines(), which also splits at characters that JSON allows within a text.
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", (f"{path.stem}/{number}", line)


def _parse(found: tuple[str, bytes]) -> Entry:
    name, line = found
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"no JSON ({error})") from None
    record = fields(content)
    return Entry(_images(record.get("image")), plain_question(record, name))


def _images(value: Any) -> tuple[str, ...]:
    """The names of a record's images.

    Raises:
        RecordError: it has none, or more than a prompt takes.
    """
    names = value if isinstance(value, list) else [value]
    if not 0 < len(names) <= MAX_IMAGES:
        raise RecordError(f"'image' must name 1 to {MAX_IMAGES} images, got {len(names)}")
    return tuple(map(image_name, names))
