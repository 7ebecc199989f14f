"""Arms compared: against scipy and statsmodels, under simulated truths, where nothing varies."""

import random
from dataclasses import asdict, replace
from math import isfinite

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_effectsize

from sandbox.errors import UserError
from sandbox.evals import paired
from sandbox.evals.paired import (
    Comparison,
    Difference,
    compare,
    minimum_detectable,
    paired_difference,
)

Table = dict[int, dict[tuple[int, int], bool]]
FOUND = Difference(0.1, 0.02, 0.18, 0.01, 0.04, 40.0, 3, 60, 0.95, (0.03, 0.17))


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


def uneven(rates: list[float], images: int, rng: random.Random) -> Table:
    """Random answers to one to seven questions an image; images with more of them are harder."""
    return {
        seed: {
            (image, number): rng.random() < rate - image % 7 / 20
            for image in range(images)
            for number in range(1 + image % 7)
        }
        for seed, rate in enumerate(rates)
    }


def accuracies(answers: Table) -> list[float]:
    return [sum(found.values()) / len(found) for found in answers.values()]


def counts(
    seeds: int,
    sds: tuple[float, float],
    rng: np.random.Generator,
    shift: float = 0,
    images: int = 40,
) -> tuple[np.ndarray, np.ndarray]:
    """Two arms, one better by ``shift``, as gained and asked questions, each [seeds, images].

    Args:
        seeds: of each arm.
        sds: of what a seed of an arm, and an image for an arm, adds to the rate of right answers.
        rng: of all that is random: how hard an image is, and how many questions it has, too.
        shift: how much better.
        images: how many.
    """
    asked = np.broadcast_to(rng.integers(1, 5, images), (seeds, images))
    common = rng.normal(0.6, 0.1, images) + rng.normal(0, 0.05, (seeds, images))
    right = [
        rng.binomial(
            asked,
            np.clip(
                common
                + better
                + rng.normal(0, sds[0], (seeds, 1))
                + rng.normal(0, sds[1], (1, images)),
                0,
                1,
            ),
        )
        for better in (shift / 2, -shift / 2)
    ]
    return (right[0] - right[1]).astype(float), asked.astype(float)


def simulated(
    seeds: int, sds: tuple[float, float], trials: int, shift: float = 0
) -> list[Difference]:
    rng = np.random.default_rng(seeds)
    made = (counts(seeds, sds, rng, shift) for _ in range(trials))
    return [paired._difference(*each, level=0.95, draws=1, seed=0) for each in made]


# --- The interval ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "level"), [(4, 0.95), (30, 0.8), (200, 0.99)])
def test_one_seed_has_scipys_t_over_images(images: int, level: float) -> None:
    """A z in place of t, or n in place of n - 1, makes a few images look like proof."""
    rng = random.Random(images)
    ours, theirs = table([0.8], images, 1, rng), table([0.5], images, 1, rng)
    found = paired_difference(ours, theirs, level=level, draws=1)
    expected = stats.ttest_rel(*([float(x) for x in t[0].values()] for t in (ours, theirs)))
    bounds = expected.confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.seeds, found.images, found.degrees) == (1, images, pytest.approx(images - 1))


@pytest.mark.parametrize("images", ["one", "of its own", "very many"])
def test_where_images_do_not_matter_it_is_scipys_t_over_seeds(images: str) -> None:
    """Counting every image of every seed as a trial of its own makes three seeds look like ten."""
    rng = random.Random(1)
    rates = [0.5, 0.7, 0.9, 0.65]
    shape = {"one": (1, 50), "of its own": (20, 3), "very many": (5000, 1)}[images]
    ours, theirs = table(rates, *shape, rng), table([0.4] * 4, *shape, rng)
    if images == "of its own":
        ours, theirs = (
            {s: {(f"{s} {i}", n): x for (i, n), x in t[s].items()} for s in t}
            for t in (ours, theirs)
        )
    found = paired_difference(ours, theirs, draws=1)
    expected = stats.ttest_rel(accuracies(ours), accuracies(theirs))
    bounds = expected.confidence_interval(0.95)
    close = 0.01 if images == "very many" else 1e-9
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), rel=close)
    assert found.p == pytest.approx(expected.pvalue, rel=close)
    assert found.degrees == pytest.approx(3, rel=close)
    assert found.mean == pytest.approx(np.mean(accuracies(ours)) - np.mean(accuracies(theirs)))


