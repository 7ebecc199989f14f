"""What the benchmark says: tables on the terminal, and every sample in a file."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.bench_measure import Bench, Row, Samples, Skip, Spread
from sandbox.checkpoint import provenance

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix.

    >>> quantity(0.01234, "s/step")
    '12.3 ms/step'
    """
    scale, prefix = next((p for p in PREFIXES if abs(value) >= p[0]), PREFIXES[-1])
    return f"{digits(value / scale)} {prefix}{unit}"


def digits(value: float) -> str:
    """Three significant digits without an exponent.

    >>> [digits(x) for x in (0.123456, 1.5, 23.4567, 1234.5)]
    ['0.123', '1.50', '23.5', '1234']
    """
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def measured(samples: Samples, unit: str) -> str:
    """The median, and half the distance of the quartiles in percent of it."""
    spread = Spread.of(samples)
    percent = 50 * (spread.high - spread.low) / spread.median
    return f"{quantity(spread.median, unit)} [dim]±{percent:.0f}%[/dim]"


def verdict(row: Row) -> str:
    """The goal as an inequality, and whether it holds."""
    if row.goal is None:
        return ""
    bound = f"{'≥' if row.gain else '≤'} {row.goal:g}"
    return f"{bound} [green]met[/green]" if row.met else f"{bound} [red]missed[/red]"


def print_section(
    console: Console, name: str, title: str, results: Sequence[Row | Skip], seconds: float
) -> None:
    """One section's rows as a table, its notes, and what was left out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case [dim]and peer[/dim]")
    for heading in ("ours", "peer", "ratio", "goal", "ours/floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [result for result in results if isinstance(result, Row)]
    for row in rows:
        ratio, floor = row.ratio, row.above_floor
        table.add_row(
            f"{row.what}\n[dim]  {row.relation}[/dim]",
            measured(row.ours, row.unit),
            measured(row.peer, row.unit),
            f"{digits(ratio.median)}x [dim]{digits(ratio.low)}-{digits(ratio.high)}[/dim]",
            verdict(row),
            "" if floor is None else f"{digits(floor.median)}x",
        )
    console.print(f"\n[bold]{name}[/bold]  {title} [dim]({seconds:.0f} s)[/dim]")
    if rows:
        console.print(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        console.print(f"[dim]{escape(note)}[/dim]")
    for skip in results:
        if isinstance(skip, Skip):
            console.print(escape(f"skipped: {skip.what}: {skip.why}"))


def machine(bench: Bench) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "machine": platform.node(),
        "device": bench.device.type,
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "rounds": bench.rounds,
        "quick": bench.quick,
        "transformers": version("transformers"),
        **provenance(),
    }


def _cpu() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, facts: dict[str, Any], results: Sequence[Row | Skip]) -> None:
    """Facts of the machine, and every row with its raw samples and what follows from them."""
    rows = [
        asdict(row)
        | {"ratio": asdict(row.ratio), "met": row.met}
        | ({} if row.above_floor is None else {"above_floor": asdict(row.above_floor)})
        for row in results
        if isinstance(row, Row)
    ]
    skipped = [asdict(skip) for skip in results if isinstance(skip, Skip)]
    content = {"facts": facts, "rows": rows, "skipped": skipped}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
