"""Predictions on a benchmark to the figures that its owners report, with intervals and controls."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import fsum
from statistics import fmean
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from sandbox.data.task import Question
from sandbox.evals import extraction
from sandbox.evals.judging import Judge
from sandbox.evals.metrics import majority_answers
from sandbox.evals.paired import CHUNK, draw_images
from sandbox.evals.predictions import Prediction

LEVEL, DRAWS, SEED = 0.95, 2000, 0  # of the bootstrap
ALL, MEAN = "all questions", "mean of the types"


def figures(
    predictions: Sequence[Prediction], scores: Sequence[float], headline: str
) -> dict[str, Any]:
    """Mean scores of predictions with their 95% intervals, as plain values.

    An interval is the percentiles of 2,000 bootstrap draws of images, each with all its questions,
    as the images are what another test set would change (see ``paired.paired_difference``). It is
    None for a single image; where every question is right, or wrong, it has no width.

    Args:
        predictions: at least one.
        scores: one for each.
        headline: ``ALL`` or ``MEAN``, what the benchmark reports.

    Returns:
        ``score`` and ``interval_95`` of the headline, ``reported`` (which that is), ``questions``,
        ``images``, ``overall``, ``by_type`` and ``mean_of_types``; the parts hold ``score``,
        ``interval_95`` and ``n`` each.
    """
    kinds = sorted({each.kind for each in predictions})
    images = {each.content: None for each in predictions}
    row = {kind: number for number, kind in enumerate(kinds)}
    column = {content: number for number, content in enumerate(images)}
    gained = np.zeros((len(kinds), len(images)))
    asked = np.zeros_like(gained)
    by_kind = defaultdict[str, list[float]](list)
    for each, score in zip(predictions, scores, strict=True):
        by_kind[each.kind].append(score)
        place = row[each.kind], column[each.content]
        gained[place] += score
        asked[place] += 1
    intervals = _intervals(gained, asked)

    def part(found: Sequence[float], interval: list[float] | None) -> dict[str, Any]:
        return {"score": fsum(found) / len(found), "interval_95": interval, "n": len(found)}

    overall = part(scores, intervals[-2])
    by_type = {kind: part(by_kind[kind], intervals[row[kind]]) for kind in kinds}
    mean = {
        "score": fmean(one["score"] for one in by_type.values()),
        "interval_95": intervals[-1],
        "n": len(scores),
    }
    chosen = mean if headline == MEAN else overall
    return {
        "score": chosen["score"],
        "interval_95": chosen["interval_95"],
        "interval": f"bootstrap of images, {DRAWS} draws",
        "reported": f"mean of {' and '.join(kinds)}" if headline == MEAN else ALL,
        "questions": len(scores),
        "images": len(images),
        "overall": overall,
        "by_type": by_type,
        "mean_of_types": mean,
    }


def scored(
    own: Sequence[Prediction],
    controls: Mapping[str, Sequence[Prediction]],
    judge: Judge,
    headline: str,
) -> dict[str, Any]:
    """All figures of an evaluation: every mode, each control, and how extraction went.

    Args:
        own: predictions about each question's own images, at least one, all with a score.
        controls: others, by the name of the control.
        judge: what gave the scores.
        headline: see ``figures``.
    """
    found = figures(own, _scores(own), headline)
    found["metric"] = {
        "name": judge.metric,
        "version": judge.about.version,
        "mode": judge.mode,
    }
    found["modes"] = {
        mode: _brief(figures(own, [judge.score(p.answer, p.targets, mode) for p in own], headline))
        for mode in judge.about.modes
    }
    found["controls"] = {
        name: _brief(figures(each, _scores(each), headline)) for name, each in controls.items()
    }
    found["mean_confidence"] = fmean(each.confidence for each in own)
    return found


def extraction_of(own: Sequence[Prediction], judge: Judge) -> dict[str, Any] | None:
    """How often no answer was found in a reply; None where replies are taken whole."""
    tried = [
        each
        for each in own
        if judge.extract or judge.lettered(Question("", "", "", choices=each.choices))
    ]
    if not tried:
        return None
    failures = sum(each.answer is None for each in tried)
    return {
        "version": extraction.VERSION,
        "replies": len(tried),
        "failures": failures,
        "failure_rate": failures / len(tried),
    }


def majority(
    learned: Iterable[Question],
    own: Sequence[Prediction],
    judge: Judge,
    headline: str,
) -> dict[str, Any]:
    """The score of ``metrics.majority_answers``, which reads the question and sees no image.

    Args:
        learned: training questions, at least one.
        own: predictions, for their questions, types, images and targets.
        judge: the metric.
        headline: see ``figures``.
    """
    asked = [Question(p.question, "", p.kind, choices=p.choices) for p in own]
    guesses = majority_answers(learned, asked)
    whole = replace(judge, extract=False)
    scores = [
        judge.score(whole.found(question, guess), each.targets)
        for question, guess, each in zip(asked, guesses, own, strict=True)
    ]
    return _brief(figures(own, scores, headline))


def table(summary: Mapping[str, Any]) -> Table:
    """A summary for people: a row for each question type, a column for each control.

    A control that could not be had is told as "-"; the summary's notes say why.
    """
    controls = summary["controls"]
    names = [name.replace("_", " ") for name in controls]
    drawn = Table("questions", "score", "95% interval", *names, "n", box=box.SIMPLE_HEAD)

    def row(name: str, part: Mapping[str, Any], of: Callable[[Any], float | None], n: int) -> None:
        low_high = part["interval_95"]
        interval = f"{low_high[0]:.3f}-{low_high[1]:.3f}" if low_high else "-"
        values = (
            f"{v:.3f}" if found and (v := of(found)) is not None else "-"
            for found in controls.values()
        )
        drawn.add_row(name, f"{part['score']:.3f}", interval, *values, f"{n:,}")

    by_type = summary["by_type"]
    for kind, part in by_type.items() if len(by_type) > 1 else ():
        row(kind, part, lambda found, kind=kind: found["by_type"].get(kind), part["n"])  # type: ignore[misc]
    drawn.add_section()
    name = "all" if summary["reported"] == ALL else "mean of types"
    row(name, summary, lambda found: found["score"], summary["questions"])
    return drawn


def _scores(predictions: Sequence[Prediction]) -> list[float]:
    return [each.score or 0.0 for each in predictions]


def _brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """The headline, and the plain scores of the types."""
    return {
        "score": found["score"],
        "interval_95": found["interval_95"],
        "by_type": {kind: one["score"] for kind, one in found["by_type"].items()},
        "n": found["questions"],
    }


def _intervals(gained: np.ndarray, asked: np.ndarray) -> list[list[float] | None]:
    """Of each row, of all rows together, and of their mean; from sums and counts by image.

    Args:
        gained: [types, images]
        asked: [types, images]
    """
    kinds, images = gained.shape
    if images < 2:
        return [None] * (kinds + 2)
    rng = np.random.default_rng(SEED)
    means = []
    for start in range(0, DRAWS, CHUNK):
        times = draw_images(rng, images, min(CHUNK, DRAWS - start)).astype(float)
        sums, counts = times @ gained.T, times @ asked.T  # [draws, types]
        with np.errstate(invalid="ignore"):  # a draw may lack a type
            by_kind = sums / counts
            overall = sums.sum(1) / counts.sum(1)
        means.append(np.column_stack([by_kind, overall, by_kind.mean(1)]))
    bounds = np.nanquantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [[float(low), float(high)] for low, high in bounds.T]
