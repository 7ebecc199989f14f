"""Arms on the same questions: how far each is from the baseline, and how sure that is."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import asin, exp, hypot, log, sqrt
from statistics import fmean
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from sandbox.errors import UserError

# A question's first part names its image: questions of one image are not independent.
Key = tuple[Hashable, ...]
Answers = Mapping[int, Mapping[Key, bool]]

CHUNK = 100  # draws of the bootstrap that are in memory at a time
NOTHING = 1e-18  # a smaller variance of an accuracy is rounding

# Independent parts of a mean's variance, each with the degrees of freedom it was measured with.
Spread = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Difference:
    """Our accuracy minus theirs, averaged over seeds, with its intervals.

    Attributes:
        mean: the plain mean of the seeds' differences.
        low, high: the interval to report: other seeds and other images; with one seed, other images
            alone, and with one image, other seeds alone.
        p: of no difference, two-sided: below ``1 - level`` where the interval leaves zero out.
        standard_error: of the mean.
        degrees: of freedom of the interval's half-width (Satterthwaite 1946).
        seeds, images: how many.
        level: confidence of both intervals.
        bootstrap: the hierarchical bootstrap's interval, to set beside it.
    """

    mean: float
    low: float
    high: float
    p: float
    standard_error: float
    degrees: float
    seeds: int
    images: int
    level: float
    bootstrap: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """One of several arms against the baseline.

    Attributes:
        difference: on the seeds that both have.
        p_adjusted: its p by Holm's method, over all arms of the comparison.
        effect: Cohen's h of the two mean accuracies, ``2 asin √ours - 2 asin √theirs``: 0.2 is
            small, 0.5 medium, 0.8 large (Cohen 1988, "Statistical Power Analysis", section 6.2).
    """

    difference: Difference
    p_adjusted: float
    effect: float

    @property
    def p(self) -> float:
        """The difference's own p, as if this were the only arm."""
        return self.difference.p

    @property
    def verdict(self) -> Literal["higher", "lower", "no difference shown"]:
        """What the adjusted p says. The interval stands alone, so it may leave zero out even so."""
        if self.p_adjusted >= 1 - self.difference.level:
            return "no difference shown"
        return "higher" if self.difference.mean > 0 else "lower"

    @property
    def minimum_detectable(self) -> float:
        """See the function of this name: with a power of 0.8, and before Holm's method."""
        return minimum_detectable(self.difference)


def compare(
    arms: Mapping[str, Answers], baseline: str, *, level: float = 0.95, draws: int = 2000
) -> dict[str, Comparison]:
    """Compare every other arm with the baseline, on the seeds that both have.

    The chance that any of several equal arms is called different is held to ``1 - level`` for all
    of them together, however they depend on each other (Holm 1979, "A simple sequentially rejective
    multiple test procedure").

    Args:
        arms: the answers by arm, see `paired_difference`.
        baseline: an arm.
        level: confidence of each interval, and of all verdicts together.
        draws: of each bootstrap.

    Returns:
        By arm; those that share no seed with the baseline are absent.

    Raises:
        UserError: the baseline is not among the arms, or others were asked other questions.
    """
    from statsmodels.stats.multitest import multipletests  # it imports pandas, which takes seconds

    if baseline not in arms:
        raise UserError(f"the baseline '{baseline}' is not among the arms: {', '.join(arms)}")
    pairs = {}
    for name, answers in arms.items():
        seeds = [seed for seed in answers if seed in arms[baseline]]
        if name != baseline and seeds:
            pairs[name] = [{s: side[s] for s in seeds} for side in (answers, arms[baseline])]
    if not pairs:
        return {}
    differences = {
        name: paired_difference(ours, theirs, level=level, draws=draws)
        for name, (ours, theirs) in pairs.items()
    }
    adjusted = multipletests([d.p for d in differences.values()], method="holm")[1]
    return {
        name: Comparison(differences[name], float(p), _cohens_h(*map(_accuracy, pairs[name])))
        for name, p in zip(pairs, adjusted, strict=True)
    }


