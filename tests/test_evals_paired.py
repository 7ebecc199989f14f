"""Paired differences: against scipy, under a simulated null, and where nothing differs."""

import random

import numpy as np
import pytest
from scipy import stats

from sandbox.errors import UserError
from sandbox.evals.paired import Difference, paired_difference

Table = dict[int, dict[tuple[int, int], bool]]


def table(rates: list[float], images: int, questions: int, rng: random.Random) -> Table:
    """Random answers: for each seed its rate of right ones."""
    return {
        seed: {
            (image, number): rng.random() < rate
            for image in range(images)
            for number in range(questions)
        }
        for seed, rate in enumerate(rates)
    }


def accuracies(answers: Table) -> list[float]:
    return [sum(found.values()) / len(found) for found in answers.values()]


@pytest.mark.parametrize(("seeds", "level"), [(3, 0.95), (4, 0.8), (7, 0.99)])
def test_the_t_interval_is_scipys(seeds: int, level: float) -> None:
    """A z in place of t, or n in place of n - 1, makes three seeds look like proof."""
    rng = random.Random(seeds)
    ours = table([rng.uniform(0.5, 0.9) for _ in range(seeds)], 20, 3, rng)
    theirs = table([rng.uniform(0.4, 0.8) for _ in range(seeds)], 20, 3, rng)
    found = paired_difference(ours, theirs, level=level, draws=10)
    expected = stats.ttest_rel(accuracies(ours), accuracies(theirs)).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.mean == pytest.approx(np.mean(accuracies(ours)) - np.mean(accuracies(theirs)))
    assert (found.seeds, found.level, found.method) == (seeds, level, "t")


def test_pairs_are_matched_by_key_not_by_order() -> None:
    """Files list seeds and questions in any order; zipped, they would compare strangers."""
    rng = random.Random(1)
    ours, theirs = table([0.7] * 3, 10, 4, rng), table([0.6] * 3, 10, 4, rng)
    mixed = {seed: dict(sorted(theirs[seed].items(), reverse=True)) for seed in (2, 0, 1)}
    assert paired_difference(ours, mixed) == paired_difference(ours, theirs)


def test_the_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    """An interval that is too narrow finds differences where there are none."""
    rng = random.Random(0)
    trials, covered = 1000, 0
    for _ in range(trials):
        # Two arms of one kind: every run has a rate of its own, and no arm is better.
        rates = [[rng.gauss(0.7, 0.05) for _ in range(4)] for _ in range(2)]
        ours, theirs = (table(rate, 10, 3, rng) for rate in rates)
        covered += paired_difference(ours, theirs, draws=1).verdict == "no difference shown"
    low, high = stats.binom.interval(0.999, trials, 0.95)
    assert low <= covered <= high


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """Resampling questions of one image apart counts every image several times: far too narrow."""
    rng = random.Random(0)
    trials, covered, apart = 200, 0, 0
    for _ in range(trials):
        # All four questions of an image come out alike in either arm, for all of the 8 seeds.
        sides = [[rng.random() < 0.7 for _ in range(40)] for _ in range(2)]
        ours, theirs = (
            {s: {(i, n): side[i] for i in range(40) for n in range(4)} for s in range(8)}
            for side in sides
        )
        low, high = paired_difference(ours, theirs, draws=200).bootstrap
        covered += low <= 0 <= high
        singled = [
            {s: {((i, n),): right for (i, n), right in answers.items()} for s, answers in t.items()}
            for t in (ours, theirs)
        ]
        low, high = paired_difference(singled[0], singled[1], draws=200).bootstrap
        apart += low <= 0 <= high
    # Percentiles of 40 images are a little narrow: 0.93 rather than 0.95.
    assert 0.90 <= covered / trials <= 0.98
    assert apart / trials < 0.7


def test_seeds_that_differ_widen_the_bootstrap() -> None:
    """Pooling all seeds' questions hides that one lucky seed made the difference."""
    rng = random.Random(2)
    theirs = table([0.5] * 4, 200, 1, rng)
    steady = paired_difference(table([0.6] * 4, 200, 1, rng), theirs).bootstrap
    lucky = paired_difference(table([0.5, 0.5, 0.5, 0.9], 200, 1, rng), theirs).bootstrap
    assert lucky[1] - lucky[0] > 1.5 * (steady[1] - steady[0])


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_have_the_bootstrap_alone(seeds: int) -> None:
    """A t interval of one seed is a division by zero, and of two it says nothing."""
    rng = random.Random(3)
    ours, theirs = table([0.9] * seeds, 100, 2, rng), table([0.5] * seeds, 100, 2, rng)
    found = paired_difference(ours, theirs)
    assert found.method == "bootstrap"
    assert (found.low, found.high) == found.bootstrap
    assert found.low < found.mean < found.high
    assert found.verdict == "higher"
    assert paired_difference(theirs, ours).verdict == "lower"
    assert paired_difference(ours, theirs) == found  # seeded
    others = {paired_difference(ours, theirs, seed=seed).bootstrap for seed in range(5)}
    assert len(others) > 1


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_answers_differ_by_nothing(seeds: int) -> None:
    """scipy's own interval is (nan, nan) where the standard error is zero."""
    ours = table([0.6] * seeds, 5, 2, random.Random(4))
    found = paired_difference(ours, ours)
    assert (found.mean, found.low, found.high, found.bootstrap) == (0, 0, 0, (0, 0))
    assert found.verdict == "no difference shown"


def test_seeds_may_have_images_of_their_own() -> None:
    """Where the seed draws the task too, a draw can miss all images of a seed: no NaN from that."""
    ours = {0: {("a", 0): True, ("b", 0): False}, 1: {("c", 0): True}}
    theirs = {seed: dict.fromkeys(answers, False) for seed, answers in ours.items()}
    found = paired_difference(ours, theirs)
    assert found.mean == 0.75
    assert 0 <= found.low <= found.high <= 1


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ({}, {}, r"same seeds on both sides, got \[\] and \[\]"),
        ({0: {("a",): True}}, {1: {("a",): True}}, r"got \[0\] and \[1\]"),
        ({0: {}}, {0: {}}, "at least one question"),
        (
            {0: {("a",): True, ("b",): True}},
            {0: {("b",): True, ("c",): True, ("d",): True}},
            "seed 0: .* got 2 and 3, of which 1 are the same",
        ),
    ],
)
def test_what_cannot_be_paired_is_an_error(ours: Table, theirs: Table, says: str) -> None:
    """Accuracies of different questions subtract without complaint."""
    with pytest.raises(UserError, match=says):
        paired_difference(ours, theirs)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "higher"),
        (-0.2, -0.01, "lower"),
        (0.0, 0.2, "no difference shown"),
        (-0.2, 0.0, "no difference shown"),
    ],
)
def test_a_verdict_needs_zero_outside(low: float, high: float, verdict: str) -> None:
    """An interval that touches zero shows nothing."""
    found = Difference(0.0, low, high, 3, 0.95, "t", (low, high))
    assert found.verdict == verdict
