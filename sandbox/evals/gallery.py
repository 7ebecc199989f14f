"""An evaluation as one page to look at: what went best, what went worst, and what it was sure of.

The same predictions give the same page, byte for byte.
"""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined
from PIL import Image as PILImage

from sandbox.data.task import Task
from sandbox.evals.predictions import Prediction

CARDS = 12  # of a section, at most
PICTURES = 4  # of a sample, at most
SIDE = 400  # pixels of the longer side of a picture, at most
WRONG = 0.5  # a lower score is a mistake


@dataclass(frozen=True)
class Section:
    """Predictions under one heading; ``note`` says how they were chosen."""

    title: str
    note: str
    predictions: Sequence[Prediction]


def write_gallery(
    path: Path, task: Task, predictions: Sequence[Prediction], summary: dict[str, Any]
) -> None:
    """Write the page; it loads nothing from elsewhere.

    Args:
        path: the file.
        task: where the pictures are read again.
        predictions: about the questions' own images.
        summary: what ``summary.json`` holds.
    """
    environment = Environment(
        loader=PrefixLoader(
            {room: PackageLoader(f"sandbox.{room}", ".") for room in ("evals", "report")}
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval}
    chosen = sections(predictions)

    def pictures(of: Prediction) -> list[tuple[str, bool]]:
        images = task.sample(of.split, of.index).images[:PICTURES]
        return [_embedded(image) for image in images]

    page = environment.get_template("evals/gallery.html.jinja").render(
        summary=summary, sections=chosen, pictures=pictures, wrong=WRONG
    )
    # Half a character in a reply has no UTF-8.
    path.write_text(page, encoding="utf-8", errors="replace")


def sections(predictions: Sequence[Prediction]) -> list[Section]:
    """What to show: at most ``CARDS`` predictions a section, and one of each sample."""
    if any(each.score is None for each in predictions):
        return [
            Section(
                "What it is surest of",
                "The replies with the highest probability; nobody here knows what is right.",
                _first(predictions, lambda p: -p.confidence),
            ),
            Section(
                "What it is least sure of",
                "Those with the lowest.",
                _first(predictions, lambda p: p.confidence),
            ),
        ]
    right = [each for each in predictions if (each.score or 0) >= WRONG]
    mistakes = [each for each in predictions if (each.score or 0) < WRONG]
    found = [
        Section(
            "Its surest mistakes",
            "Wrong, and yet the replies that it gives the highest probability.",
            _first(mistakes, lambda p: -p.confidence),
        ),
        Section(
            "Its worst answers",
            "The lowest scores; of equal ones, those that it was least sure of.",
            _first(mistakes, lambda p: (p.score, p.confidence)),
        ),
        Section(
            "Its best answers",
            "The highest scores; of equal ones, those that it was surest of.",
            _first(right, lambda p: (-(p.score or 0), -p.confidence)),
        ),
    ]
    return [section for section in found if section.predictions]


def _first(predictions: Iterable[Prediction], key: Callable[[Prediction], Any]) -> list[Prediction]:
    """The first by a key, the order of the benchmark among equals; one of each content."""
    by_content: dict[str, Prediction] = {}
    for each in sorted(predictions, key=key):
        by_content.setdefault(each.content, each)
        if len(by_content) == CARDS:
            break
    return list(by_content.values())


def _embedded(image: PILImage.Image) -> tuple[str, bool]:
    """A picture as a URI, no larger than needed, and whether it is so small that pixels show."""
    small = image.width < SIDE // 2
    shown = image.convert("RGB")
    shown.thumbnail((SIDE, SIDE))
    buffer, kind = io.BytesIO(), "PNG" if small else "JPEG"
    shown.save(buffer, format=kind, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{data}", small


def _percent(share: float) -> str:
    """A share for people.

    >>> _percent(0.957)
    '95.7%'
    """
    return f"{share:.1%}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%" if bounds else ""
