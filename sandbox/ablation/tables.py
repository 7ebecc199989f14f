"""What a sweep shows, in sentences and tables of plain text: the report's words."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from sandbox.ablation.charts import quantity
from sandbox.ablation.results import CONTROLS, Arm, Results
from sandbox.evals.paired import Comparison, Difference

MATCHED = {  # what a budget gives every run
    "flops": "the same training FLOPs, {amount}",
    "tokens": "the same number of tokens, {amount}",
    "samples": "the same number of samples, {amount}",
    "params_active": "the same steps, with models of the same active parameters, {amount}",
    "wall": "the same seconds of training, {amount}",
}
UNITS = {"flops": "FLOP"}
METRICS = {"accuracy": "accuracy", "heldout": "held-out accuracy"}


@dataclass(frozen=True)
class Verdict:
    """What an arm's difference from the baseline shows: ``sentence`` begins behind its name."""

    arm: str
    outcome: Literal["higher", "lower", "no difference shown", "not compared"]
    sentence: str


@dataclass(frozen=True)
class Table:
    """Text by row; the first ``labels`` columns name the row, the others hold numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    labels: int = 1


def verdicts(results: Results, metric: str) -> list[Verdict]:
    """A sentence for each arm but the baseline."""
    found = results.comparisons.get(metric, {})
    said = []
    for name in results.arms:
        if name == results.baseline:
            continue
        if name in found:
            told = sentence(results.baseline, found[name])
            said.append(Verdict(name, found[name].verdict, told))
        else:
            why = results.incomparable.get(metric, "no seed of it and of the baseline has a result")
            said.append(Verdict(name, "not compared", f"not compared: {why}."))
    return said


def sentence(baseline: str, found: Comparison) -> str:
    """What a comparison shows, behind the arm's name."""
    d = found.difference
    than = "from" if found.verdict == "no difference shown" else "than"
    text = (
        f"{found.verdict} {than} {baseline}: {d.mean:+.3f} ({d.level:.0%} interval {d.low:+.3f} to "
        f"{d.high:+.3f}), Holm-adjusted p {chance(found.p_adjusted)}, "
        f"Cohen’s h {found.effect:+.2f}, {d.seeds} seed{'s' * (d.seeds > 1)}."
    )
    if d.seeds == 1:
        text += " A single seed speaks of other images, not of other seeds."
    if found.verdict == "no difference shown":
        text += (
            f" A true difference of {found.minimum_detectable:.3f} would be shown by four in five "
            "such comparisons."
        )
    return text


def matched(results: Results) -> str:
    """What every run had of the budget, and what it had before."""
    kind, amount = results.budget["match"], results.budget["amount"]
    told = MATCHED[kind].format(amount=quantity(amount, UNITS.get(kind, "")))
    return f"{told}, after {', '.join(results.stages)} outside it" if results.stages else told


def missing(results: Results) -> list[str]:
    """The runs without a result, and why."""
    return [
        f"{name}, seed {seed}: {why}"
        for name, arm in results.arms.items()
        for seed, why in arm.missing.items()
    ]


def tables(results: Results) -> list[Table]:
    """All figures, every accuracy beside its blind controls."""
    found = [_accuracies(results), _by_question(results), _costs(results)]
    return found if len(results.metrics) == 1 else [*found, _differences(results)]


def named(metric: str) -> str:
    """A metric for people.

    >>> named("heldout/value")
    'held-out accuracy on value questions'
    """
    split, _, kind = metric.partition("/")
    return METRICS[split] + (f" on {kind} questions" if kind else "")


def chance(p: float) -> str:
    """A p value for people: one just below 0.05 does not read 0.050."""
    return "< 0.001" if p < 0.001 else f"{p:.3g}" if p < 0.1 else f"{p:.3f}"


def machine(results: Results) -> dict[str, str]:
    """Commit, versions and device of the runs; where they differ, each."""
    found: dict[str, dict[str, None]] = {}
    for arm in results.arms.values():
        for run in arm.runs.values():
            told = {key: run.session.get(key) for key in ("device", "threads", "precision")}
            for name, value in {**run.session.get("provenance", {}), **told}.items():
                if value is not None:
                    found.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(values) for name, values in found.items()}


