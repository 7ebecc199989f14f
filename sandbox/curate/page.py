"""What curation did to the distribution of the metadata: a picture, and a page to read."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from sandbox.curate.shards import written

PICTURE = "distribution.png"
PAGE = "report.html"
ROWS = 12  # of the tables of head and tail
BEFORE, AFTER, QUIET = "#a3a8ae", "#0b7a75", "#666c73"


@dataclass(frozen=True)
class Distribution:
    """A curation in numbers.

    Attributes:
        entries: the metadata.
        before, after: in how many texts each entry occurs, of all and of those kept, [entries].
        threshold: t, the count up to which an entry keeps all of its texts.
        seed: of the choice.
        records, kept, unmatched: texts read, kept, and without any entry.
        malformed, malformed_first: lines without a text; where and why for the first few.
        source: where the metadata comes from.
        never: how many entries can occur in no text, as they hold punctuation that is set apart.
        short: by how much counts fell short at most when the metadata was built.
    """

    entries: Sequence[str]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    threshold: int
    seed: int
    records: int
    kept: int
    unmatched: int
    malformed: int
    malformed_first: Sequence[str]
    source: str
    never: int
    short: int

    @property
    def order(self) -> list[int]:
        """The entries that occur, the most frequent first, in alphabetical order among equals."""
        found = np.flatnonzero(self.before).tolist()
        return sorted(found, key=lambda entry: (-self.before[entry], self.entries[entry]))

    def tail_share(self, counts: NDArray[np.int64]) -> float:
        """The share of matches that entries hold of which there were fewer than t texts."""
        return float(counts[self.before < self.threshold].sum() / max(counts.sum(), 1))

    def summary(self) -> str:
        """The outcome in a line or two for a terminal."""
        text = (
            f"kept {self.kept:,} of {self.records:,} texts at t = {self.threshold:,}; "
            f"{self.unmatched:,} matched nothing"
        )
        if self.malformed:
            text += f"\nleft out {self.malformed:,} malformed lines: {self.malformed_first[0]}"
            text += ", ..." * (self.malformed > 1)
        return text

    def as_json(self) -> dict[str, object]:
        """All of it in plain values; `counts` is [before, after] by entry, from head to tail."""
        return {
            "threshold": self.threshold,
            "seed": self.seed,
            "records": self.records,
            "kept": self.kept,
            "unmatched": self.unmatched,
            "malformed": {"lines": self.malformed, "first": list(self.malformed_first)},
            "metadata": {
                "source": self.source,
                "entries": len(self.entries),
                "matched": int(np.count_nonzero(self.before)),
                "can_never_match": self.never,
                "counts_short_by": self.short,
            },
            "tail_share": {
                "before": self.tail_share(self.before),
                "after": self.tail_share(self.after),
            },
            "counts": {
                self.entries[e]: [int(self.before[e]), int(self.after[e])] for e in self.order
            },
        }


def write_page(out: Path, found: Distribution) -> None:
    """Write the picture and the page; the page holds the picture and loads nothing."""
    picture = draw(found)
    with written(out / PICTURE) as write:
        write(picture)
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent / "report"]),  # one style for every page
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    order = found.order
    tail = order[ROWS:][-ROWS:]
    page = environment.get_template("page.html.jinja").render(
        found=found,
        matched=len(order),
        head=order[:ROWS],
        tail=tail,
        picture=base64.b64encode(picture).decode(),
    )
    with written(out / PAGE) as write:
        write(page.encode("utf-8", "backslashreplace"))


def draw(found: Distribution) -> bytes:
    """A PNG: counts by rank on logarithmic axes, and what the first ranks hold together.

    The second is the paper's plot of cumulative counts (arXiv 2309.16671, section 3.3; the authors'
    plot_entry_count.py) in shares, and from the head over a logarithmic axis: from the tail, all of
    it happens at the last hundredth of the entries.
    """
    from matplotlib.figure import Figure  # heavy, and no concern of the processes that match

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for counts, label, color, width in (
        (found.before, "before", BEFORE, 3.0),
        (found.after, "after", AFTER, 1.8),
    ):
        ranked = np.sort(counts[counts > 0])[::-1]
        ranks = np.arange(1, ranked.size + 1)
        held = np.cumsum(ranked) / max(ranked.sum(), 1)
        left.loglog(ranks, ranked, color=color, linewidth=width, label=label)
        right.semilogx(ranks, held, color=color, linewidth=width, label=label)
    left.axhline(found.threshold, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    left.annotate(
        f"t = {found.threshold:,}",
        (1, found.threshold),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=QUIET,
    )
    left.set(title="How often an entry occurs", xlabel="rank of the entry", ylabel="texts with it")
    right.set(
        title="What the most frequent entries hold together",
        xlabel="so many of the most frequent entries",
        ylabel="share of all matches",
        ylim=(0, 1.02),
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3dfd7", linewidth=0.6)
        axes.legend(frameon=False, loc="lower left" if axes is left else "lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