def minimum_detectable(difference: Difference, power: float = 0.8) -> float:
    """The smallest true difference that so many seeds and images show with this probability.

    It takes the measured spread for the true one. With standard error s, half-width of the interval
    r, degrees of freedom ν, and T noncentral t with ν and noncentrality δ/s, it is the δ with ::

        P(T > r/s) + P(T < -r/s) = power

    which is exact for one seed or one image, where r/s is Student's t (Cohen 1988, section 2.3).
    Over seeds and images, ν is Satterthwaite's for r², see `paired_difference`.

    Raises:
        ValueError: the power is not between ``1 - level`` and 1.
    """
    if not 1 - difference.level < power < 1:
        raise ValueError(f"power must be between {1 - difference.level:.3g} and 1, got {power}")
    if difference.standard_error == 0:
        return 0.0
    reach = (difference.high - difference.mean) / difference.standard_error
    degrees = difference.degrees

    def lacking(shift: float) -> float:
        # The lower tail is that of -T, as an upper one: scipy's `nct.cdf` gives nan far out.
        shown = stats.nct.sf(reach, degrees, shift) + stats.nct.sf(reach, degrees, -shift)
        return float(power - shown)

    most = reach + 1
    while lacking(most) > 0:
        most *= 2
    return float(optimize.brentq(lacking, 0, most)) * difference.standard_error


