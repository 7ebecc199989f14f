"""What a sweep found: its plan, the files of its runs, and its arms compared, as plain facts."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sandbox.ablation.plan import PLAN
from sandbox.errors import UserError
from sandbox.evals.controls import PREDICTIONS, SUMMARY
from sandbox.evals.paired import Answers, Comparison, Difference, Key, compare, paired_difference
from sandbox.evals.run import write_json
from sandbox.stages.plan import TEST
from sandbox.stages.run import COMMANDS, Mark

RESULTS = "results.json"
CONTROLS = {  # what every accuracy stands beside, and its key in a summary and in `by_question`
    "shuffled images": ("shuffled_image_accuracy", "shuffled"),
    "no image": ("no_image_accuracy", "no_image"),
    "text-only majority": ("blind_majority_accuracy", "majority"),
}
RECORDED = ("split", "index", "content", "question", "kind", "answer", "correct")  # of a reply
SPLITS = {"accuracy": "test", "heldout": "heldout"}  # what a metric asks about


@dataclass(frozen=True)
class Reply:
    """A question about a sample's own images, and what a run replied.

    Attributes:
        split, index, content: the sample, and the hash of what it shows.
        question, kind, answer: what was asked, under which type, and the truth.
        binds: the question joins things that training never showed together, if it is held out.
        reply, correct: the model's words, and whether they are right.
    """

    split: str
    index: int
    content: str
    question: str
    kind: str
    answer: str
    binds: bool
    reply: str
    correct: bool

    def counts(self, metric: str) -> bool:
        """Whether the metric is over this question.

        ``accuracy`` is over all questions about unseen pictures, ``heldout`` over those about
        held-out combinations, as in ``summary.json``; ``accuracy/KIND`` and ``heldout/KIND`` are
        over one type of question.
        """
        split, _, kind = metric.partition("/")
        if self.split != SPLITS[split]:
            return False
        return self.kind == kind if kind else split == "accuracy" or self.binds


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed, and its test.

    Attributes:
        directory: of the training.
        summary: what ``summary.json`` of the test says.
        replies: to each question about own images.
        curve: validation accuracies, each behind the number of steps trained.
        session: the last entry of ``run.json``: what ran where.
        cost: what training took: ``steps``, ``samples``, ``seconds``, ``tokens_per_s``, ...; what
            was not measured is absent or None.
    """

    directory: Path
    summary: Mapping[str, Any]
    replies: Mapping[Key, Reply]
    curve: Sequence[tuple[int, float]]
    session: Mapping[str, Any]
    cost: Mapping[str, Any]

    def answers(self, metric: str) -> dict[Key, bool]:
        """Whether each question that the metric is over was answered rightly."""
        return {key: r.correct for key, r in self.replies.items() if r.counts(metric)}


@dataclass(frozen=True)
class Arm:
    """One arm of the sweep.

    Attributes:
        name, slug: as the ablation file says it, and as files are called.
        changes: by dotted key, the base's value and the arm's.
        cost: planned: ``flops``, ``tokens`` and ``samples`` of a step, parameters.
        runs: by seed, those that were tested.
        missing: by seed, why there is no result.
    """

    name: str
    slug: str
    changes: Mapping[str, tuple[Any, Any]]
    cost: Mapping[str, Any]
    runs: Mapping[int, Run]
    missing: Mapping[int, str]

    def answers(self, metric: str) -> Answers:
        """By seed, the answers that the metric is over; seeds without any are absent."""
        found = {seed: run.answers(metric) for seed, run in self.runs.items()}
        return {seed: answers for seed, answers in found.items() if answers}

    def score(self, metric: str) -> Difference | None:
        """The mean over seeds and its interval: the difference from an arm that is never right."""
        answers = self.answers(metric)
        never = {seed: dict.fromkeys(found, False) for seed, found in answers.items()}
        # Its bootstrap is not shown, and costs time.
        return paired_difference(answers, never, draws=1) if answers else None

    def mean(self, key: str) -> float | None:
        """The mean over seeds of an entry of the summaries, of the runs that have it."""
        return _mean([run.summary.get(key) for run in self.runs.values()])

    def of_question(self, kind: str, key: str) -> float | None:
        """The mean over seeds of an entry of ``by_question``."""
        found = [run.summary.get("by_question", {}).get(kind, {}) for run in self.runs.values()]
        return _mean([each.get(key) for each in found])

    def spent(self, key: str) -> float | None:
        """The mean over seeds of an entry of what training took."""
        return _mean([run.cost.get(key) for run in self.runs.values()])

    @property
    def kinds(self) -> list[str]:
        """The question types that were asked."""
        return list(
            dict.fromkeys(
                k for run in self.runs.values() for k in run.summary.get("by_question", {})
            )
        )