def test_images_with_more_questions_weigh_more() -> None:
    """The variance of the mean over images is not that of a ratio: the jackknife tells them apart.

    Here images with more questions are harder, so that numerator and denominator go together.
    """
    rng = random.Random(2)
    ours, theirs = uneven([0.95], 140, rng), uneven([0.5], 140, rng)
    theirs = {0: {key: right and key[0] % 3 > 0 for key, right in theirs[0].items()}}
    found = paired_difference(ours, theirs, draws=1)
    without = [
        np.mean([ours[0][key] - theirs[0][key] for key in ours[0] if key[0] != image])
        for image in range(140)
    ]
    jackknife = np.sqrt(139 * np.var(without))
    assert found.standard_error == pytest.approx(jackknife, rel=0.02)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_standard_error_is_that_of_the_means(shift: float) -> None:
    """Adding the seeds' and the images' variance without taking off the noise counts it twice."""
    found = simulated(5, (0.08, 0.2), 1000, shift)
    expected = np.var([each.mean for each in found])
    assert np.mean([each.standard_error**2 for each in found]) == pytest.approx(expected, rel=0.13)


def test_seeds_that_differ_equally_are_worth_one() -> None:
    """Copies of one seed have no variance between them: the images' must remain."""
    rng = random.Random(3)
    ours, theirs = table([0.7], 40, 2, rng), table([0.5], 40, 2, rng)
    one = paired_difference(ours, theirs)
    copied = paired_difference(*(dict.fromkeys(range(3), t[0]) for t in (ours, theirs)))
    assert one.low < one.mean < one.high
    for field in ("mean", "low", "high", "p", "standard_error"):
        assert getattr(copied, field) == pytest.approx(getattr(one, field), rel=1e-9)


def test_seeds_that_agree_by_chance_do_not_make_the_interval_narrower() -> None:
    """The means of three seeds agree now and then, and t over seeds would call that proof."""
    rng = np.random.default_rng(0)
    asked = np.ones((3, 30))
    for _ in range(50):
        gained = rng.permuted(np.repeat([[1.0] * 8 + [-1.0] * 5 + [0.0] * 17], 3, axis=0), axis=1)
        found = paired._difference(gained, asked, level=0.95, draws=1, seed=0)
        alone = stats.ttest_1samp(gained.mean(0), 0)
        assert found.p == pytest.approx(alone.pvalue, rel=1e-9)


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_answers_differ_by_nothing(seeds: int) -> None:
    """scipy's own interval is (nan, nan) where the standard error is zero."""
    ours = table([0.6] * seeds, 5, 2, random.Random(4))
    found = paired_difference(ours, ours)
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert (found.bootstrap, found.standard_error, minimum_detectable(found)) == ((0, 0), 0, 0)


@pytest.mark.parametrize(
    ("seeds", "images", "shown"),
    [(1, 1, False), (1, 2, False), (3, 1, False), (2, 2, False), (1, 20, True), (3, 20, True)],
)
def test_without_any_variance_few_images_show_nothing(seeds: int, images: int, shown: bool) -> None:
    """One image that one arm gets right and the other wrong has p = 0 by the t formula, or nan."""
    right = {seed: {(image,): True for image in range(images)} for seed in range(seeds)}
    wrong = {seed: dict.fromkeys(answers, False) for seed, answers in right.items()}
    found = paired_difference(right, wrong)
    plain = [value for value in asdict(found).values() if not isinstance(value, tuple)]
    assert all(map(isfinite, plain))
    assert found.mean == 1
    assert (found.p < 0.05) == (found.low > 0) == shown
    assert paired_difference(wrong, right).p == found.p


def test_seeds_may_have_images_of_their_own() -> None:
    """Where the seed draws the task too, a draw can miss all images of a seed: no NaN from that."""
    ours = {0: {("a", 0): True, ("b", 0): False}, 1: {("c", 0): True}}
    theirs = {seed: dict.fromkeys(answers, False) for seed, answers in ours.items()}
    found = paired_difference(ours, theirs)
    assert found.mean == 0.75
    assert found.low < 0.75 < found.high
    assert 0 <= found.bootstrap[0] <= found.bootstrap[1] <= 1


def test_pairs_are_matched_by_key_not_by_order() -> None:
    """Files list seeds and questions in any order; zipped, they would compare strangers."""
    rng = random.Random(1)
    ours, theirs = table([0.7] * 3, 10, 4, rng), table([0.6] * 3, 10, 4, rng)
    mixed = {seed: dict(sorted(theirs[seed].items(), reverse=True)) for seed in (2, 0, 1)}
    assert paired_difference(ours, mixed) == paired_difference(ours, theirs)


@pytest.mark.parametrize(
    ("mean", "spread"),
    [
        (1e-17, [(1e-4, 2), (1e-4, 59)]),
        (1e-9, [(1e-6, 1), (1e-9, 2000)]),
        (0.03, [(1e-4, 2), (2e-4, 59)]),
        (1.0, [(1e-12, 2), (1e-4, 59)]),
        (1.0, [(1e-6, 1), (1e-5, 2000)]),
    ],
)
def test_p_is_where_the_interval_touches_zero(mean: float, spread: paired.Spread) -> None:
    """Verdicts by p and by interval must not disagree, nor the search fail at its ends."""
    p = paired._p(mean, spread)
    assert 0 < p <= 1
    if p < 0.999:
        assert paired._reach(spread, p) == pytest.approx(mean, rel=1e-6)


