"""ANLS against records worked out by hand, and the edit distance against its definition."""

import json
import random
from functools import cache
from pathlib import Path

import pytest

from sandbox.evals.docvqa import anls, levenshtein

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden/docvqa.jsonl").read_text().splitlines()
]


def text(rng: random.Random, longest: int = 8) -> str:
    return "".join(rng.choices("ab ", k=rng.randint(0, longest)))


def test_golden_records() -> None:
    """Guards against the equation in place of the script: white space, threshold, raw lengths."""
    assert len(GOLDEN) >= 150
    wrong = [
        (record["why"], scored)
        for record in GOLDEN
        if (scored := anls(record["prediction"], record["answers"])).score
        != pytest.approx(record["score"], abs=1e-12)
    ]
    assert not wrong


def test_levenshtein_is_the_fewest_edits() -> None:
    """Guards against a slip in the row-wise programme, by the recursion that defines it."""

    @cache
    def fewest(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        replaced = fewest(a[1:], b[1:]) + (a[0] != b[0])
        return min(replaced, fewest(a[1:], b) + 1, fewest(a, b[1:]) + 1)

    rng = random.Random(1)
    for _ in range(300):
        a, b, c = text(rng), text(rng), text(rng)
        assert levenshtein(a, b) == levenshtein(b, a) == fewest(a, b)
        assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


def test_skipping_a_hopeless_comparison_changes_no_score() -> None:
    """Guards against a shortcut that cuts off a similarity at or just above the threshold."""
    rng = random.Random(2)
    values = []
    for _ in range(2000):
        prediction, answers = text(rng), [text(rng) for _ in range(rng.randint(1, 3))]
        plain = " ".join(prediction.split())
        whole = max(
            1 - levenshtein(plain, " ".join(a.split())) / max(len(prediction), len(a), 1)
            for a in answers
        )
        values.append(anls(prediction, answers).score)
        assert values[-1] == (whole if whole >= 0.5 else 0)
    assert {0, 0.5, 1} < set(values)


def test_no_answer_is_an_error() -> None:
    """Guards against scoring a test split, whose answers are not public, as wrong."""
    with pytest.raises(ValueError, match="at least one answer"):
        anls("cat", [])