# --- Tables ---------------------------------------------------------------------------------------


def _label(results: Results, name: str) -> str:
    return f"{name} (baseline)" if name == results.baseline else name


def _accuracies(results: Results) -> Table:
    rows = [
        [
            _label(results, name),
            _score(arm.score("accuracy")),
            *(_number(arm.mean(key)) for key, _ in CONTROLS.values()),
            _score(arm.score("heldout")),
            *(_number(_of_seed(arm, seed)) for seed in results.seeds),
        ]
        for name, arm in results.arms.items()
    ]
    seeds = [f"seed {seed}" for seed in results.seeds]
    return Table(
        "Accuracy",
        ["arm", "accuracy", *CONTROLS, "held out", *seeds],
        rows,
        "Shares of exactly right answers about unseen pictures, means over seeds with their 95% "
        "intervals; held out: about combinations that training never showed. Controls: the same "
        "questions about another picture, about none, and the commonest answer to the wording.",
    )


def _by_question(results: Results) -> Table:
    columns = {"accuracy": "accuracy", "held out": "heldout"}
    columns |= {name: column for name, (_, column) in CONTROLS.items()}
    rows = [
        [
            kind,
            _label(results, name),
            *(_number(arm.of_question(kind, column)) for column in columns.values()),
            _count(arm.of_question(kind, "n")),
        ]
        for kind in results.kinds
        for name, arm in results.arms.items()
    ]
    header = ["question type", "arm", *columns, "questions"]
    return Table("By question type", header, rows, labels=2)


def _costs(results: Results) -> Table:
    header = ["arm", "accuracy", "best blind control", "parameters", "active", "trained"]
    header += [
        "FLOPs a sample",
        "samples",
        "steps",
        "total FLOPs",
        "tokens/s",
        "peak memory",
        "time",
    ]
    rows = []
    for name, arm in results.arms.items():
        cost, score = arm.cost, arm.score("accuracy")
        steps = arm.spent("steps")
        blind = [value for key, _ in CONTROLS.values() if (value := arm.mean(key)) is not None]
        rows.append(
            [
                _label(results, name),
                _number(None if score is None else score.mean),
                _number(max(blind, default=None)),
                *(quantity(cost[f"params_{of}"]) for of in ("total", "active", "trained")),
                quantity(cost["flops"] / cost["samples"]),
                _count(arm.spent("samples")),
                _count(steps),
                "-" if steps is None else quantity(cost["flops"] * steps),
                _count(arm.spent("tokens_per_s")),
                quantity(arm.spent("peak_memory"), "B"),
                _time(arm.spent("seconds")),
            ]
        )
    return Table(
        "What it took",
        header,
        rows,
        "Means over seeds, of one run. Active: the parameters that a token visits. FLOPs are those "
        "planned, of forward and backward pass; time, tokens/s and peak memory are measured, and "
        "compare only where the runs had the machine alike.",
    )


def _differences(results: Results) -> Table:
    rows = [
        [
            named(metric),
            name,
            found.verdict,
            f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})",
            *(chance(p) for p in (found.p, found.p_adjusted)),
            f"{found.effect:+.2f}",
            _number(found.minimum_detectable),
            *(_number(results.controls(results.arms[name], metric).get(c)) for c in CONTROLS),
            str(d.seeds),
        ]
        for metric, each in results.comparisons.items()
        for name, found in each.items()
        for d in [found.difference]
    ]
    return Table(
        f"Every metric, against {results.baseline}",
        [
            "metric",
            "arm",
            "verdict",
            "difference",
            "p",
            "Holm-adjusted p",
            "Cohen’s h",
            "detectable",
            *CONTROLS,
            "seeds",
        ],
        rows,
        "The first metric decides; p values are adjusted over the arms of a metric, not over "
        "metrics. Detectable: the smallest true difference that four in five such "
        "comparisons would show, before the adjustment.",
        labels=2,
    )


def _of_seed(arm: Arm, seed: int) -> float | None:
    run = arm.runs.get(seed)
    return None if run is None else run.summary.get("accuracy")


def _score(found: Difference | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.3f} ({max(found.low, 0):.3f}–{min(found.high, 1):.3f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{round(value):,}"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
