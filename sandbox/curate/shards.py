"""JSONL shards, plain or gzipped: records in, one line at a time, and out, a whole file or none."""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".jsonl", ".jsonl.gz")
SHOWN = 5  # malformed lines are all counted, and so many of them named
REPORT_EVERY = 1000  # lines

Advance = Callable[[int], object]  # told how many more bytes of the shard on disk were read


@dataclass(frozen=True)
class Row:
    """A line with a text: as it stands in the shard, and what it says."""

    line: bytes
    record: dict[str, object]
    text: str


@dataclass
class Faults:
    """Lines that hold no record with a text: how many, and where and why for the first few."""

    lines: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: Path, number: int, reason: str) -> None:
        """Count a line, and name it if it is among the first."""
        self.lines += 1
        if len(self.first) < SHOWN:
            place = f"{path}:{number}: {reason}"
            # A record may hold half a character, which no terminal and no file takes.
            self.first.append(place.encode("utf-8", "backslashreplace").decode())

    def join(self, later: "Faults") -> None:
        """Count those of a later shard too."""
        self.lines += later.lines
        self.first = (self.first + later.first)[:SHOWN]


def read(path: Path, text_key: str, faults: Faults, advance: Advance) -> Iterator[Row]:
    """The rows of a shard, one in memory at a time.

    Blank lines are nothing. Any other line that is no JSON object with a text is a fault, as is the
    point where a gzipped file breaks off.
    """
    with path.open("rb") as raw:
        told = number = 0
        try:
            for number, line in enumerate(_lines(path, raw), start=1):
                if number % REPORT_EVERY == 0:
                    advance(raw.tell() - told)
                    told = raw.tell()
                if not line.strip():
                    continue
                try:
                    row = _row(line, text_key, first=number == 1)
                except (ValueError, RecursionError) as error:
                    faults.add(path, number, str(error))
                    continue
                yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            faults.add(path, number + 1, f"the gzipped file is damaged here ({error})")
        advance(path.stat().st_size - told)


def _lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    if path.suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as unzipped:
            yield from unzipped
    else:
        yield from raw


def _row(line: bytes, text_key: str, first: bool) -> Row:
    decoded = str(line.removeprefix(codecs.BOM_UTF8) if first else line, "utf-8")
    record = json.loads(decoded)
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {json.dumps(record)[:40]}")
    if text_key not in record:
        keys = ", ".join(f"'{key}'" for key in record) or "nothing"
        raise ValueError(f"no '{text_key}' (it has {keys[:200]})")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"'{text_key}' is not a string but {json.dumps(text)[:40]}")
    return Row(line, record, text)


@contextmanager
def written(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Write to a file that gets its name once it is whole; gzipped if the name says so."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as raw:
            if path.suffix == ".gz":
                # Neither name nor time inside: the same records are the same bytes.
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as zipped:
                    yield zipped.write
            else:
                yield raw.write
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