@dataclass(frozen=True)
class Results:
    """A sweep.

    Attributes:
        question, baseline, seeds, budget, metrics, base, file: as the ablation file says.
        stages: by name, the configuration of each training that arms start from.
        arms: by name, in the order of the file.
        comparisons: by metric, each arm against the baseline on the seeds that both have.
        incomparable: by metric, why there is no comparison.
        commands: what was run, each behind those it needs.
    """

    question: str
    baseline: str
    seeds: Sequence[int]
    budget: Mapping[str, Any]
    metrics: Sequence[str]
    base: str
    file: str
    stages: Mapping[str, str]
    arms: Mapping[str, Arm]
    comparisons: Mapping[str, Mapping[str, Comparison]]
    incomparable: Mapping[str, str]
    commands: Sequence[str]

    @property
    def kinds(self) -> list[str]:
        """The question types that any arm was asked."""
        return list(dict.fromkeys(kind for arm in self.arms.values() for kind in arm.kinds))

    def differences(self, metric: str, name: str) -> list[float]:
        """An arm's accuracy minus the baseline's, for each seed that both have."""
        ours, theirs = (self.arms[n].answers(metric) for n in (name, self.baseline))
        means = [
            [fmean(a[seed].values()) for a in (ours, theirs)] for seed in ours if seed in theirs
        ]
        return [mine - other for mine, other in means]

    def controls(self, arm: Arm, metric: str) -> dict[str, float]:
        """What an arm scores blindly, by control, on the questions of a metric or of its type.

        Those of held-out metrics are over unseen pictures as they come: the nearest there are.
        """
        kind = metric.partition("/")[2]
        found = {
            name: arm.of_question(kind, column) if kind else arm.mean(key)
            for name, (key, column) in CONTROLS.items()
        }
        return {name: value for name, value in found.items() if value is not None}


def read_results(out: Path) -> Results:
    """Read all that a sweep has left in its directory; runs that failed are listed as missing.

    Raises:
        UserError: ``out`` holds no sweep.
    """
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{out}: no {PLAN} in it, so not the directory of a sweep") from None
    arms = {name: _arm(out, name, entry, plan["seeds"]) for name, entry in plan["arms"].items()}
    comparisons: dict[str, dict[str, Comparison]] = {}
    incomparable: dict[str, str] = {}
    for metric in plan["metrics"]:
        answers = {name: found for name, arm in arms.items() if (found := arm.answers(metric))}
        if plan["baseline"] not in answers:
            incomparable[metric] = "no seed of the baseline has a result"
            continue
        try:
            comparisons[metric] = compare(answers, plan["baseline"])
        except UserError as error:  # arms that were tested on different questions
            incomparable[metric] = str(error)
    commands = out / COMMANDS
    return Results(
        plan["question"],
        plan["baseline"],
        plan["seeds"],
        plan["budget"],
        plan["metrics"],
        plan["base"],
        plan["file"],
        plan["stages"],
        arms,
        comparisons,
        incomparable,
        commands.read_text(encoding="utf-8").splitlines() if commands.exists() else [],
    )


def write_results(results: Results, path: Path) -> None:
    """Write the figures as JSON: by arm and seed what was scored and spent, and what it shows."""
    comparisons = {
        metric: {
            name: asdict(found)
            | {"verdict": found.verdict, "minimum_detectable": found.minimum_detectable}
            for name, found in each.items()
        }
        for metric, each in results.comparisons.items()
    }
    content = {
        "question": results.question,
        "baseline": results.baseline,
        "seeds": list(results.seeds),
        "budget": dict(results.budget),
        "arms": {name: _plain(arm, results.metrics) for name, arm in results.arms.items()},
        "comparisons": comparisons,
        "incomparable": dict(results.incomparable),
    }
    write_json(path, content)


# --- Reading --------------------------------------------------------------------------------------


