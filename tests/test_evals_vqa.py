"""VQA accuracy against records worked out by hand, and against its definition."""

import json
import random
from pathlib import Path

import pytest

from sandbox.evals.vqa import CONTRACTIONS, Mode, accuracy, normalise

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden/vqa.jsonl").read_text().splitlines()
]
WORDS = ["a", "The", "two", "none", "cat", "dog", "isnt", "1,000", "t-shirt", "yes.", "?", ""]


def answers_of(rng: random.Random) -> list[str]:
    """Ten answers of few words, so that some agree."""
    known = [" ".join(rng.choices(WORDS, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 4))]
    return rng.choices(known, k=10)


@pytest.mark.parametrize("mode", ["official", "always"])
def test_golden_records(mode: Mode) -> None:
    """Guards against a normalisation that is plausible but not the script's."""
    assert len(GOLDEN) >= 150
    wrong = [
        (record["why"], scored)
        for record in GOLDEN
        if (scored := accuracy(record["prediction"], record["answers"], mode)).score
        != pytest.approx(record[mode], abs=1e-12)
    ]
    assert not wrong


def test_the_golden_records_tell_the_modes_apart() -> None:
    """Guards against golden records that an implementation with one mode would pass."""
    assert sum(record["official"] != record["always"] for record in GOLDEN) > 50


@pytest.mark.parametrize("mode", ["official", "always"])
def test_scores_are_those_of_the_number_of_matches(mode: Mode) -> None:
    """Guards against leaving out all equal answers instead of one, or counting matches at once."""
    rng = random.Random(1)
    levels = [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]
    seen = set()
    for _ in range(2000):
        answers = answers_of(rng)
        prediction = rng.choice([*answers, "cat", "2", "A dog"])
        same = mode == "official" and len({answer.strip() for answer in answers}) == 1
        form = str.strip if same else normalise
        matches = sum(form(answer) == form(prediction) for answer in answers)
        score = accuracy(prediction, answers, mode).score
        assert score == pytest.approx(levels[matches], abs=1e-12)
        seen.add(matches)
    assert len(seen) > 8


def test_the_order_of_answers_does_not_count() -> None:
    """Guards against a rule that looks at the first answer only."""
    rng = random.Random(2)
    for _ in range(500):
        answers = answers_of(rng)
        shuffled = rng.sample(answers, k=10)
        one, other = accuracy(answers[0], answers), accuracy(answers[0], shuffled)
        assert one.normalised == other.normalised
        assert one.score == pytest.approx(other.score, abs=1e-12)


def test_every_apostrophe_that_is_missing_comes_back() -> None:
    """Guards against a contraction lost from the table; the script has 114 that can apply."""
    assert len(CONTRACTIONS) == 114
    for short, full in CONTRACTIONS.items():
        assert normalise(f"It {short.upper()} so") == f"it {full} so"
        assert sorted([*short, "'"]) == sorted(full) or short == "somebody'd"


def test_the_prediction_is_reported_as_it_was_compared() -> None:
    """Guards against per-record output that hides why a record failed."""
    assert accuracy(" The Cat.\n", ["cat"] * 10).normalised == "The Cat."
    assert accuracy(" The Cat.\n", ["cat"] * 10, "always").normalised == "cat"


def test_no_answer_is_an_error() -> None:
    """Guards against a division by zero far from its cause."""
    with pytest.raises(ValueError, match="at least one answer"):
        accuracy("cat", [])
