"""`sandbox curate`: count what the captions mention, then keep a balanced choice of them.

Two passes over the shards, line by line: memory holds the metadata with its counts, never the
captions. With several jobs, each process takes one shard at a time and has its own matcher.
"""

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from encoders.curation import (
    Matcher,
    balance,
    build_metadata,
    entry_probabilities,
    identity,
    threshold_for_tail,
)
from sandbox.curate.page import Distribution, write_page
from sandbox.curate.shards import SUFFIXES, Advance, Faults, read, written
from sandbox.errors import UserError

COUNTS = "counts.json"  # written last: where it is, the rest is whole
METADATA = "metadata.json"
MATCHES = "metadata"  # the key under which a record lists its entries

Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """What to curate and how; the command line, checked.

    Raises:
        UserError: the inputs are no JSONL files, or two of them would be written to one place.
    """

    inputs: tuple[Path, ...]
    out: Path
    metadata: Path | None = None
    least_count: int | None = None
    threshold: int | None = None
    tail: float = 0.06
    text_key: str = "caption"
    seed: int = 0
    jobs: int = 1
    keep_matches: bool = False

    def __post_init__(self) -> None:
        for path in self.inputs:
            if not path.name.endswith(SUFFIXES):
                raise UserError(f"{path}: the name must end in {' or '.join(SUFFIXES)}")
        names = [path.name for path in self.inputs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two inputs are called {twice}, and so would be their outputs")


@dataclass(frozen=True)
class _Counted:
    """A shard after the first pass."""

    records: int
    unmatched: int
    counts: NDArray[np.int64]
    faults: Faults


def curate(options: Options) -> Distribution:
    """Write curated shards, `counts.json`, `distribution.png` and `report.html`; return the counts.

    Raises:
        UserError: a file is missing or of no use, the output directory is not empty, or no caption
            matches anything.
    """
    sizes = {path: path.stat().st_size for path in options.inputs}
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"{options.out} is not an empty directory: name another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    source, matcher, short = _matcher(options, sizes)

    with _workers(matcher, sizes, options.jobs) as each:
        shards = each("counting", partial(_count, options))
        faults = Faults()
        for shard in shards:
            faults.join(shard.faults)
        before = sum((shard.counts for shard in shards), np.zeros(len(matcher.entries), np.int64))
        records = sum(shard.records for shard in shards)
        _check_records(options, records, faults)
        if not before.any():
            what = f"none of {records} texts matches any of {before.size} entries"
            raise UserError(f"{_names(options)}: {what} ({source})")
        t = options.threshold
        if t is None:
            t = threshold_for_tail(before, options.tail)
        sampled = each("sampling", partial(_sample, options, entry_probabilities(before, t)))

    after = sum((counts for _, counts in sampled), np.zeros_like(before))
    found = Distribution(
        entries=matcher.entries,
        before=before,
        after=after,
        threshold=t,
        seed=options.seed,
        records=records,
        kept=sum(kept for kept, _ in sampled),
        unmatched=sum(shard.unmatched for shard in shards),
        malformed=faults.lines,
        malformed_first=tuple(faults.first),
        source=source,
        never=len(matcher.never()),
        short=short,
    )
    if options.metadata is None:
        _write_json(options.out / METADATA, list(matcher.entries))
    write_page(options.out, found)
    _write_json(options.out / COUNTS, found.as_json())
    return found


def read_metadata(path: Path) -> list[str]:
    """Entries from a JSON list of strings (`.json`), or else from one entry a line.

    Repeated entries count once; blank lines do not count.

    Raises:
        ValueError: the file holds something else.
    """
    content = path.read_text(encoding="utf-8-sig")
    lines = json.loads(content) if path.suffix == ".json" else content.split("\n")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("must be a JSON list of strings")
    return list(dict.fromkeys(entry for line in lines if (entry := line.strip())))


def _matcher(options: Options, sizes: dict[Path, int]) -> tuple[str, Matcher, int]:
    """Where the metadata comes from, its matcher, and by how much counts fell short in building."""
    try:
        if options.metadata:
            return str(options.metadata), Matcher(read_metadata(options.metadata)), 0
        assert options.least_count is not None
        entries, short = _build(options, options.least_count, sizes)
        source = f"the words of the captions, {options.least_count} times or more"
        return source, Matcher(entries), short
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{options.metadata or _names(options)}: {error}") from None


def _build(options: Options, least_count: int, sizes: dict[Path, int]) -> tuple[list[str], int]:
    faults, records = Faults(), 0

    def texts(advance: Advance) -> Iterator[str]:
        nonlocal records
        for path in sizes:
            for row in read(path, options.text_key, faults, advance):
                records += 1
                yield row.text
        _check_records(options, records, faults)

    with _progress("building metadata", sum(sizes.values())) as advance:
        return build_metadata(texts(advance), least_count)


def _check_records(options: Options, records: int, faults: Faults) -> None:
    if not records and not faults.lines:
        raise UserError(f"{_names(options)}: no records, the input is empty")
    if not records:
        raise UserError(f"{faults.first[0]}; no line is of use (--text-key names the text's key)")


def _names(options: Options) -> str:
    return ", ".join(map(str, options.inputs[:3])) + ", ..." * (len(options.inputs) > 3)


# --- The two passes over a shard ------------------------------------------------------------------


def _count(options: Options, matcher: Matcher, path: Path, advance: Advance) -> _Counted:
    faults, counts = Faults(), np.zeros(len(matcher.entries), np.int64)
    records = unmatched = 0
    for row in read(path, options.text_key, faults, advance):
        if options.keep_matches and MATCHES in row.record:
            raise UserError(f"{path}: a record has '{MATCHES}', which --keep-matches would write")
        entries = matcher.match(row.text)
        counts[entries] += 1
        records += 1
        unmatched += not entries
    return _Counted(records, unmatched, counts, faults)


def _sample(
    options: Options,
    probabilities: NDArray[np.float64],
    matcher: Matcher,
    path: Path,
    advance: Advance,
) -> tuple[int, NDArray[np.int64]]:
    """Write the shard's choice; how many records it has, and its counts."""
    kept, counts = 0, np.zeros(len(matcher.entries), np.int64)
    rows = read(path, options.text_key, Faults(), advance)
    pairs = ((row.line, row.text, identity(row.record, row.text)) for row in rows)
    with written(options.out / path.name) as write:
        for line, entries in balance(pairs, matcher, probabilities, options.seed):
            kept += 1
            counts[entries] += 1
            line = line.rstrip()
            if options.keep_matches:
                # Put in before the closing brace: all else stays as it is, byte for byte.
                names = json.dumps([matcher.entries[e] for e in entries], ensure_ascii=False)
                line = line[:-1].rstrip() + f', "{MATCHES}": {names}}}'.encode()
            write(line + b"\n")
    return kept, counts


# --- Processes and progress -----------------------------------------------------------------------

_own: Matcher  # of a process that `_workers` started


def _start(entries: tuple[str, ...]) -> None:
    global _own
    _own = Matcher(entries)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports the interruption, once


def _in_worker(work: Callable[[Matcher, Path, Advance], Result], path: Path) -> Result:
    return work(_own, path, lambda read: None)


@contextmanager
def _workers(matcher: Matcher, sizes: dict[Path, int], jobs: int) -> Iterator["_Each"]:
    """Something that does work on each shard, here or in processes of their own."""
    jobs = min(jobs, len(sizes))
    if jobs == 1:
        yield _Each(matcher, sizes, None)
        return
    # Spawned, as on every platform: a forked copy of a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _start, (matcher.entries,)) as pool:
        yield _Each(matcher, sizes, pool)


@dataclass(frozen=True)
class _Each:
    matcher: Matcher
    sizes: dict[Path, int]
    pool: ProcessPoolExecutor | None

    def __call__(
        self, label: str, work: Callable[[Matcher, Path, Advance], Result]
    ) -> list[Result]:
        """The results of all shards, in their order."""
        results: list[Result] = []
        with _progress(label, sum(self.sizes.values())) as advance:
            if self.pool is None:
                return [work(self.matcher, path, advance) for path in self.sizes]
            done = self.pool.map(partial(_in_worker, work), self.sizes)
            for result, size in zip(done, self.sizes.values(), strict=True):
                results.append(result)
                advance(size)
        return results


@contextmanager
def _progress(label: str, total: int) -> Iterator[Advance]:
    """A bar over bytes, on a terminal and while it lasts."""
    columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda read: bar.advance(task, read)


def _write_json(path: Path, content: object) -> None:
    with written(path) as write:
        # Half a character, in the name of a file say, becomes the escape that JSON has for it.
        write(json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace"))
