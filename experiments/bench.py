"""Our backbone against transformers' Llama 4, side by side in one process.

    uv run python experiments/bench.py                          # all sections, one core
    uv run python experiments/bench.py --sections train,decode --rounds 9
    uv run python experiments/bench.py --quick                  # a rehearsal in miniature

Both models have the same weights; before anything is timed, what both compute is compared.
Contenders take turns (A B A B ...), and a ratio is taken within a round before the median. Leave
the machine alone meanwhile: load is reported, not corrected (``--cpu-time`` counts CPU seconds).

transformers computes every expert for every token, so ratios against it grow with the number of
experts by construction; section ``moe`` has a loop over experts beside it, which does not. Two
sections have other peers: ``step`` compares the quickstart's training step with that of another
checkout (``--against``), and ``media`` the reading of images and videos with plain loops of Pillow
and decord.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.bench_chart import draw
from experiments.bench_gpu import gpu
from experiments.bench_groups import groups
from experiments.bench_loss import loss
from experiments.bench_measure import Bench, Row, Skip
from experiments.bench_media import media
from experiments.bench_models import transformers
from experiments.bench_parts import attention, length, moe
from experiments.bench_report import machine, print_section, write_json
from experiments.bench_step import step
from experiments.bench_whole import compiled, decode, floor, prefill, train
from sandbox.allocator import keep_freed_memory
from sandbox.errors import UserError
from sandbox.runs import new_run_dir

SECTIONS: dict[str, Callable[[Bench], Iterator[Row | Skip]]] = {
    section.__name__: section
    for section in (
        train,
        compiled,
        step,
        floor,
        prefill,
        decode,
        groups,
        attention,
        moe,
        loss,
        length,
        media,
        gpu,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections asked for and return the exit code; missed goals are no failure."""
    arguments = parser().parse_args(argv)
    try:
        run(arguments)
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; the sections so far are written", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="bench", description="Our backbone against transformers' Llama 4, in one process."
    )
    command.add_argument(
        "--sections",
        type=sections,
        default=list(SECTIONS),
        help=f"comma-separated, of {','.join(SECTIONS)} (default: all)",
    )
    command.add_argument("--rounds", type=positive, help="samples of each (default: 5; quick: 2)")
    command.add_argument(
        "--quick", action="store_true", help="miniature sizes; figures mean nothing"
    )
    command.add_argument("--out", type=Path, help="directory (default: a new one under runs/)")
    command.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    command.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep freed memory in this process, for both models, as `sandbox fit` does",
    )
    command.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    command.add_argument(
        "--against",
        metavar="REVISION|DIRECTORY",
        help="what section step compares with: a revision or another checkout of this repository",
    )
    command.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds, for a machine that others use too (with one thread, on a CPU)",
    )
    return command


def sections(text: str) -> list[str]:
    """Section names, in the order given."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown section {', '.join(unknown) or repr(text)} (choose of {', '.join(SECTIONS)})"
        )
    return names


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def run(arguments: argparse.Namespace) -> list[Row | Skip]:
    """Measure the sections asked for; what is done so far is written after each.

    Raises:
        UserError: transformers or the device is missing.
    """
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device")
    if arguments.cpu_time and (arguments.device.type != "cpu" or arguments.threads > 1):
        raise UserError("--cpu-time: only with --device cpu and one thread")
    transformers().logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.keep_memory:
        keep_freed_memory()
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    bench = Bench(arguments.device, rounds, arguments.quick, arguments.cpu_time, arguments.against)
    facts = machine(bench) | {
        "keep_memory": arguments.keep_memory,
        "clock": "CPU" if arguments.cpu_time else "wall",
    }
    out = arguments.out or new_run_dir("bench")
    caption = describe(facts)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 124)
    console.print(caption)
    console.print(
        "ratio: peer / ours *against* a peer (more is better), ours / peer *over* one (less is)"
    )
    busy = facts["load_at_start"] or 0.0
    if busy > (os.cpu_count() or 1) - arguments.threads + 0.25:
        console.print(f"[yellow]other processes are at work (load {busy:.1f}): expect noise")
    out.mkdir(parents=True, exist_ok=True)
    results: list[Row | Skip] = []
    for name in arguments.sections:
        start = time.perf_counter()
        with console.status(f"{name} ..."):
            found = measure(bench, name)
        title = (SECTIONS[name].__doc__ or "").splitlines()[0].rstrip(".")
        print_section(console, name, title, found, time.perf_counter() - start)
        results += found
        write_json(out / "bench.json", facts, results)
        draw(out / "bench.png", [row for row in results if isinstance(row, Row)], caption)
    console.print(f"\nsamples and picture: {out}")
    return results


def describe(facts: Mapping[str, Any]) -> str:
    """One line on where the figures come from, for table and picture."""
    where = facts["gpu"] if facts["device"] == "cuda" else facts["cpu"]
    rounds = "a REHEARSAL IN MINIATURE" if facts["quick"] else f"{facts['rounds']} rounds"
    kept = ", freed memory kept" if facts["keep_memory"] else ""
    return (
        f"{where}, {facts['threads']} thread(s), torch {facts['torch']}, "
        f"transformers {facts['transformers']}, commit {facts['commit']}{kept}; "
        f"{facts['clock']} seconds, medians and quartiles of {rounds}"
    )


def measure(bench: Bench, name: str) -> list[Row | Skip]:
    """What a section finds, as far as the device's memory goes."""
    found: list[Row | Skip] = []
    try:
        for result in SECTIONS[name](bench):
            if bench.quick and isinstance(result, Row):
                result = replace(result, goal=None)  # goals are for the full size
            found.append(result)
    except torch.OutOfMemoryError as error:
        found.append(Skip(name, "the remaining cases", str(error).splitlines()[0]))
    return found


if __name__ == "__main__":
    sys.exit(main())
