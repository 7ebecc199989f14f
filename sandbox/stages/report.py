"""What a ladder found: a table, the differences from the baseline, and a picture of both."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import yaml
from matplotlib.figure import Figure

from sandbox.evals.paired import Comparison, Difference, Key, compare, paired_difference
from sandbox.runs import CONFIG
from sandbox.stages.plan import TEST, Ladder
from sandbox.stages.run import Mark

CONTROLS = {  # a column of the table, and its key in a run's summary
    "held out": "heldout_combination_accuracy",
    "exchanged": "shuffled_image_accuracy",
    "reordered": "reordered_image_accuracy",
    "majority": "blind_majority_accuracy",
}
NOTES = """\
Accuracies of exact match; all but the seeds' columns are means over seeds. *held out*: combinations
that training never showed; *exchanged*: the same questions with another picture; *reordered*: with
the same pictures in another order; *majority*: the commonest answer; *samples*: batch size × steps,
summed over the stages that the arm builds on (a sample is a picture, or its description where a
stage reads text)."""
CORRECTED = """\
A verdict goes by its p value after Holm's correction: were all arms like the baseline, at most one
report of twenty would call any of them higher or lower. Each interval stands alone, so it may leave
zero out without a verdict. It reckons with other seeds and other images; so does the bootstrap,
which is too narrow over few seeds. Cohen's *h*: 0.2 is small, 0.5 medium, 0.8 large."""


@dataclass(frozen=True)
class Arm:
    """What the tests of one arm found, by seed.

    Attributes:
        name: the arm.
        stage: what was tested.
        summaries: ``summary.json`` of each test.
        answers: whether each question about an unseen picture was answered rightly.
        samples: what all of its stages trained on, if the configurations tell.
    """

    name: str
    stage: str
    summaries: Mapping[int, dict[str, Any]]
    answers: Mapping[int, Mapping[Key, bool]]
    samples: int | None

    def mean(self, key: str) -> float | None:
        """The mean of an entry of the summaries; None where one lacks it."""
        found = [v for summary in self.summaries.values() if (v := summary.get(key)) is not None]
        return fmean(found) if len(found) == len(self.summaries) else None

    @property
    def by_question(self) -> dict[str, float]:
        """The mean accuracy on each question type that all seeds were asked."""
        found = [summary["by_question"] for summary in self.summaries.values()]
        shared = [kind for kind in found[0] if all(kind in other for other in found)]
        return {kind: fmean(each[kind]["accuracy"] for each in found) for kind in shared}

    @property
    def accuracy(self) -> Difference:
        """The mean over seeds and its interval: the difference from an arm that is never right."""
        never = {seed: dict.fromkeys(found, False) for seed, found in self.answers.items()}
        return paired_difference(self.answers, never)


