"""The benchmark as one picture: ratios beside their goals, and the cost per token by length."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: this runs on machines without a screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.bench_measure import Row, Samples, Spread
from experiments.bench_report import digits

MET, MISSED, NEUTRAL, INK, GRID = "#1f8f75", "#d9663a", "#8a94a6", "#20252c", "#e6e9ee"
OURS, PEER = "#2f5fb3", "#8a94a6"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": NEUTRAL,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
}
COLOURS = {True: MET, False: MISSED, None: NEUTRAL}
WORDS = {True: "goal met", False: "goal missed", None: "no goal"}


def draw(path: Path, rows: Sequence[Row], caption: str) -> bool:
    """Write the picture of the rows; whether there was anything to draw.

    Panels that would be empty are left out.
    """
    compared = [row for row in rows if row.ours is not row.peer]
    panels = [
        ("Times better than the peer", [row for row in compared if row.gain]),
        ("Times the cost of the peer (less is better)", [r for r in compared if not r.gain]),
    ]
    panels = [panel for panel in panels if panel[1]]
    curves = {
        name: [row for row in rows if row.section == name and row.length]
        for name in ("attention", "length")
    }
    curves = {name: group for name, group in curves.items() if len(group) > 1}
    if not panels:
        return False
    heights = [len(group) + 2.0 for _, group in panels]
    with plt.rc_context(STYLE):
        size = (14.5 if curves else 9.5, max(0.3 * sum(heights) + 0.8, 4.5 if curves else 2.0))
        figure = plt.figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
        figure.suptitle(caption, x=0.01, ha="left", fontsize=9, color=NEUTRAL)
        left = right = figure
        if curves:
            left, right = figure.subfigures(1, 2, width_ratios=(1.8, 1), wspace=0.03)
        bars = left.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (title, group) in zip(bars, panels, strict=True):
            draw_ratios(axes, title, group)
        verdicts = {row.met for row in compared}
        left.legend(
            handles=[
                Patch(color=COLOURS[met], label=WORDS[met]) for met in WORDS if met in verdicts
            ]
            + [Line2D([], [], color=INK, linewidth=1.2, label="quartiles")],
            loc="outside lower left",
            ncols=4,
            frameon=False,
        )
        if curves:
            lines = right.subplots(len(curves), 1, squeeze=False)[:, 0]
            for axes, (name, group) in zip(lines, curves.items(), strict=True):
                draw_costs(axes, name, group)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return True


def draw_ratios(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """Horizontal bars from 1 on a logarithmic axis, quartiles as whiskers, goals as ticks."""
    for place, row in enumerate(rows):
        ratio = row.ratio
        axes.barh(place, ratio.median - 1, left=1, height=0.6, color=COLOURS[row.met], zorder=2)
        axes.hlines(place, ratio.low, ratio.high, color=INK, linewidth=1.2, zorder=3)
        write = partial(axes.text, y=place, transform=axes.get_yaxis_transform(), va="center")
        write(x=1.09, s=f"{digits(ratio.median)}×", ha="right", fontweight="bold")
        if row.goal is not None:
            axes.vlines(row.goal, place - 0.42, place + 0.42, color=INK, linewidth=2.2, zorder=4)
            write(x=1.11, s=f"goal {'≥' if row.gain else '≤'} {row.goal:g}", color=COLOURS[row.met])
    names = [f"{row.section}: {row.what}\n{row.relation}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 2.2))
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high > 8 else (1, 1.25, 1.5, 2, 3, 5))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    axes.grid(axis="x")
    axes.tick_params(axis="both", length=0)
    axes.spines["left"].set_visible(False)


def draw_costs(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    """Cost per token by length: ours, and the peer where it is measured at the same length."""
    titles = {"attention": "Chunked attention", "length": "All layers local"}
    lines: dict[str, list[tuple[int, Samples]]] = defaultdict(list)
    for row in rows:
        assert row.length is not None
        lines["ours"].append((row.length, row.ours))
        if row.gain:
            lines[row.against].append((row.length, row.peer))
    for label, points in lines.items():
        lengths = [length for length, _ in points]
        spreads = [Spread.of(samples) for _, samples in points]
        colour = OURS if label == "ours" else PEER
        medians = [1e6 * spread.median for spread in spreads]
        axes.plot(lengths, medians, "o-", color=colour, label=label, linewidth=2, markersize=4.5)
        low, high = ([1e6 * getattr(s, side) for s in spreads] for side in ("low", "high"))
        axes.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_title(f"{titles[name]}: µs per token, by tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row.length for row in rows], [f"{row.length:,}" for row in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(lines) > 1:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    else:
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=8.5)
