"""The file of an evaluation's predictions: a line for each, appended as they come.

A process may be killed anywhere. What it leaves is a whole number of groups (see ``answering``),
then perhaps a part of one, then perhaps half a line; only whole groups are kept.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sandbox.data.task import Split
from sandbox.errors import UserError
from sandbox.evals.run import Images, write_json

PREDICTIONS = "predictions.jsonl"
SETTINGS = "evaluation.json"


@dataclass(frozen=True)
class Prediction:
    """One question as it was put, what the model said, and what that is worth.

    Attributes:
        id: the benchmark's name for the question, or split, sample and place in it.
        split, index, number: the sample it belongs to, and its place among the sample's questions.
        content: hash of the sample's images.
        kind: the official sub-split, or the question type.
        images: what the model saw: the sample's ``own``, ``none``, or those of another
            (``shuffled``).
        shown: index of the sample whose images it saw.
        question, choices: its text, and the options of multiple choice.
        prompt: all that the model read, special tokens by name, without image placeholders.
        reply: its own words.
        confidence: the probability of just these words, see ``answering.Reply``.
        answer: the answer in the reply; None where none was found.
        targets: all that is right; empty where only the benchmark's owner knows it.
        score: from 0 to 1; None where it is not known.
        group: number of the group that it was computed in.
    """

    id: str
    split: Split
    index: int
    number: int
    content: str
    kind: str
    images: Images
    shown: int
    question: str
    choices: tuple[str, ...]
    prompt: str
    reply: str
    confidence: float
    answer: str | None
    targets: tuple[str, ...]
    score: float | None
    group: int


class PredictionFile:
    """Predictions on disk, for one writer.

    Attributes:
        kept: those that were there when it was opened.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, resume: bool) -> None:
        """Open the file in ``out``, which is made if it is not there.

        Args:
            out: the directory of one evaluation.
            settings: all that decides what the predictions are, as plain values.
            resume: keep what an evaluation with the same settings left.

        Raises:
            UserError: an evaluation is there and is not to be resumed, or it is to be, but had
                other settings; or its predictions are damaged.
        """
        out.mkdir(parents=True, exist_ok=True)
        path, beside = out / PREDICTIONS, out / SETTINGS
        self.kept: list[Prediction] = []
        if beside.exists() or path.exists():
            if not resume:
                raise UserError(f"{out}: holds an evaluation; add --resume, or name another --out")
            _check(beside, settings)
            self.kept = _repair(path)
        else:
            write_json(beside, settings)
        self._file = path.open("a", encoding="utf-8")

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write a group to the disk."""
        # ASCII: a reply may hold half a character, which UTF-8 cannot.
        self._file.write("".join(json.dumps(asdict(each)) + "\n" for each in predictions))
        self._file.flush()

    def close(self) -> None:
        """The end: another writer may open it."""
        self._file.close()


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a finished evaluation.

    Raises:
        UserError: a line is damaged.
    """
    lines = path.read_bytes().splitlines()
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _check(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with what other settings left."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be resumed ({error}); name another --out") from None
    now = json.loads(json.dumps(settings))
    changed = [
        f"{key} was {before.get(key)!r:.60}, is {now.get(key)!r:.60}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(f"{path}: of another evaluation ({'; '.join(changed)}); name another --out")


def _repair(path: Path) -> list[Prediction]:
    """Cut the file behind the last group that is certainly whole, and read what is left."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    # Whether the last group is whole cannot be seen, so it is computed again.
    kept = [each for each in found if each.group < found[-1].group]
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines[: len(kept)])))
    return kept


def _parse(path: Path, number: int, line: bytes) -> Prediction:
    try:
        record = json.loads(line)
        lists = {key: tuple(record[key]) for key in ("choices", "targets")}
        return Prediction(**{**record, **lists})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}, line {number}: no prediction ({error})") from None
