"""Pure scoring functions: the match of one answer, baselines no model should lose to, intervals."""

from __future__ import annotations  # Question is named in annotations alone

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # it loads an image library, and `sandbox score` needs none
    from sandbox.data.task import Question

EXACT_VERSION = "1"


class Scored(NamedTuple):
    """The score of one answer, from 0 to 1, and the answer in the form in which it was compared."""

    score: float
    normalised: str


def exact(prediction: str, answers: Sequence[str]) -> Scored:
    """Whether a prediction is an ``exact_match`` of any of the accepted answers."""
    matched = any(exact_match(prediction, answer) for answer in answers)
    return Scored(float(matched), _plain(prediction))


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two answers are equal but for case and surrounding white space.

    The exact match of Rajpurkar et al. 2016 (SQuAD), without its removal of articles and
    punctuation: our answers are single words and numbers.
    """
    return _plain(prediction) == _plain(reference)


def mean_by_kind(questions: Sequence[Question], scores: Sequence[float]) -> dict[str, float]:
    """The mean score of each question type, types in alphabetical order.

    Raises:
        ValueError: there is not one score for every question.
    """
    if len(questions) != len(scores):
        raise ValueError(f"{len(questions)} questions but {len(scores)} scores")
    by_kind = defaultdict[str, list[float]](list)
    for question, score in zip(questions, scores, strict=True):
        by_kind[question.kind].append(score)
    return {kind: fmean(by_kind[kind]) for kind in sorted(by_kind)}


def majority_answers(train: Iterable[Question], test: Iterable[Question]) -> list[str]:
    """What a guesser answers who reads the question but sees no image.

    It gives the answer that is the most frequent for the same question text in ``train``; for a
    text that ``train`` lacks, the most frequent of the question's type; for an unknown type, the
    most frequent of all. Ties go to the alphabetically first. This is the "per question type prior"
    of Antol et al. 2015 (VQA, section 5), refined from the type to the wording.

    Raises:
        ValueError: ``train`` is empty.
    """
    texts, kinds = defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    everything = Counter[str]()
    for question in train:
        answer = _plain(question.answer)
        for counts in (texts[_plain(question.text)], kinds[question.kind], everything):
            counts[answer] += 1
    if not everything:
        raise ValueError("the majority baseline needs at least one training question")
    return [
        _most_frequent(texts.get(_plain(q.text)) or kinds.get(q.kind) or everything) for q in test
    ]


def majority_baseline(train: Iterable[Question], test: Sequence[Question]) -> float:
    """The accuracy on ``test`` of ``majority_answers``: the blind baseline.

    Raises:
        ValueError: ``train`` or ``test`` is empty.
    """
    if not test:
        raise ValueError("the majority baseline needs at least one test question")
    return fmean(_majority_scores(train, test))


def majority_baseline_by_kind(
    train: Iterable[Question], test: Sequence[Question]
) -> dict[str, float]:
    """``majority_baseline`` for each question type of ``test``."""
    return mean_by_kind(test, _majority_scores(train, test))


def guess_among_present(questions: Iterable[Question]) -> float:
    """The expected accuracy of a guesser who sees what is present, but not what belongs together.

    Asked for the colour of the circle, it names any colour in the picture: each answer of
    ``Question.present`` with equal chance. Questions that list nothing are left out.

    Raises:
        ValueError: no question lists what is present.
    """
    chances = []
    for question in questions:
        present = [_plain(answer) for answer in question.present]
        if present:
            chances.append(present.count(_plain(question.answer)) / len(present))
    if not chances:
        raise ValueError("no question lists the answers present in its picture")
    return fmean(chances)


def wilson_interval(correct: float, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of an accuracy, from ``correct`` of ``total`` independent trials.

    Wilson's score interval (E. B. Wilson, "Probable inference, the law of succession, and
    statistical inference", JASA 22, 1927)::

        (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    ``correct`` may also be a sum of scores between 0 and 1: right and wrong answers have the
    largest variance p(1 - p) that such scores of mean p can have, so the interval is at most too
    wide. Questions about one image are not independent: over such questions it is too narrow.

    Raises:
        ValueError: not ``0 <= correct <= total``, no trial, or confidence outside (0, 1).
    """
    if total < 1 or not 0 <= correct <= total or not 0 < confidence < 1:
        raise ValueError(
            f"an interval needs 0 <= correct <= total, total >= 1 and 0 < confidence < 1, "
            f"got {correct} of {total} at {confidence}"
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = correct / total
    middle = p + z**2 / (2 * total)
    reach = z * sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # Rounding may push a bound beyond the ends by 1e-17.
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def _plain(text: str) -> str:
    return text.strip().casefold()


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _majority_scores(train: Iterable[Question], test: Sequence[Question]) -> list[bool]:
    guesses = majority_answers(train, test)
    return [exact_match(guess, q.answer) for guess, q in zip(guesses, test, strict=True)]
