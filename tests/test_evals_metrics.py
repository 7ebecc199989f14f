"""Scores and baselines against values worked out by hand."""

import json
from operator import mul
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from sandbox.data.task import Question
from sandbox.evals.metrics import (
    exact,
    exact_match,
    guess_among_present,
    majority_answers,
    majority_baseline,
    majority_baseline_by_kind,
    mean_by_kind,
    wilson_interval,
)


def ask(text: str, answer: str, kind: str = "kind", present: tuple[str, ...] = ()) -> Question:
    return Question(text, answer, kind, present)


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        ("red", "red", True),
        (" Red\n", "rED", True),
        ("red shape", "red", False),
        ("", "red", False),
        ("10", "1", False),
        ("no", "not", False),
    ],
)
def test_exact_match(prediction: str, reference: str, equal: bool) -> None:
    """Guards against substring matching and against case or line ends counting as errors."""
    assert exact_match(prediction, reference) is equal


def test_golden_records_of_exact_match() -> None:
    """Guards against normalising more than is promised, and against a second answer not read."""
    lines = (Path(__file__).parent / "golden/exact.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) >= 150
    assert not [r for r in records if exact(r["prediction"], r["answers"]).score != r["score"]]


def test_majority_answers_fall_back_from_text_to_type_to_everything() -> None:
    """Guards against a blind baseline that is too weak: an unseen wording still gets a guess."""
    train = [
        ask("a?", "yes", "binary"),
        ask("a?", "no", "binary"),
        ask("a?", "no", "binary"),
        ask("b?", "yes", "binary"),
        ask("b?", "yes", "binary"),
        ask("c?", "red", "color"),
        ask("c?", "blue", "color"),
    ]
    test = [
        ask("A? ", "yes", "binary"),  # the text but for case and white space
        ask("c?", "green", "color"),  # a tie: the alphabetically first
        ask("d?", "blue", "color"),  # an unseen text: the type's answer
        ask("d?", "yes", "size"),  # an unseen type: the most frequent of all
    ]
    assert majority_answers(train, test) == ["no", "blue", "blue", "yes"]
    assert majority_baseline(train, test) == 0.5
    assert majority_baseline_by_kind(train, test) == {"binary": 0.0, "color": 0.5, "size": 1.0}


def test_majority_answers_do_not_depend_on_order() -> None:
    """Guards against baselines that change with the order in which a loader yields questions."""
    train = [ask("a?", "yes"), ask("a?", "no"), ask("b?", "no"), ask("b?", "Yes")]
    test = [ask("a?", "yes"), ask("b?", "yes"), ask("c?", "yes")]
    assert majority_answers(train, test) == majority_answers(train[::-1], test)


def test_majority_counts_answers_that_exact_match_calls_equal_as_one() -> None:
    """Guards against "Yes" and "yes" splitting the vote, and so a baseline below the true one."""
    train = [
        ask("a?", "Yes"),
        ask("a?", "yes"),
        ask("a?", "YES "),
        ask("a?", "no"),
        ask("a?", "no"),
    ]
    assert majority_baseline(train, [ask("a?", "Yes")]) == 1.0


def test_majority_needs_questions() -> None:
    """Guards against a baseline of 0 or NaN out of an empty list."""
    with pytest.raises(ValueError, match="one training question"):
        majority_baseline([], [ask("a?", "yes")])
    with pytest.raises(ValueError, match="one test question"):
        majority_baseline([ask("a?", "yes")], [])


def test_mean_by_kind() -> None:
    """Guards against means over the wrong group, and scores that silently lack a question."""
    questions = [ask("a?", "1", "x"), ask("b?", "1", "y"), ask("c?", "1", "x")]
    assert mean_by_kind(questions, [True, False, False]) == {"x": 0.5, "y": 0.0}
    with pytest.raises(ValueError, match="3 questions but 2 scores"):
        mean_by_kind(questions, [1.0, 0.0])


def test_guess_among_present() -> None:
    """Guards against counting questions that list nothing, and ignoring repeated answers."""
    questions = [
        ask("a?", "red", present=("red", "blue")),  # 1/2
        ask("b?", "Red", present=("red", "blue", "red", "green")),  # 2/4: two red things
        ask("c?", "7", present=("1", "2")),  # 0
        ask("d?", "7"),  # lists nothing
    ]
    assert guess_among_present(questions) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no question lists"):
        guess_among_present([ask("d?", "7")])


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(
    correct: int, total: int, low: float, high: float
) -> None:
    """Guards against the Wald interval, which has no width at 0 and at 1, and wrong quantiles."""
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_is_mirrored_and_widens_with_confidence() -> None:
    """Guards against a one-sided quantile and bounds outside [0, 1]."""
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    wider = wilson_interval(3, 10, confidence=0.99)
    assert wider[0] < low < 0.3 < high < wider[1]
    for total in range(1, 60):
        assert 0 <= wilson_interval(0, total)[0] < 1e-15
        assert 1 >= wilson_interval(total, total)[1] > 1 - 1e-15


def test_wilson_interval_of_graded_scores_is_wide_enough() -> None:
    """Guards against an interval that fits right-or-wrong answers alone: VQA's score has steps."""
    rng = Random(1)
    levels, weights = [0, 0.3, 0.6, 0.9, 1], [5, 1, 1, 1, 4]
    mean = sum(map(mul, levels, weights)) / sum(weights)
    draws = [sum(rng.choices(levels, weights, k=40)) for _ in range(1000)]
    inside = [low < mean < high for low, high in (wilson_interval(draw, 40) for draw in draws)]
    assert 0.95 <= fmean(inside) < 1


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(correct: int, total: int) -> None:
    """Guards against an interval for no trials at all."""
    with pytest.raises(ValueError, match=f"got {correct} of {total}"):
        wilson_interval(correct, total)