def paired_difference(
    ours: Answers, theirs: Answers, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Difference:
    """Compare two arms, seed by seed and question by question.

    Both intervals ask what other seeds *and other images* would give. Seeds and images are crossed,
    so the variance of the mean has a part of either, and noise. With the seeds' differences d[s] of
    S seeds, and the linearised residual of seed s on image i of I (a ratio estimator's, since
    images have several questions: Cochran 1977, "Sampling Techniques", section 6.3) ::

        e[s,i] = (gained[s,i] - d[s] asked[s,i]) / mean over i of asked[s,i]

        A = variance of d[s] / S                          seeds, and noise
        B = variance over i of (mean over s of e) / I     images, and noise
        C = variance of what is left of e / (S I)         noise
        standard error² = A + max(0, B - C)               but at least B

    with S-1, I-1 and (S-1)(I-1) degrees of freedom: two-way clustering (Cameron, Gelbach & Miller
    2011, "Robust inference with multiway clustering"). B - C is what two seeds' errors have in
    common, so it is zero where every seed has images of its own.

    A rests on S-1 degrees of freedom, often two. Satterthwaite's approximation for the sum is then
    too narrow: simulated, up to 8% false positives at 5% with three seeds and 13% with two, and at
    1%, which Holm's method comes to, 3.5% and 8%. So the two half-widths add as lengths at right
    angles (Howe 1974, "Approximate confidence limits on the mean of X + Y"), which kept its level
    in all of these::

        reach² = t(S-1)² A + t(I-1)² max(0, B - C)        but at least t(I-1)² B

    where the bound is that of the images alone: seeds that happen to agree do not make the interval
    narrower. Its p is the level at which the interval touches zero. With one seed, A and C are
    absent. Where nothing varies at all, it is as if one more image had shown no difference.

    The bootstrap resamples the seeds, and the images with all of their questions, one choice of
    images for every seed, since the seeds share them (Owen 2007, "The pigeonhole bootstrap"); the
    interval is the draws' percentiles. It is too narrow over few seeds: with one, it speaks of the
    images alone.

    Args:
        ours: by seed and question, whether the answer was right. A question's key begins with
            whatever names its image.
        theirs: the same seeds and questions.
        level: confidence of the intervals.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: no seed, or not the same seeds and questions on both sides.
    """
    _check(ours, theirs)
    images = {key[0]: None for answers in ours.values() for key in answers}  # a set, but in order
    place = {image: number for number, image in enumerate(images)}
    # For each seed and image: how many more of its questions we have right, and how many it has.
    gained = np.zeros((len(ours), len(images)))
    asked = np.zeros_like(gained)
    for row, (name, answers) in enumerate(ours.items()):
        for key, correct in answers.items():
            gained[row, place[key[0]]] += int(correct) - int(theirs[name][key])
            asked[row, place[key[0]]] += 1
    return _difference(gained, asked, level, draws, seed)


def _difference(
    gained: np.ndarray, asked: np.ndarray, level: float, draws: int, seed: int
) -> Difference:
    """Of counts by seed and image, both [seeds, images]."""
    seeds, images = gained.shape
    mean = fmean((gained.sum(1) / asked.sum(1)).tolist())
    spreads = _spreads(gained, asked) or [[((mean / (images + 1)) ** 2, images)]]
    widest = max(spreads, key=lambda spread: _reach(spread, 1 - level))
    reach = _reach(widest, 1 - level)
    return Difference(
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        p=max(_p(mean, spread) for spread in spreads),
        standard_error=sqrt(max(_variance(spread) for spread in spreads)),
        degrees=_degrees(widest, 1 - level),
        seeds=seeds,
        images=images,
        level=level,
        bootstrap=_bootstrap(gained, asked, level, draws, seed),
    )


def _spreads(gained: np.ndarray, asked: np.ndarray) -> list[Spread]:
    """Of seeds and images, and of images alone, without the parts that are zero.

    Args:
        gained: [seeds, images]
        asked: [seeds, images]
    """
    seeds, images = gained.shape
    by_seed = gained.sum(1) / asked.sum(1)
    residuals = (gained - by_seed[:, None] * asked) / asked.mean(1, keepdims=True)
    by_image = residuals.mean(0)  # their mean is zero, as is each seed's
    left = (residuals - by_image) ** 2
    of_seeds = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    of_images = (by_image**2).sum() / max(1, images * (images - 1))
    noise = left.sum() / max(1, (seeds - 1) * (images - 1) * seeds * images)
    crossed = [(of_seeds, seeds - 1), (of_images - noise, images - 1)]
    found = [
        [(float(variance), degrees) for variance, degrees in spread if variance > NOTHING]
        for spread in (crossed, [(of_images, images - 1)])
    ]
    return [spread for spread in found if spread]


def _variance(spread: Spread) -> float:
    return sum(variance for variance, _ in spread)


def _lengths(spread: Spread, alpha: float) -> list[float]:
    """The half-width that each part alone would have."""
    return [sqrt(v) * -float(special.stdtrit(degrees, alpha / 2)) for v, degrees in spread]


def _reach(spread: Spread, alpha: float) -> float:
    return hypot(*_lengths(spread, alpha))


def _degrees(spread: Spread, alpha: float) -> float:
    """Satterthwaite's degrees of freedom of the squared reach."""
    squares = [length**2 for length in _lengths(spread, alpha)]
    if not sum(squares):
        return float(spread[0][1])
    parts = zip(squares, spread, strict=True)
    return sum(squares) ** 2 / sum(square**2 / degrees for square, (_, degrees) in parts)


def _p(mean: float, spread: Spread) -> float:
    """The alpha whose reach is the mean."""
    if mean == 0:
        return 1.0
    t = abs(mean) / sqrt(_variance(spread))
    # If all of the spread had the degrees of freedom of one part: the truth lies between these.
    found = [2 * float(special.stdtr(degrees, -t)) for _, degrees in spread]
    least, most = max(min(found), 1e-300), max(found)
    if most - least < 1e-12:
        return most
    # A little further out on both sides, where rounding cannot turn the sign.
    bounds = log(least) - 0.01, log(min(1.01 * most, (1 + most) / 2))
    return exp(optimize.brentq(lambda x: log(_reach(spread, exp(x)) / abs(mean)), *bounds))


def _cohens_h(ours: float, theirs: float) -> float:
    return 2 * asin(sqrt(ours)) - 2 * asin(sqrt(theirs))


def _accuracy(answers: Answers) -> float:
    return fmean(fmean(found.values()) for found in answers.values())


def _bootstrap(
    gained: np.ndarray, asked: np.ndarray, level: float, draws: int, seed: int
) -> tuple[float, float]:
    """Percentiles of the mean difference when seeds and images are drawn anew."""
    rng = np.random.default_rng(seed)
    seeds, images = gained.shape
    means = []
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        times = draw_images(rng, images, size)
        with np.errstate(invalid="ignore"):
            by_seed = (times @ gained.T) / (times @ asked.T)  # [draws, seeds]
        chosen = rng.integers(seeds, size=(size, seeds))
        means.append(np.take_along_axis(by_seed, chosen, axis=1).mean(1))
    # Seeds with images of their own may come up without any of them: such a draw says nothing.
    low, high = np.nanquantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draw_images(rng: np.random.Generator, images: int, draws: int) -> np.ndarray:
    """How often each draw of as many images as there are has each: int64 ``[draws, images]``."""
    # One count over all of them, draw after draw.
    drawn = rng.integers(images, size=(draws, images)) + images * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * images).reshape(draws, images)


def _check(ours: Answers, theirs: Answers) -> None:
    if not ours or ours.keys() != theirs.keys():
        raise UserError(
            f"a paired comparison needs the same seeds on both sides, got {sorted(ours)} and "
            f"{sorted(theirs)}"
        )
    if not all(chain(ours.values(), theirs.values())):
        raise UserError("a paired comparison needs at least one question for every seed")
    for seed, answers in ours.items():
        if answers.keys() != theirs[seed].keys():
            shared = len(answers.keys() & theirs[seed].keys())
            raise UserError(
                f"seed {seed}: a paired comparison needs the same questions on both sides, got "
                f"{len(answers)} and {len(theirs[seed])}, of which {shared} are the same; test "
                "both on one task"
            )