# --- How often it is right ------------------------------------------------------------------------

# Standard deviations of what a seed of an arm, and an image for an arm, adds to the rate.
BOTH, SEEDS_ABOVE_ALL, IMAGES_ABOVE_ALL = (0.08, 0.2), (0.2, 0.1), (0.0, 0.3)


@pytest.mark.parametrize("sds", [BOTH, SEEDS_ABOVE_ALL, IMAGES_ABOVE_ALL])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_arms_are_found_different_as_seldom_as_it_says(
    seeds: int, sds: tuple[float, float]
) -> None:
    """t over seeds forgets other images, t over images other seeds; Satterthwaite trusts few seeds.

    Each is beyond 7% in one of these.
    """
    found = simulated(seeds, sds, 1000)
    assert np.mean([each.p < 0.05 for each in found]) <= 0.07
    assert np.mean([each.low > 0 or each.high < 0 for each in found]) <= 0.07


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_of_four_standard_errors_is_found_most_of_the_time(seeds: int) -> None:
    """An interval that never leaves zero out is never wrong, and of no use."""
    error = np.std([each.mean for each in simulated(seeds, BOTH, 500)])
    found = simulated(seeds, BOTH, 500, shift=4 * error)
    assert np.mean([each.low > 0 for each in found]) > 0.55


def test_many_equal_arms_are_seldom_called_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a correction, one of several equal arms is found different in many a report."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels does at every call: 0.1 s each
    rng = np.random.default_rng(0)
    trials, seeds, images, wrong, alone = 1000, 3, 16, 0, 0
    for _ in range(trials):
        rates = rng.normal(0.6, 0.1, (5, seeds, 1)) + rng.normal(0, 0.3, (5, 1, images))
        right = rng.random((5, seeds, images)) < rates
        arms = {
            str(arm): {s: {(i,): bool(right[arm, s, i]) for i in range(images)} for s in range(3)}
            for arm in range(5)
        }
        found = compare(arms, "0", draws=1).values()
        wrong += any(each.verdict != "no difference shown" for each in found)
        alone += any(each.p < 0.05 for each in found)
    assert wrong / trials <= 0.07
    assert alone > 1.5 * wrong


