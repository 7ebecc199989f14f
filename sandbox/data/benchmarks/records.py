"""Records of questions, checked: what is wrong is told by file and record, and counted."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pathlib import PurePosixPath as PosixPath
from typing import Any, NamedTuple

from sandbox.data.task import Question, Split
from sandbox.errors import UserError

UNTYPED = "question"  # the question type of a question that has none


class RecordError(ValueError):
    """One record does not follow the layout; the message says in what, not where."""


class Entry(NamedTuple):
    """A question, and the images it is about, by name."""

    images: tuple[str, ...]
    question: Question


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that the benchmark needs.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; point the task's root at the complete official files"
        ) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read or is cut short.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no complete JSON ({error}); fetch the file again") from None


def read_list(path: Path, key: str | None = None) -> list[Any]:
    """The records of a JSON file that holds a list, or an object with a list under ``key``.

    Raises:
        UserError: it cannot be read, is cut short or holds something else.
    """
    return listed(path, read_json(path), key)


def listed(path: Path, content: Any, key: str | None = None) -> list[Any]:
    """The records of what ``read_json`` read, as in ``read_list``.

    Raises:
        UserError: they are not there.
    """
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path}: expected an object with a list of records under '{key}'")
        content = content[key]
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of records, got a {type(content).__name__}")
    if not content:
        raise UserError(f"{path}: holds no record")
    return content


def numbered(path: Path, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each record, behind where it stands: file and number, from 0."""
    for number, record in enumerate(records):
        yield f"{path}, record {number}", record


def read_entries(
    source: str,
    split: Split,
    records: Iterable[tuple[str, Any]],
    parse: Callable[[Any], Entry],
) -> list[Entry]:
    """Every record, in its order. None is left out: a score would not be the benchmark's.

    Args:
        source: what the records are of, for messages.
        split: that they are of. Without answers, a test split can still be predicted on; training
            and validation need them, for an empty answer would stop a run at some later step.
        records: each behind where it stands.
        parse: makes a question of a record, or raises ``RecordError``.

    Raises:
        UserError: there is none; or some are faulty, share an id or lack an answer that is needed:
            the message names the first of them, and how many there are.
    """
    entries, places, unanswered = list[Entry](), dict[str, str](), list[str]()
    first, faulty, count = "", 0, 0
    for where, record in records:
        count += 1
        try:
            entry = parse(record)
            name = entry.question.id
            if places.setdefault(name, where) is not where:
                raise RecordError(f"the id {name!r:.80} stands already at {places[name]}")
        except RecordError as fault:
            first, faulty = first or f"{where}: {fault}", faulty + 1
            continue
        entries.append(entry)
        if not entry.question.answer:
            unanswered.append(where)
    if faulty:
        raise UserError(f"{first} ({faulty} of {count} records are faulty)")
    if not entries:
        raise UserError(f"{source}: holds no question")
    if unanswered and (split != "test" or len(unanswered) < count):
        needed = "a test split has all or none" if split == "test" else f"{split} needs them"
        raise UserError(
            f"{unanswered[0]}: no answer ({len(unanswered)} of {count} records lack one): {needed}"
        )
    return entries


# --- What a record holds --------------------------------------------------------------------------


def fields(record: Any) -> Mapping[str, Any]:
    """The record as an object.

    Raises:
        RecordError: it is none.
    """
    if not isinstance(record, dict):
        raise RecordError(f"expected an object, got {record!r:.80}")
    return record


def text(record: Mapping[str, Any], key: str) -> str:
    """The text under ``key``.

    Raises:
        RecordError: there is none, it is blank, or no text that can be written as UTF-8.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(
            f"'{key}' must be a text, got {value!r:.80}" if key in record else f"no '{key}'"
        )
    if not value.strip():
        raise RecordError(f"'{key}' is blank")
    return _writable(value, key)


def whole(record: Mapping[str, Any], key: str) -> int:
    """The whole number, 0 or more, under ``key``.

    Raises:
        RecordError: there is none.
    """
    value = record.get(key)
    if type(value) is not int or value < 0:  # True is an int, too
        told = f"'{key}' must be a whole number, got {value!r:.80}"
        raise RecordError(told if key in record else f"no '{key}'")
    return value


def texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The texts in the list under ``key``; none where it is missing or null.

    Raises:
        RecordError: it is no list of texts.
    """
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise RecordError(f"'{key}' must be a list of texts, got {value!r:.80}")
    return tuple(_writable(each, key) for each in value)


def answer_of(accepted: Sequence[str], chosen: str = "") -> str:
    """The answer to train on: the one chosen, or else the first accepted one that is not blank.

    It is empty where there are no answers at all.

    Raises:
        RecordError: there are, and all are blank.
    """
    answer = next((each for each in (chosen, *accepted) if each.strip()), "")
    if accepted and not answer:
        raise RecordError("every answer is blank")
    return _writable(answer, "answer")


def image_name(value: Any, key: str = "image") -> str:
    """The name of an image file: a path that stays below the folder it is relative to.

    >>> image_name("./png//1.png")
    'png/1.png'

    Raises:
        RecordError: it is no text, or could lead out of the folder.
    """
    name = text({key: value}, key)
    path = PosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise RecordError(f"'{key}' leaves the dataset's folder: {name!r:.80}")
    if "\\" in name or "\0" in name or not path.parts:
        raise RecordError(f"'{key}' must be a path with forward slashes, got {name!r:.80}")
    return str(path)


def plain_question(record: Mapping[str, Any], otherwise: str) -> Question:
    """The question of a record with our own keys, named in ``JsonlQA``.

    Args:
        record: the record.
        otherwise: the id, where the record has none.

    Raises:
        RecordError: a key is missing or of the wrong type.
    """
    accepted = texts(record, "answers")
    chosen = "" if record.get("answer") in (None, "") else text(record, "answer")
    if not accepted and chosen:
        accepted = (chosen,)
    number = record.get("id")
    if number is None:
        number = otherwise
    elif type(number) is not int:
        number = text(record, "id")
    return Question(
        text(record, "question"),
        answer_of(accepted, chosen),
        UNTYPED if record.get("type") is None else text(record, "type"),
        answers=accepted,
        id=str(number),
        choices=texts(record, "choices"),
    )


def _writable(value: str, key: str) -> str:
    """The text itself; JSON can hold half a surrogate pair, which no tokenizer takes."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecordError(f"'{key}' is no text in Unicode: {value!r:.80}") from None
    return value
