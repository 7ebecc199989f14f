"""Predictions with the answers that count as right: from JSON lines, or from official files.

Every reader raises ``UserError``, which names the file and the line or record, for what it cannot
score.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.errors import UserError


@dataclass(frozen=True)
class Answered:
    """A question that was answered.

    Attributes:
        where: the file and the line or record, for messages.
        prediction: what the model said.
        answers: what is right.
        kind: the question type it is scored under, if it has one.
    """

    where: str
    prediction: str
    answers: tuple[str, ...]
    kind: str | None = None


def read_lines(path: Path) -> Iterator[Answered]:
    """The records of a file of JSON lines, blank ones aside.

    A line is ``{"prediction": str, "answers": [...]}``; it may have a ``"type"``, the question
    type. An answer is a text, or an object with ``answer`` and perhaps ``answer_id`` as in VQA.
    Other keys are not read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                record = _object(_parse(line, where), where)
                yield Answered(
                    where,
                    _text(record, "prediction", where),
                    _answers(record, where),
                    _text(record, "type", where) if "type" in record else None,
                )


def read_vqa(results: Path, annotations: Path) -> Iterator[Answered]:
    """VQA's official results, a list of {question_id, answer}, with its annotations."""
    return _join(results, annotations, "question_id", "annotations", "answer_type")


def read_docvqa(results: Path, ground_truth: Path) -> Iterator[Answered]:
    """A DocVQA submission, a list of {questionId, answer}, with the ground truth of its split."""
    return _join(results, ground_truth, "questionId", "data", None)


def _join(
    results: Path, truth: Path, id_key: str, records_key: str, kind_key: str | None
) -> Iterator[Answered]:
    """The results in their own order; as in the official scripts, one for every question."""
    asked = _by_id(truth, _object(_parse_file(truth), str(truth)).get(records_key), id_key)
    given = _by_id(results, _parse_file(results), id_key)
    for name, one, other in ((results, asked, given), (truth, given, asked)):
        if missing := sorted(one.keys() - other.keys()):
            raise UserError(
                f"{name} lacks {len(missing)} of {len(one)} questions, the first with {id_key} "
                f"{missing[0]}: {results} must answer every question of {truth} and no other"
            )
    for number, (where, record) in given.items():
        truth_where, question = asked[number]
        yield Answered(
            where,
            _text(record, "answer", where),
            _answers(question, truth_where),
            _text(question, kind_key, truth_where) if kind_key else None,
        )


def _by_id(path: Path, records: Any, id_key: str) -> Mapping[int, tuple[str, dict[str, Any]]]:
    """Each record with where it stands, by its question."""
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of records with '{id_key}'")
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for place, content in enumerate(records):
        where = f"{path}, record {place}"
        record = _object(content, where)
        number = record.get(id_key)
        if not isinstance(number, int):
            raise UserError(f"{where}: '{id_key}' must be a whole number, got {number!r:.80}")
        if number in found:
            raise UserError(f"{where}: {id_key} {number} stands in {found[number][0]} already")
        found[number] = where, record
    return found


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: 'answers' must be a list of at least one, got {answers!r:.80}")
    numbers = [a["answer_id"] for a in answers if isinstance(a, dict) and "answer_id" in a]
    if any(number in numbers[:place] for place, number in enumerate(numbers)):
        raise UserError(f"{where}: an answer_id stands twice, so two answers may be one: {numbers}")
    return tuple(
        _text(answer if isinstance(answer, dict) else {"answer": answer}, "answer", where)
        for answer in answers
    )


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' must be a text, got {value!r:.80}")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {value!r:.80}")
    return value


def _parse_file(path: Path) -> Any:
    return _parse(path.read_bytes(), str(path))


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON in UTF-8 ({error})") from None