def report(ladder: Ladder, out: Path) -> str | None:
    """Write ``report.md``, ``results.json`` and ``report.png`` about the tests that have finished.

    Returns:
        The text of ``report.md``; None if no test has finished.

    Raises:
        UserError: an arm was asked other questions than the baseline.
    """
    arms = [arm for name in ladder.arms if (arm := _arm(ladder, out, name)).answers]
    if not arms:
        return None
    answers = {arm.name: arm.answers for arm in arms}
    found = compare(answers, ladder.baseline) if ladder.baseline in answers else {}
    costs = _costs(ladder, out)
    results = {
        "question": ladder.question,
        "baseline": ladder.baseline,
        "arms": {arm.name: _plain(arm, found.get(arm.name)) for arm in arms},
        "stages": costs,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    text = "\n\n".join(_sections(ladder, arms, found, costs)) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    _draw(ladder, arms, found).savefig(out / "report.png", dpi=150)
    return text


def sentence(name: str, baseline: str, found: Comparison) -> str:
    """What an arm's comparison shows, in words."""
    of = found.difference
    claim = f"{found.verdict} {'from' if found.verdict == 'no difference shown' else 'than'}"
    text = (
        f"**{name}**: {claim} {baseline} ({of.mean:+.3f}, {of.level:.0%} interval "
        f"{_interval(of.low, of.high)}, adjusted {_chance(found.p_adjusted)}, *h* = "
        f"{found.effect:+.2f}; bootstrap {_interval(*of.bootstrap)}; {_count(of.seeds, 'seed')}, "
        f"{_count(of.images, 'image')})."
    )
    if of.seeds == 1:
        text += " With one seed it speaks of other images, not of other seeds."
    elif of.images == 1:
        text += " With one image it speaks of other seeds, not of other images."
    if found.verdict == "no difference shown" and (least := found.minimum_detectable):
        text += f" A true difference of {least:.3f} would have been shown with a power of 80%."
    return text


# --- Reading --------------------------------------------------------------------------------------


def _arm(ladder: Ladder, out: Path, name: str) -> Arm:
    stage = ladder.arms[name]
    tests = {seed: ladder.run_name(stage, seed) + TEST for seed in ladder.seeds}
    tests = {seed: test for seed, test in tests.items() if _finished(out, test)}
    nodes = ladder.lineage(stage, next(iter(tests))) if tests else []
    samples = [_samples(out / ladder.run_name(*node)) for node in nodes]
    return Arm(
        name,
        stage,
        {s: json.loads((out / test / "summary.json").read_text()) for s, test in tests.items()},
        {s: _answers(out / test / "predictions.jsonl") for s, test in tests.items()},
        None if None in samples else sum(n for n in samples if n is not None),
    )


def _finished(out: Path, name: str) -> bool:
    mark = Mark.read(out, name)
    return mark is not None and mark.finished


def _answers(path: Path) -> dict[Key, bool]:
    """The answers about unseen pictures, each under its picture, place and wording."""
    found: dict[Key, bool] = {}
    with path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record["split"] == "test" and record["images"] == "own":
                key = (record["content"], record["index"], record["question"], record["kind"])
                number = 0  # a picture may be asked the same twice
                while (*key, number) in found:
                    number += 1
                found[*key, number] = record["correct"]
    return found


def _samples(run: Path) -> int | None:
    """Batch size × batches of a finished run, on one process."""
    try:
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        steps = config["trainer"]["max_steps"] * config["trainer"].get("accumulate_grad_batches", 1)
        return config["data"]["init_args"]["batch_size"] * steps if steps > 0 else None
    except (OSError, KeyError, TypeError):
        return None  # of a data module of another kind, or one that trains by epochs


def _costs(ladder: Ladder, out: Path) -> dict[str, Any]:
    """By stage: its samples, and what it took for each seed."""
    nodes = {
        node: None
        for seed in ladder.seeds
        for tested in ladder.arms.values()
        for node in ladder.lineage(tested, seed)
    }
    costs: dict[str, Any] = {}
    for stage, seed in nodes:
        name = ladder.run_name(stage, seed)
        mark = Mark.read(out, name)
        if mark and mark.finished:
            cost = costs.setdefault(stage, {"samples": _samples(out / name), "seeds": {}})
            cost["seeds"][str(seed)] = asdict(mark)
    return costs


# --- Writing --------------------------------------------------------------------------------------


def _plain(arm: Arm, found: Comparison | None) -> dict[str, Any]:
    accuracy = arm.accuracy
    return {
        "stage": arm.stage,
        "accuracy": {str(seed): summary["accuracy"] for seed, summary in arm.summaries.items()},
        "mean": arm.mean("accuracy"),
        "interval": [accuracy.low, accuracy.high],
        "by_question": arm.by_question,
        **{key: arm.mean(key) for key in CONTROLS.values()},
        "samples": arm.samples,
        "comparison": found
        and {
            **asdict(found),
            "verdict": found.verdict,
            "minimum_detectable": found.minimum_detectable,
        },
    }


def _sections(
    ladder: Ladder,
    arms: Sequence[Arm],
    comparisons: Mapping[str, Comparison],
    costs: Mapping[str, Any],
) -> Iterable[str]:
    yield f"# {ladder.question}"
    seeds = ladder.seeds
    controls = {n: key for n, key in CONTROLS.items() if any(a.mean(key) is not None for a in arms)}
    yield _table(
        ["arm", *(f"seed {seed}" for seed in seeds), "mean", *controls, "samples"],
        [
            [
                arm.name,
                *(_number(arm.summaries.get(seed, {}).get("accuracy")) for seed in seeds),
                *(_number(arm.mean(key)) for key in ("accuracy", *controls.values())),
                _number(arm.samples),
            ]
            for arm in arms
        ],
    )
    yield NOTES
    yield f"## Against the baseline: {ladder.baseline}"
    if comparisons:
        lines = (sentence(name, ladder.baseline, found) for name, found in comparisons.items())
        yield "\n".join(f"- {line}" for line in lines)
        yield CORRECTED
    else:
        yield "Nothing to compare: no seed of the baseline and of another arm has finished."
    yield "![Accuracy of each arm, and its difference from the baseline](report.png)"
    yield "## By question type"
    kinds = list(dict.fromkeys(kind for arm in arms for kind in arm.by_question))
    by_question = [[arm.name, *(_number(arm.by_question.get(k)) for k in kinds)] for arm in arms]
    yield _table(["arm", *kinds], by_question)
    yield "## CPU time"
    yield _table(
        ["stage", *(f"seed {seed}" for seed in seeds), "samples"],
        [
            [name, *(_time(cost["seeds"].get(str(s))) for s in seeds), _number(cost["samples"])]
            for name, cost in costs.items()
        ],
    )
    yield "Hours, minutes and seconds on all cores; `+`: resumed, without the time before that."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    align = ["---", *("--:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, align, *rows))


def _number(value: int | float | None) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else f"{value:.3f}"


def _interval(low: float, high: float) -> str:
    return f"{low:+.3f} to {high:+.3f}"


def _chance(p: float) -> str:
    return "*p* < 0.001" if p < 0.001 else f"*p* = {p:.3f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number > 1)}"


def _time(took: Mapping[str, Any] | None) -> str:
    if took is None:
        return "-"
    return f"{timedelta(seconds=round(took['cpu_seconds']))}{'+' * took['resumed']}"


def _draw(ladder: Ladder, arms: Sequence[Arm], comparisons: Mapping[str, Comparison]) -> Figure:
    """Arms from top to bottom: accuracies on the left, differences on the right."""
    figure = Figure(figsize=(10, 1.6 + 0.55 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, arm in enumerate(arms):
        accuracy, colour = arm.accuracy, f"C{row % 10}"
        left.plot([max(accuracy.low, 0), min(accuracy.high, 1)], [row, row], color=colour, lw=2)
        left.plot(accuracy.mean, row, "|", color=colour, ms=16, mew=2)
        dots = [summary["accuracy"] for summary in arm.summaries.values()]
        below = [row + 0.15 + 0.2 * n / len(dots) for n in range(len(dots))]  # equal ones too
        left.plot(dots, below, "o", color=colour, mec="white", ms=6)
        if compared := comparisons.get(arm.name):
            found = compared.difference
            right.plot([found.low, found.high], [row, row], color=colour, lw=2)
            right.plot(found.mean, row, "|", color=colour, ms=16, mew=2)
    right.axvline(0, color="0.5", lw=1, ls="--")
    left.set_yticks(range(len(arms)), [arm.name for arm in arms])
    left.set_ylim(len(arms) - 0.5, -0.5)
    left.set_xlabel("accuracy: each seed a dot, their mean and its 95% interval")
    right.set_xlabel(f"paired difference from “{ladder.baseline}”, 95% interval")
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(fill(ladder.question, 100))
    return figure
