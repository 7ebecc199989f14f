"""The command line of `sandbox evaluate`. Parsing it imports nothing heavy."""

import argparse
from pathlib import Path
from typing import Any

from sandbox import arguments
from sandbox.devices import add_placement
from sandbox.errors import UserError
from sandbox.evals.catalog import BENCHMARKS
from sandbox.evals.score import METRICS

MODES = sorted({mode for metric in METRICS.values() for mode in metric.modes})
SPLITS = ("train", "val", "test")


def add_evaluate(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `evaluate` to the command line."""
    command = commands.add_parser("evaluate", help="score a checkpoint on a published benchmark")
    command.add_argument("--checkpoint", type=Path, required=True, help="file or run directory")
    command.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        help="the official folder; for jsonl and parquet a file, or a folder of {split}.jsonl",
    )
    command.add_argument("--out", type=Path, required=True, help="directory of this evaluation")
    command.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    command.add_argument(
        "--limit", type=arguments.positive, help="ask about so many images only, the first ones"
    )
    command.add_argument(
        "--batch-size",
        type=arguments.positive,
        default=64,
        help="questions read ahead (default: 64); changes no result",
    )
    command.add_argument(
        "--max-tokens", type=arguments.positive, default=32, help="longest reply (default: 32)"
    )
    command.add_argument("--metric", choices=METRICS, help="default: the benchmark's own")
    command.add_argument("--metric-mode", choices=MODES, help="default: the metric's first")
    command.add_argument(
        "--extract", action="store_true", help="score the answer found in each reply"
    )
    command.add_argument(
        "--no-controls",
        action="store_true",
        help="leave out the questions without image and with exchanged images: a third of the time",
    )
    command.add_argument("--resume", action="store_true", help="go on in --out where it stopped")
    add_placement(command)
    command.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate as the command line says, and print the scores."""
    # Before torch is loaded: a mistyped path should not have to wait for it.
    from sandbox.runs import find_weights

    checkpoint = find_weights(args.checkpoint)
    if not args.data.exists():
        raise UserError(f"{args.data}: no such file or folder; --data is where the benchmark lies")

    from rich.console import Console

    from sandbox.evals.benchmark import evaluate_benchmark

    results = evaluate_benchmark(
        checkpoint,
        args.benchmark,
        data=args.data,
        split=args.split,
        out=args.out,
        limit=args.limit,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        metric=args.metric,
        mode=args.metric_mode,
        extract=args.extract,
        controls=not args.no_controls,
        resume=args.resume,
        device=args.device,
        precision=args.precision,
    )
    console = Console(highlight=False)
    if results.scored:
        console.print(results.table())
    for note in results.summary["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(str(args.out), soft_wrap=True)
    return 0
