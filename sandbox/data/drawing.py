"""How generated charts look: a small style of flat pixels, and a large one as a person draws."""

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image as PILImage
from PIL import ImageDraw

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (225, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 215, 0),
    "green": (30, 160, 60),
    "cyan": (0, 195, 215),
    "blue": (35, 80, 225),
    "purple": (135, 45, 170),
    "pink": (255, 130, 195),
    "black": (30, 30, 30),
}
INK: Color = (90, 90, 90)
GRID: Color = (225, 225, 225)


@dataclass(frozen=True)
class Theme:
    """What a chart is about: nine names of one category (a color, a country, ...)."""

    category: str
    title: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """All that is drawn. Items stand in drawing order, from the left or clockwise.

    ``columns[k][i]`` is the level (1..9 on an axis of 0..10) of item i in period k; charts
    without periods have one column. A value is a level times ``unit``.
    """

    chart: str
    theme: Theme
    names: tuple[int, ...]  # places in theme.names
    columns: tuple[tuple[int, ...], ...]
    periods: tuple[str, ...] = ("",)
    unit: int = 1
    printed: bool = False  # whether each value is written at its item


def draw(scene: Scene, size: int) -> PILImage.Image:
    """The picture of a scene, ``size`` x ``size`` RGB."""
    return _small_bars(scene, size)


# --- Small style: flat pixels, one colour an item ------------------------------------------------


def _height(level: int, size: int) -> int:
    """The row of an axis level (0..10) in an image of this many rows."""
    return round(size * (0.94 - 0.088 * level))


@lru_cache(maxsize=8)
def _small_axes(size: int) -> PILImage.Image:
    image = PILImage.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    axis, tick = round(size * 0.08), max(1, round(size * 0.03))
    for level in range(11):
        row = _height(level, size)
        if level % 2 == 0:
            pen.line((axis, row, size, row), fill=GRID)
        pen.line((axis - tick, row, axis, row), fill=INK)
    pen.line((axis, _height(10, size), axis, _height(0, size)), fill=INK)
    pen.line((axis, _height(0, size), size, _height(0, size)), fill=INK)
    return image


def _centres(count: int, size: int) -> list[float]:
    """Columns of evenly spread items between the axis and the right edge."""
    start, step = size * 0.1, size * 0.9 / count
    return [start + (place + 0.5) * step for place in range(count)]


def _small_bars(scene: Scene, size: int) -> PILImage.Image:
    image = _small_axes(size).copy()
    pen = ImageDraw.Draw(image)
    half = size * 0.06
    floor = _height(0, size) - 1
    for name, level, x in zip(
        scene.names, scene.columns[0], _centres(len(scene.names), size), strict=True
    ):
        color = COLORS[scene.theme.names[name]]
        box = (round(x - half), _height(level, size), round(x + half), floor)
        pen.rectangle(box, fill=color)
    return image
