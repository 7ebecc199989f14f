"""`sandbox score`: predictions in a file, scored as the owners of the benchmarks score them.

No model is loaded, and no torch: any system's predictions can be scored.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import Any

from sandbox.errors import UserError
from sandbox.evals import chartqa, docvqa, extraction, vqa
from sandbox.evals.answer_files import Answered, read_docvqa, read_lines, read_vqa
from sandbox.evals.metrics import EXACT_VERSION, Scored, exact, wilson_interval

VQA_ANSWERS = 10


@dataclass(frozen=True)
class Metric:
    """What `sandbox score` has to know of a metric.

    Attributes:
        about: a line of help.
        version: raised whenever a score may change.
        score: one prediction against the accepted answers; takes ``mode`` if there are modes.
        modes: the ways to compute it, the default first.
        official: reads official results with their annotations, where there are such files.
    """

    about: str
    version: str
    score: Callable[..., Scored]
    modes: Sequence[str] = ()
    official: Callable[[Path, Path], Iterable[Answered]] | None = None


METRICS = {
    "vqa": Metric(
        "VQA accuracy against ten people's answers", vqa.VERSION, vqa.accuracy, vqa.MODES, read_vqa
    ),
    "chartqa": Metric(
        "ChartQA's relaxed accuracy", chartqa.VERSION, chartqa.relaxed_accuracy, chartqa.MODES
    ),
    "anls": Metric(
        "ANLS of DocVQA and InfographicVQA", docvqa.VERSION, docvqa.anls, official=read_docvqa
    ),
    "exact": Metric("equal but for case and white space around it", EXACT_VERSION, exact),
    "choice": Metric("the letter that a reply chooses", EXACT_VERSION, exact),
}


def add_score(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `score` to the command line, with a subcommand for each metric."""
    score = commands.add_parser("score", help="score a file of predictions with a published metric")
    metrics = score.add_subparsers(title="metrics", metavar="<metric>", required=True)
    for name, metric in METRICS.items():
        command = metrics.add_parser(name, help=metric.about)
        command.add_argument(
            "file",
            type=Path,
            help='JSON lines: {"prediction": text, "answers": [text, ...]}, perhaps with a "type"',
        )
        command.add_argument("--out", type=Path, help="for each record's score, a JSON line each")
        if metric.modes:
            default = metric.modes[0]
            command.add_argument(
                "--mode", choices=metric.modes, default=default, help=f"default: {default}"
            )
        if metric.official:
            command.add_argument(
                "--annotations",
                type=Path,
                help="the official file of answers; FILE then holds official results",
            )
        if name == "choice":  # there is nothing to score before the letter is found
            command.add_argument("--letters", default=extraction.LETTERS, help="default: ABCD")
        else:
            command.add_argument(
                "--extract", action="store_true", help="score the answer found in each reply"
            )
        command.set_defaults(handler=partial(run, name))


def run(name: str, args: argparse.Namespace) -> int:
    """Score a file as the command line says, and print the summary as JSON.

    Raises:
        UserError: a record cannot be scored, there is none, or the output would replace an input.
    """
    metric = METRICS[name]
    annotations: Path | None = getattr(args, "annotations", None)
    inputs = [path for path in (args.file, annotations) if path]
    if args.out and args.out.exists() and any(args.out.samefile(path) for path in inputs):
        raise UserError(f"{args.out}: --out would replace what is to be scored; name another file")

    if metric.official and annotations:
        records = list(metric.official(args.file, annotations))
    else:
        records = list(read_lines(args.file))
    if not records:
        raise UserError(f"{args.file}: holds no record to score")
    extract: Callable[[str], str | None] | None = None
    if name == "choice":
        _check_letters(records, args.letters)
        extract = partial(extraction.choice, letters=args.letters)
    elif args.extract:
        extract = extraction.extract
    if name == "vqa":
        _check_ten(records)

    mode = args.mode if metric.modes else None
    score = partial(metric.score, mode=mode) if mode else metric.score
    predictions = [extract(r.prediction) if extract else r.prediction for r in records]
    scored = [
        # No answer was found: wrong, even where an empty one would be right.
        Scored(0.0, "") if prediction is None else score(prediction, record.answers)
        for prediction, record in zip(predictions, records, strict=True)
    ]
    if args.out:
        # ASCII: a reply may hold half a character, which UTF-8 cannot.
        args.out.write_text("".join(json.dumps(one._asdict()) + "\n" for one in scored))
    summary = {"metric": name, "version": metric.version, "mode": mode}
    summary |= summarise(records, [one.score for one in scored])
    if extract:
        failures = predictions.count(None)
        rate = failures / len(records)
        summary["extraction"] = {
            "version": extraction.VERSION,
            "failures": failures,
            "failure_rate": rate,
        }
    print(json.dumps(summary, indent=2))
    return 0


def summarise(records: Sequence[Answered], scores: Sequence[float]) -> dict[str, Any]:
    """The mean score with its 95% interval; for records with types, each type's, and their mean."""
    summary = _mean(scores)
    kinds = defaultdict[str, list[float]](list)
    for record, score in zip(records, scores, strict=True):
        if record.kind is not None:
            kinds[record.kind].append(score)
    if kinds:
        summary["by_type"] = {kind: _mean(kinds[kind]) for kind in sorted(kinds)}
        summary["mean_of_types"] = fmean(one["score"] for one in summary["by_type"].values())
    return summary


def _mean(scores: Sequence[float]) -> dict[str, Any]:
    total, n = fsum(scores), len(scores)
    return {"n": n, "score": total / n, "interval_95": list(wilson_interval(total, n))}


def _check_ten(records: Iterable[Answered]) -> None:
    for record in records:
        if (n := len(record.answers)) != VQA_ANSWERS:
            raise UserError(
                f"{record.where}: the VQA accuracy needs {VQA_ANSWERS} answers, got {n} "
                "(a lone match among fewer scores 0; `exact` is for single answers)"
            )


def _check_letters(records: Iterable[Answered], letters: str) -> None:
    for record in records:
        for answer in record.answers:
            if len(answer) != 1 or answer.upper() not in letters.upper():
                raise UserError(
                    f"{record.where}: the answer to a multiple-choice question must be one of the "
                    f"letters {letters}, got {answer!r:.80}; see --letters"
                )
