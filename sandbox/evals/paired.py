"""Two arms on the same questions: how far apart they are, and how sure that is."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import sqrt
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from scipy import stats

from sandbox.errors import UserError

# A question's first part names its image: questions of one image are not independent.
Key = tuple[Hashable, ...]
Answers = Mapping[int, Mapping[Key, bool]]

SEEDS_FOR_T = 3  # with two, the t interval is 12.7 standard errors to either side
CHUNK = 100  # draws of the bootstrap that are in memory at a time


@dataclass(frozen=True)
class Difference:
    """Our accuracy minus theirs, averaged over seeds, with its interval.

    Attributes:
        mean: the plain mean of the seeds' differences.
        low, high: the interval to report, made by ``method``.
        seeds: how many.
        level: confidence of both intervals.
        method: ``t`` from three seeds on, ``bootstrap`` below.
        bootstrap: the hierarchical bootstrap's interval, whichever is reported.
    """

    mean: float
    low: float
    high: float
    seeds: int
    level: float
    method: Literal["t", "bootstrap"]
    bootstrap: tuple[float, float]

    @property
    def verdict(self) -> Literal["higher", "lower", "no difference shown"]:
        """What the reported interval says: it has to leave zero out."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "no difference shown"


def paired_difference(
    ours: Answers, theirs: Answers, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Difference:
    """Compare two arms, seed by seed and question by question.

    The t interval asks what *another training seed* would give on these questions (Student 1908,
    the paired test)::

        mean ± t(n - 1) · sd / sqrt(n)        of the n seeds' differences

    so it knows nothing of other images, and collapses where all seeds happen to differ equally. The
    hierarchical bootstrap asks what other seeds *and other images* would give: each draw resamples
    the seeds, and the images with all of their questions, one choice of images for every seed,
    since the seeds share them (Owen 2007, "The pigeonhole bootstrap"); the interval is the draws'
    percentiles. It is too narrow over few seeds: with one, it speaks of the images alone.

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
    differences = (gained.sum(1) / asked.sum(1)).tolist()
    mean = fmean(differences)
    bootstrap = _bootstrap(gained, asked, level, draws, seed)
    if len(differences) < SEEDS_FOR_T:
        low, high = bootstrap
        return Difference(mean, low, high, len(differences), level, "bootstrap", bootstrap)
    degrees = len(differences) - 1
    reach = float(stats.t.ppf((1 + level) / 2, degrees)) * stdev(differences)
    reach /= sqrt(len(differences))
    return Difference(mean, mean - reach, mean + reach, degrees + 1, level, "t", bootstrap)


def _bootstrap(
    gained: np.ndarray, asked: np.ndarray, level: float, draws: int, seed: int
) -> tuple[float, float]:
    """Percentiles of the mean difference when seeds and images are drawn anew."""
    rng = np.random.default_rng(seed)
    seeds, images = gained.shape
    means = []
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        # How often each draw has each image: one count over all of them, draw after draw.
        drawn = rng.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images)
        with np.errstate(invalid="ignore"):
            by_seed = (times @ gained.T) / (times @ asked.T)  # [draws, seeds]
        chosen = rng.integers(seeds, size=(size, seeds))
        means.append(np.take_along_axis(by_seed, chosen, axis=1).mean(1))
    # Seeds with images of their own may come up without any of them: such a draw says nothing.
    low, high = np.nanquantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
