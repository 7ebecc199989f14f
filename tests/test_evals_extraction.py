"""Answers found in replies, against replies read by hand."""

import doctest
import json
import random
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from sandbox.evals import extraction, vqa
from sandbox.evals.extraction import choice, extract

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def test_golden_replies() -> None:
    """Guards against answers that are lost, or cut, or taken from the wrong sentence."""
    records = golden("extraction.jsonl")
    assert len(records) >= 150
    assert not [r for r in records if extract(r["prediction"]) != r["extracted"]]


def test_golden_choices() -> None:
    """Guards against an article taken for the letter A, and against a guess among two letters."""
    records = golden("choice.jsonl")
    assert len(records) >= 150
    assert not [r for r in records if choice(r["prediction"]) != r["letter"]]
    assert sum(r["letter"] is None for r in records) > 25


@pytest.mark.parametrize("reply", ["E", "(e)", "The answer is E.", "E. red", r"\boxed{E}"])
def test_letters_are_those_on_offer(reply: str) -> None:
    """Guards against benchmarks with more than four options, or fewer."""
    assert choice(reply) is None
    assert choice(reply, "ABCDE") == choice(reply, "abcde") == "E"


def test_nothing_is_chosen_at_random() -> None:
    """A harness that guessed where it could not parse gave another score on every run."""
    rng = random.Random(1)
    parts = ["A", "B", "C", "D", "(a)", " or ", "the answer is ", ". ", "\n", "*", "cat", "option "]
    unparsed = 0
    for _ in range(2000):
        reply = "".join(rng.choices(parts, k=rng.randint(0, 6)))
        first, again = choice(reply), choice(reply)
        assert first == again
        assert first is None or (first in "ABCD" and first in reply.upper())
        assert (short := extract(reply)) is None or short in reply
        unparsed += first is None
    assert 500 < unparsed < 2000


@pytest.mark.parametrize("part", ["answer to ", "answer is ", "(A) ", "answer *", "A.", "     "])
def test_long_replies_take_linear_time(part: str) -> None:
    """A pattern that backtracked over a page for each of its words would take minutes here."""
    reply, start = part * 20_000, process_time()
    choice(reply)
    extract(reply)
    assert process_time() - start < 10


@pytest.mark.parametrize("module", [extraction, vqa], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: Any) -> None:
    """Guards against documentation that the code has left behind."""
    done = doctest.testmod(module)
    assert done.attempted and not done.failed
