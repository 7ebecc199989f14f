"""One self-contained HTML page about a trained model: what it can do, and whether it looks."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image as PILImage

from sandbox.evals.controls import Blind
from sandbox.evals.run import Score, Summary

CLEARLY = 0.3  # above every blind control, for the best verdict
LABEL_HEIGHT = 0.075  # of the learning curve's plot, so that the names of its lines do not overlap


@dataclass(frozen=True)
class Card:
    """A picture with a question, the true answer and the model's reply."""

    picture: PILImage.Image
    question: str
    answer: str
    reply: str
    correct: bool


@dataclass(frozen=True)
class Gallery:
    """Cards under one heading; ``note`` says how they were chosen."""

    title: str
    note: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the decoder reads it: words, and ``None`` for each token cut from the picture.

    ``picture`` holds the tiles, one below the other; ``grid`` is the number of such tokens along a
    side of a tile.
    """

    picture: PILImage.Image
    grid: int
    tokens: Sequence[str | None]


@dataclass(frozen=True)
class Stage:
    """One station on the way from pixels to an answer: its name, and a line of numbers."""

    name: str
    detail: str


@dataclass(frozen=True)
class Layer:
    """A decoder layer: how it attends, and how many routed experts it has (0: dense)."""

    attention: str
    experts: int
    active: int


@dataclass(frozen=True)
class Architecture:
    """The model in numbers."""

    params_total: int
    params_active: int
    stages: Sequence[Stage]
    layers: Sequence[Layer]
    prompt: Prompt


@dataclass(frozen=True)
class Curve:
    """Validation accuracy during training: the steps, and a line of accuracies for each name."""

    steps: Sequence[int]
    lines: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Facts:
    """All that the page tells.

    Attributes:
        title: what was trained, in a few words.
        run: short facts about the run (seed, steps, minutes, ...), by name.
        own, heldout, shuffled, no_image: scores on unseen pictures, on combinations that training
            never showed, on unseen pictures exchanged behind the model's back, and without them.
        swap: one question about its own picture and about another one, if there is such a question.
        experts: by layer and modality, the share of tokens that each expert gets.
        commands: what to try next: an explanation and a command line each.
        provenance: versions and origin, by name.
    """

    title: str
    run: Mapping[str, str]
    own: Summary
    heldout: Summary
    shuffled: Summary
    no_image: Summary
    blind: Blind
    swap: tuple[Card, Card] | None
    architecture: Architecture
    curve: Curve
    experts: Mapping[int, Mapping[str, Sequence[float]]]
    galleries: Sequence[Gallery]
    commands: Sequence[tuple[str, str]]
    provenance: Mapping[str, str]


@dataclass(frozen=True)
class _Line:
    """A line of the learning curve in a plot of height and width 1, y downwards."""

    name: str
    points: str
    end: float
    label: float


def write_report(path: Path, facts: Facts) -> None:
    """Render the page; it loads nothing from elsewhere."""
    environment = Environment(
        loader=PackageLoader("sandbox.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "data_uri": data_uri}
    page = environment.get_template("page.html.jinja").render(
        facts=facts,
        verdict=verdict(facts.own.overall, facts.shuffled.overall, facts.blind.majority),
        lines=_lines(facts.curve),
        ticks=_ticks(facts.curve.steps),
        apart={layer: _apart(load) for layer, load in facts.experts.items()},
    )
    path.write_text(page, encoding="utf-8")


def verdict(own: Score, shuffled: Score, majority: float | None) -> str:
    """Whether the model looks at its pictures, in one sentence that the scores bear out."""
    blind = majority or 0.0
    if own.low <= max(shuffled.high, blind):
        return "It does not look at the picture yet."
    if own.accuracy - max(shuffled.accuracy, blind) < CLEARLY:
        return "It has begun to look at the picture."
    return "It looks at the picture."


def percent(share: float | None) -> str:
    """A share for people, if there is one.

    >>> percent(0.957), percent(None)
    ('96%', '-')
    """
    return "-" if share is None else f"{share:.0%}"


def interval(score: Score) -> str:
    """The bounds of a score's interval for people, e.g. ``94–97%``."""
    return f"{100 * score.low:.0f}–{100 * score.high:.0f}%"


def data_uri(picture: PILImage.Image) -> str:
    """The picture as a PNG inside a URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _lines(curve: Curve) -> list[_Line]:
    last = max(curve.steps, default=1)
    ends = {name: 1 - values[-1] for name, values in curve.lines.items() if values}
    labels = _spread(ends)
    return [
        _Line(
            name,
            " ".join(
                f"{step / last:.4f},{1 - value:.4f}"
                for step, value in zip(curve.steps, curve.lines[name], strict=True)
            ),
            ends[name],
            labels[name],
        )
        for name in ends
    ]


def _spread(heights: Mapping[str, float]) -> dict[str, float]:
    """Heights moved down, then up, as little as needed to stand ``LABEL_HEIGHT`` apart in 0..1."""
    names = sorted(heights, key=lambda name: heights[name])
    placed: dict[str, float] = {}
    above = -LABEL_HEIGHT
    for name in names:
        placed[name] = above = max(heights[name], above + LABEL_HEIGHT)
    below = 1 + LABEL_HEIGHT
    for name in reversed(names):
        placed[name] = below = min(placed[name], below - LABEL_HEIGHT)
    return placed


def _ticks(steps: Sequence[int]) -> list[tuple[float, int]]:
    """Up to five round steps and where they stand in 0..1."""
    last = max(steps, default=1)
    unit = next(
        size * 10**power
        for power in range(10)
        for size in (1, 2, 5)
        if size * 10**power * 5 >= last
    )
    return [(step / last, step) for step in range(0, last + 1, unit)]


def _apart(load: Mapping[str, Sequence[float]]) -> float | None:
    """The share of tokens that would have to change experts to make both modalities' loads equal.

    0: the router treats them alike; 1: they share no expert.
    """
    if len(load) != 2:
        return None
    one, other = load.values()
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2