@pytest.mark.parametrize("equally_many", [True, False])
def test_the_bootstrap_is_scipys_over_images(equally_many: bool) -> None:
    """Percentiles off by one tail, or questions of one image drawn apart, are still an interval."""
    rng = random.Random(5)
    images = 42
    ours, theirs = (
        table([rate], images, 1, rng) if equally_many else uneven([rate], images, rng)
        for rate in (0.8, 0.5)
    )
    found = paired_difference(ours, theirs, level=0.9, draws=10_000).bootstrap
    gained, asked = np.zeros(images), np.zeros(images)
    for key, right in ours[0].items():
        gained[key[0]] += right - theirs[0][key]
        asked[key[0]] += 1
    expected = stats.bootstrap(
        (gained, asked),
        lambda gained, asked, axis: gained.sum(axis) / asked.sum(axis),
        paired=True,
        method="percentile",
        confidence_level=0.9,
        n_resamples=10_000,
        batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = expected.high - expected.low
    assert found == pytest.approx((expected.low, expected.high), abs=0.04 * width)


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


def test_seeds_that_differ_widen_both_intervals() -> None:
    """Pooling all seeds' questions hides that one lucky seed made the difference."""
    rng = random.Random(2)
    theirs = table([0.5] * 4, 200, 1, rng)
    steady = paired_difference(table([0.6] * 4, 200, 1, rng), theirs)
    lucky = paired_difference(table([0.5, 0.5, 0.5, 0.9], 200, 1, rng), theirs)
    assert lucky.high - lucky.low > 1.5 * (steady.high - steady.low)
    narrow, wide = (found.bootstrap[1] - found.bootstrap[0] for found in (steady, lucky))
    assert wide > 1.5 * narrow


def test_the_bootstrap_is_seeded() -> None:
    """A report that changes when it is written again cannot be checked."""
    rng = random.Random(3)
    ours, theirs = table([0.9] * 2, 100, 2, rng), table([0.5] * 2, 100, 2, rng)
    assert paired_difference(ours, theirs) == paired_difference(ours, theirs)
    others = {paired_difference(ours, theirs, seed=seed).bootstrap for seed in range(5)}
    assert len(others) > 1


# --- Several arms ---------------------------------------------------------------------------------


def test_holms_method_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bonferroni finds less, no correction too much; sorted p values must find their arms again.

    Sorted: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1, which may not be below the one before.
    """
    rng = random.Random(0)
    values = {"b": 0.01, "c": 0.04, "d": 0.03, "e": 0.005}
    given = iter(values.values())
    arms = {name: table([0.5] * 3, 2, 1, rng) for name in "abcde"}
    monkeypatch.setattr(paired, "paired_difference", lambda *_, **__: replace(FOUND, p=next(given)))
    found = compare(arms, "a")
    assert {name: each.p for name, each in found.items()} == values
    expected = {"b": 0.03, "c": 0.06, "d": 0.06, "e": 0.02}
    assert {name: each.p_adjusted for name, each in found.items()} == pytest.approx(expected)
    shown = [name for name, each in found.items() if each.verdict == "higher"]
    assert shown == ["b", "e"]


@pytest.mark.parametrize(
    ("mean", "p", "verdict"),
    [
        (0.1, 0.049, "higher"),
        (-0.1, 0.049, "lower"),
        (0.1, 0.051, "no difference shown"),
        (-0.1, 0.9, "no difference shown"),
    ],
)
def test_a_verdict_goes_by_the_adjusted_p(mean: float, p: float, verdict: str) -> None:
    """An interval of one arm leaves zero out sooner or later, if there are enough arms."""
    found = Comparison(replace(FOUND, mean=mean), p, 0.2)
    assert found.verdict == verdict
    assert found.p == FOUND.p


def test_the_effect_is_cohens_h_of_the_shared_seeds() -> None:
    """Accuracies over other seeds than the difference is of would tell of another comparison."""
    rng = random.Random(7)
    base, arm = table([0.5] * 3, 30, 2, rng), table([0.7] * 4, 30, 2, rng)
    del base[0]
    other = {9: arm[0]}
    found = compare({"arm": arm, "base": base, "other": other}, "base")
    assert list(found) == ["arm"]
    shared = {seed: arm[seed] for seed in (1, 2)}
    base = {seed: base[seed] for seed in (1, 2)}
    ours, theirs = np.mean(accuracies(shared)), np.mean(accuracies(base))
    assert found["arm"].effect == pytest.approx(proportion_effectsize(ours, theirs))
    assert found["arm"].difference == paired_difference(shared, base)
    assert found["arm"].p_adjusted == found["arm"].p  # the only one
    assert found["arm"].minimum_detectable == minimum_detectable(found["arm"].difference)
    assert compare({"base": base}, "base") == {}


def test_a_baseline_that_is_no_arm_is_an_error() -> None:
    """A typo must not end in an empty report."""
    with pytest.raises(UserError, match="baseline 'b' is not among the arms: a"):
        compare({"a": {}}, "b")


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


# --- What would have been found -------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.06, 0.5, 0.8, 0.95])
def test_with_one_seed_the_detectable_difference_is_statsmodels(power: float) -> None:
    """A normal distribution in place of noncentral t promises too much of a few images."""
    rng = random.Random(8)
    found = paired_difference(table([0.7], 8, 2, rng), table([0.4], 8, 2, rng), draws=1)
    size = TTestPower().solve_power(nobs=8, alpha=0.05, power=power, alternative="two-sided")
    expected = size * found.standard_error * np.sqrt(8)
    assert minimum_detectable(found, power) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"between 0\.05 and 1, got 0\.01"):
        minimum_detectable(found, 0.01)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_detectable_difference_is_found_as_often_as_it_says(seeds: int, share: float) -> None:
    """A power that takes the images' degrees of freedom for the seeds' plans too few seeds."""
    rng = np.random.default_rng(seeds)
    images, trials, noise = 30, 1000, 0.1
    # By the variance of the mean: seeds, images, and noise.
    parts = np.array([share, 1 - share, noise]) * 1e-4
    spread = [(parts[0] + parts[2], seeds - 1), (parts[1], images - 1)]
    reach = paired._reach(spread, 0.05)
    true = replace(
        FOUND,
        low=FOUND.mean - reach,
        high=FOUND.mean + reach,
        standard_error=np.sqrt(parts.sum()),
        degrees=paired._degrees(spread, 0.05),
    )
    difference, scale = minimum_detectable(true), np.sqrt(parts * [seeds, images, seeds * images])
    shown = 0
    for _ in range(trials):
        gained = (
            difference
            + rng.normal(0, scale[0], (seeds, 1))
            + rng.normal(0, scale[1], (1, images))
            + rng.normal(0, scale[2], (seeds, images))
        )
        asked = np.ones((seeds, images))
        shown += paired._difference(gained, asked, level=0.95, draws=1, seed=0).p < 0.05
    assert shown / trials == pytest.approx(0.8, abs=0.04)
