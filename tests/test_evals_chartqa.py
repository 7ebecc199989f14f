"""Relaxed accuracy against records worked out by hand, and against its definition."""

import json
import random
from pathlib import Path

import pytest

from sandbox.evals.chartqa import MODES, Mode, relaxed_accuracy

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden/chartqa.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("mode", ["reference", "robust"])
def test_golden_records(mode: Mode) -> None:
    """Guards against target and prediction exchanged, and against each quirk of the rule."""
    assert len(GOLDEN) >= 150
    wrong = [
        (record["why"], scored)
        for record in GOLDEN
        if (scored := relaxed_accuracy(record["prediction"], record["answers"], mode)).score
        != record[mode]
    ]
    assert not wrong


def test_the_golden_records_tell_the_modes_apart() -> None:
    """Guards against golden records that an implementation with one mode would pass."""
    only = {mode: [r for r in GOLDEN if r[mode] > min(r[m] for m in MODES)] for mode in MODES}
    assert len(only["reference"]) > 10 and len(only["robust"]) > 40


@pytest.mark.parametrize("mode", ["reference", "robust"])
def test_numbers_may_be_off_by_a_twentieth_of_the_target(mode: Mode) -> None:
    """Guards against a tolerance relative to the prediction: 105.2 of 100, but 100 of 105.2."""
    rng = random.Random(1)
    for _ in range(1000):
        target = round(rng.uniform(3000, 9000), 2) * rng.choice([-1, 1])
        for share, right in ((rng.uniform(-0.0499, 0.0499), 1), (rng.uniform(0.0501, 2), 0)):
            for off in (share, -share):
                prediction = f"{target * (1 + off):.6f}"
                assert relaxed_accuracy(prediction, [str(target)], mode).score == right
    assert relaxed_accuracy("105.2", ["100"], mode).score == 0
    assert relaxed_accuracy("100", ["105.2"], mode).score == 1


@pytest.mark.parametrize("mode", ["reference", "robust"])
def test_an_answer_matches_itself(mode: Mode) -> None:
    """Guards against a text that one side parses and the other does not."""
    rng = random.Random(2)
    for _ in range(2000):
        text = "".join(rng.choices("0123456789.,%$-+ []ab'\"", k=rng.randint(0, 6))).strip()
        assert relaxed_accuracy(text, [text], mode).score == 1


def test_robust_reads_separators_and_currency_as_the_number() -> None:
    """Guards against 1,234 read as 1.234 or as 1 and 234."""
    rng = random.Random(3)
    for _ in range(500):
        number = rng.randint(3000, 10**9)
        for text in (f"{number:,}", f"${number:,}", f"{number:,}.0 €", f"{number:,}%"):
            assert relaxed_accuracy(text, [str(number)], "robust").score == 1
            assert relaxed_accuracy(text, [str(2 * number)], "robust").score == 0


@pytest.mark.parametrize("mode", ["reference", "robust"])
@pytest.mark.parametrize("text", ["9" * 5000, "1e999", "-1e-999", "[" * 1000, "," * 9999, "٣" * 99])
def test_extreme_predictions_are_wrong_not_errors(mode: Mode, text: str) -> None:
    """A model that repeats a digit for ever stopped the scoring with an overflow."""
    assert relaxed_accuracy(text, ["7"], mode).score == 0
    assert relaxed_accuracy("7", [text], mode).score == 0