def _arm(out: Path, name: str, entry: Mapping[str, Any], seeds: Sequence[int]) -> Arm:
    runs: dict[int, Run] = {}
    missing: dict[int, str] = {}
    for seed in seeds:
        run = f"seed-{seed}/{entry['slug']}"
        if why := _unfinished(out, run):
            missing[seed] = why
        else:
            runs[seed] = _run(out / run, out / f"{run}{TEST}")
    changes = {key: (base, ours) for key, (base, ours) in entry["changes"].items()}
    return Arm(name, entry["slug"], changes, entry["cost"], runs, missing)


def _unfinished(out: Path, run: str) -> str:
    """Why a run has no result; empty if it has one."""
    for name, what in ((run, "training"), (run + TEST, "test")):
        mark = Mark.read(out, name)
        if mark is None:
            return f"the {what} has not started"
        if not mark.finished:
            return f"the {what} failed or was stopped: see {name}.log"
    if not (out / f"{run}{TEST}" / SUMMARY).is_file():
        return f"the test wrote no {SUMMARY}: its data module asks no questions"
    return ""


def _run(trained: Path, tested: Path) -> Run:
    try:
        sessions = json.loads((trained / "run.json").read_text(encoding="utf-8"))["sessions"]
    except FileNotFoundError:
        sessions = [{}]
    return Run(
        trained,
        json.loads((tested / SUMMARY).read_text(encoding="utf-8")),
        _replies(tested / PREDICTIONS),
        _curve(trained),
        sessions[-1],
        _cost(sessions),
    )


def _cost(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What training took over all sessions of a run; its speed is that of the last that trained.

    A killed session told nothing, and what it did after its last checkpoint was done again: then
    the time of the whole is not known.
    """
    took = [session["trained"] for session in sessions if session.get("trained")]
    trained = [each for each in took if each["steps"]]
    if not trained:
        return {}
    cost = dict(trained[-1])
    if len(sessions) > 1:
        steps = sessions[-1]["step"] + (sessions[-1].get("trained") or {"steps": 0})["steps"]
        cost |= {key: round(cost[key] / cost["steps"] * steps) for key in ("samples", "tokens")}
        cost["steps"] = steps
        cost["seconds"] = sum(each["seconds"] for each in took)
        cost["peak_memory"] = max(each["peak_memory"] or 0 for each in took) or None
    return cost if len(took) == len(sessions) else cost | {"seconds": None}


def _replies(path: Path) -> dict[Key, Reply]:
    """The replies about own images, each under its picture, place and wording."""
    found: dict[Key, Reply] = {}
    with path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record["images"] != "own":
                continue
            key = (
                record["content"],
                record["split"],
                record["index"],
                record["question"],
                record["kind"],
            )
            number = 0  # a picture may be asked the same twice
            while (*key, number) in found:
                number += 1
            found[*key, number] = Reply(
                **{name: record[name] for name in RECORDED},
                binds=bool(record["present"]),
                reply=record["reply"] or "",
            )
    return found


def _curve(run: Path) -> list[tuple[int, float]]:
    """What validation logged; a resumed run has a further file, which counts where both do."""
    found: dict[int, float] = {}
    for path in sorted(run.glob("metrics*/metrics.csv"), key=lambda path: (len(str(path)), path)):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if value := row.get("val/accuracy"):
                    found[int(row["step"]) + 1] = float(value)  # counted from 0
    return sorted(found.items())


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


# --- Writing --------------------------------------------------------------------------------------


def _plain(arm: Arm, metrics: Sequence[str]) -> dict[str, Any]:
    scores = {metric: score for metric in metrics if (score := arm.score(metric))}
    return {
        "slug": arm.slug,
        "changes": {key: list(pair) for key, pair in arm.changes.items()},
        "planned": dict(arm.cost),
        "scores": {
            metric: {"mean": score.mean, "interval": [score.low, score.high]}
            for metric, score in scores.items()
        },
        "controls": {name: arm.mean(key) for name, (key, _) in CONTROLS.items()},
        "runs": {
            str(seed): {
                "summary": run.summary,
                "curve": run.curve,
                "trained": run.cost,
                "session": run.session,
            }
            for seed, run in arm.runs.items()
        },
        "missing": {str(seed): why for seed, why in arm.missing.items()},
    }
