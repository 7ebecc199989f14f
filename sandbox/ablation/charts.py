"""Where the marks of the page's charts stand: numbers from 0 to 1, which CSS and SVG stretch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sandbox.ablation.results import Arm, Results

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MARGIN = 0.08  # of an axis, beyond its outermost marks


@dataclass(frozen=True)
class Track:
    """Marks on a line from 0 to 1: one for each seed, their mean, and its interval."""

    dots: Sequence[float]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """An arm's accuracy, its difference from the baseline, and what blind controls reach."""

    name: str
    accuracy: Track
    difference: Track | None
    controls: Mapping[str, float]


@dataclass(frozen=True)
class Axis:
    """Labels of an axis, each with its place."""

    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Forest:
    """The arms below each other; ``zero`` is where no difference stands."""

    rows: Sequence[Row]
    differences: Axis
    zero: float


@dataclass(frozen=True)
class Line:
    """A line through the seeds' mean and the area between the least and the most of them.

    ``points`` and ``area`` are SVG point lists, y downwards.
    """

    name: str
    points: str
    area: str


@dataclass(frozen=True)
class Curves:
    """Accuracy over training FLOPs."""

    lines: Sequence[Line]
    axis: Axis


@dataclass(frozen=True)
class Gate:
    """How far a branch of an adapter is open, by seed: places from -1 (0) to 1 (1)."""

    name: str
    dots: Sequence[float]
    size: float


@dataclass(frozen=True)
class Load:
    """The experts of a layer: of one seed, the shares of each modality; of all, how far apart."""

    layer: int
    shares: Mapping[str, Sequence[float]]
    apart: float | None


def quantity(value: float | None, unit: str = "") -> str:
    """A large number for people, with up to three digits.

    >>> quantity(20_000_000_000_000, "FLOP"), quantity(512), quantity(1_151_234)
    ('20 TFLOP', '512', '1.15 M')
    """
    if value is None:
        return "-"
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{float(f'{value / size:.3g}'):g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def forest(results: Results) -> Forest:
    """Accuracies (of the first metric) and differences, for the arms that have any."""
    metric = results.metrics[0]
    found = results.comparisons.get(metric, {})
    ends = [end for c in found.values() for end in (c.difference.low, c.difference.high, 0.0)]
    ends += [d for name in found for d in results.differences(metric, name)]
    low, high = _padded(ends)
    rows = []
    for name, arm in results.arms.items():
        if (score := arm.score(metric)) is None:
            continue
        accuracy = Track(
            [sum(a.values()) / len(a) for a in arm.answers(metric).values()],
            score.mean,
            max(score.low, 0.0),
            min(score.high, 1.0),
        )
        track = None
        if name in found:
            d = found[name].difference
            dots = [_place(dot, low, high) for dot in results.differences(metric, name)]
            track = Track(dots, *(_place(n, low, high) for n in (d.mean, d.low, d.high)))
        rows.append(Row(name, accuracy, track, results.controls(arm, metric)))
    ticks = [
        (_place(tick, low, high), f"{tick:+.2g}" if tick else "0") for tick in _round(low, high)
    ]
    return Forest(rows, Axis(ticks), _place(0.0, low, high))


def curves(results: Results) -> Curves:
    """Validation accuracy of each arm over the FLOPs spent, at the steps that all seeds share."""
    spent: dict[str, dict[float, list[float]]] = {}
    for name, arm in results.arms.items():
        by_step = [dict(run.curve) for run in arm.runs.values() if run.curve]
        if by_step:
            shared = sorted(set.intersection(*map(set, by_step)))
            spent[name] = {n * arm.cost["flops"]: [each[n] for each in by_step] for n in shared}
    most = max((flops for points in spent.values() for flops in points), default=1.0)
    lines = [_line(name, points, most) for name, points in spent.items() if points]
    return Curves(lines, Axis([(tick / most, quantity(tick)) for tick in _round(0, most)]))


def gates(arm: Arm) -> list[Gate]:
    """The gates of an arm with adapters, from the first layer on."""
    found = [run.summary.get("inside", {}).get("gates", {}) for run in arm.runs.values()]
    places = dict.fromkeys(
        (layer, branch) for each in found for layer, gate in each.items() for branch in gate
    )
    rows = []
    for layer, branch in sorted(places, key=lambda place: int(place[0])):
        opened = [each[layer][branch] for each in found if branch in each.get(layer, {})]
        size = fmean(abs(gate) for gate in opened)
        rows.append(Gate(f"layer {int(layer) + 1} {branch}", [(1 + g) / 2 for g in opened], size))
    return rows


def loads(arm: Arm) -> list[Load]:
    """The experts' load of an arm's mixture layers.

    Experts have no names that seeds share, so their loads are shown of the first seed; how far the
    two modalities are apart is a mean over all of them: the share of tokens that would have to
    change experts to make both loads equal.
    """
    found = [run.summary.get("inside", {}).get("expert_load", {}) for run in arm.runs.values()]
    found = [each for each in found if each]
    rows = []
    for layer, shares in found[0].items() if found else ():
        apart = [
            sum(abs(a - b) for a, b in zip(*each[layer].values(), strict=True)) / 2
            for each in found
            if len(each.get(layer, {})) == 2
        ]
        rows.append(Load(int(layer) + 1, shares, fmean(apart) if apart else None))
    return rows


def _line(name: str, points: Mapping[float, Sequence[float]], most: float) -> Line:
    def of(values: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{flops / most:.4f},{1 - value:.4f}" for flops, value in values)

    lowest = [(flops, min(values)) for flops, values in points.items()]
    highest = [(flops, max(values)) for flops, values in points.items()]
    mean = of((flops, fmean(values)) for flops, values in points.items())
    return Line(name, mean, of([*lowest, *reversed(highest)]))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    margin = MARGIN * (high - low) or 0.01
    return low - margin, high + margin


def _place(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def _round(low: float, high: float) -> list[float]:
    """Two to eight round numbers within the bounds."""
    unit = next(
        size * 10.0**power
        for power in range(-6, 30)
        for size in (1, 2, 5)
        if size * 10.0**power * 7 >= high - low
    )
    return [n * unit for n in range(-int(-low // unit), int(high // unit) + 1)]
