"""The benchmarks that are known by name: where their tasks are, and how they are scored."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.errors import UserError

if TYPE_CHECKING:  # it loads an image library
    from sandbox.data.task import Split, Task


@dataclass(frozen=True)
class Known:
    """A benchmark: where its task is, and how its owners score it.

    Attributes:
        task: class path of its loader.
        metric: a name in ``score.METRICS``.
        mean: whether the mean of its sub-splits is reported, not that of all questions.
        results: the official file of answers: what to call it, and its key of a question.
        files: how the files of its splits end; none if it is an official folder.
    """

    task: str
    metric: str
    mean: bool = False
    results: tuple[str, str] | None = None
    files: str | None = None

    def open(self, data: Path, split: "Split") -> "Task":
        """The task, with this split at least.

        Raises:
            UserError: the files are missing, incomplete or damaged.
        """
        module, _, name = self.task.rpartition(".")
        loader: Any = getattr(import_module(module), name)
        if self.files:
            return loader(**{split: _file(data, split, self.files)})
        # The other splits may not be there, or lack their images.
        options = {"splits": [split]} if "splits" in signature(loader).parameters else {}
        return loader(str(data), **options)


BENCHMARKS: Mapping[str, Known] = {
    "chartqa": Known("sandbox.data.benchmarks.ChartQA", "chartqa", mean=True),
    "vqav2": Known("sandbox.data.benchmarks.VQAv2", "vqa", results=("results.json", "question_id")),
    "docvqa": Known(
        "sandbox.data.benchmarks.DocVQA", "anls", results=("submission.json", "questionId")
    ),
    "easy-vqa": Known("sandbox.data.benchmarks.EasyVQA", "exact"),
    "jsonl": Known("sandbox.data.benchmarks.JsonlQA", "exact", files="jsonl"),
    "parquet": Known("sandbox.data.benchmarks.ParquetQA", "exact", files="parquet"),
}


def _file(data: Path, split: str, ending: str) -> str:
    """The file of a split, or the pattern of several; a file given by name serves any split.

    Raises:
        UserError: there is none.
    """
    if not data.is_dir():
        return str(data)
    for pattern in (f"{split}.{ending}", f"{split}-*.{ending}", f"data/{split}-*.{ending}"):
        if sorted(data.glob(pattern)):
            return str(data / pattern)
    raise UserError(f"{data}: no {split} split, expected {split}.{ending}")
