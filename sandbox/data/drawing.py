"""How generated charts look: a small style of flat pixels, and a large one as a person draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import cos, radians, sin

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

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
# The large style names items by label, so its colours may be those of a printed chart.
PALETTE: tuple[Color, ...] = (
    (46, 117, 182),
    (226, 122, 38),
    (72, 152, 84),
    (196, 64, 68),
    (130, 96, 172),
    (120, 120, 124),
)
INK: Color = (90, 90, 90)
GRID: Color = (225, 225, 225)
TITLE: Color = (35, 35, 35)


@dataclass(frozen=True)
class Theme:
    """What a chart is about: nine names of one category (a color, a country, ...)."""

    category: str
    title: str
    measure: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """All that is drawn. Items stand in drawing order: from the left, or clockwise in a pie.

    ``columns[k][i]`` is the level of item i in period k, on an axis from 0 to 10; charts without
    periods have one column. A value is a level times ``unit``; a pie's unit is 5 percent.
    """

    chart: str
    theme: Theme
    names: tuple[int, ...]  # places in theme.names
    columns: tuple[tuple[int, ...], ...]
    periods: tuple[str, ...] = ("",)
    unit: int = 1
    large: bool = False
    tint: int = 0  # large style: the first colour taken from the palette
    printed: bool = False  # large style: whether values are written at bars or in slices

    @property
    def words(self) -> list[str]:
        """The names of the items."""
        return [self.theme.names[name] for name in self.names]


def draw(scene: Scene, size: int) -> PILImage.Image:
    """The picture of a scene, ``size`` x ``size`` RGB."""
    if scene.large:
        return _draw_large(scene, size)
    if scene.chart == "pie":
        return _small_pie(scene, size)
    image = _small_axes(size).copy()
    return (_small_bars if scene.chart == "bar" else _small_points)(scene, image)


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
    """Evenly spread columns between the axis and the right edge."""
    start, step = size * 0.1, size * 0.9 / count
    return [start + (place + 0.5) * step for place in range(count)]


def _small_bars(scene: Scene, image: PILImage.Image) -> PILImage.Image:
    size = image.width
    pen = ImageDraw.Draw(image)
    width, floor = round(size * 0.14), _height(0, size) - 1
    centres = _centres(len(scene.names), size)
    for word, level, x in zip(scene.words, scene.columns[0], centres, strict=True):
        left = round(x - width / 2)
        pen.rectangle((left, _height(level, size), left + width - 1, floor), fill=COLORS[word])
    return image


def _small_points(scene: Scene, image: PILImage.Image) -> PILImage.Image:
    size = image.width
    pen = ImageDraw.Draw(image)
    radius = round(size * 0.055)
    centres = _centres(len(scene.names), size)
    points = [
        (round(x), _height(level, size)) for x, level in zip(centres, scene.columns[0], strict=True)
    ]
    pen.line(points, fill=INK, width=max(1, size // 64))
    for word, (x, y) in zip(scene.words, points, strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[word])
    return image


def _small_pie(scene: Scene, size: int) -> PILImage.Image:
    image = PILImage.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    edge = round(size * 0.05)
    for word, start, end in zip(scene.words, *_angles(scene), strict=True):
        pen.pieslice((edge, edge, size - 1 - edge, size - 1 - edge), start, end, COLORS[word])
    return image


def _angles(scene: Scene) -> tuple[list[float], list[float]]:
    """Where slices start and end, in Pillow's degrees (0 at three o'clock); from the top."""
    starts, ends = [], []
    angle = -90.0
    for level in scene.columns[0]:
        starts.append(angle)
        angle += 3.6 * level * scene.unit
        ends.append(angle)
    return starts, ends


# --- Large style: title, labels, legend, smooth edges ---------------------------------------------


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


class _Sheet:
    """A page that draws shapes 4 times enlarged, so that reducing smooths them, then the words."""

    SCALE = 4

    def __init__(self, size: int) -> None:
        self.size = size
        self.text = max(9, round(size * 0.031))  # pixels of an ordinary word
        self.shapes = PILImage.new("RGB", (size * self.SCALE, size * self.SCALE), "white")
        self.pen = ImageDraw.Draw(self.shapes)
        self.words: list[tuple[float, float, str, Color, int, str]] = []
        self.uprights: list[tuple[int, int, PILImage.Image]] = []

    def width(self, text: str) -> float:
        """How wide an ordinary word is, in pixels."""
        return _font(self.text).getlength(text)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Color) -> None:
        """A filled rectangle, right and bottom exclusive."""
        s = self.SCALE
        self.pen.rectangle((left * s, top * s, right * s - 1, bottom * s - 1), fill)

    def path(self, points: Sequence[tuple[float, float]], fill: Color, width: float) -> None:
        """A line through the points, a disc at each."""
        s = self.SCALE
        self.pen.line([(x * s, y * s) for x, y in points], fill, round(width * s), joint="curve")
        for x, y in points:
            radius = 1.7 * width
            self.pen.ellipse(
                ((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s), fill
            )

    def slice(
        self, x: float, y: float, radius: float, start: float, end: float, fill: Color
    ) -> None:
        """A slice of a pie with a white edge."""
        s = self.SCALE
        bounds = ((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s)
        self.pen.pieslice(bounds, start, end, fill, "white", s)

    def write(
        self,
        x: float,
        y: float,
        text: str,
        fill: Color = INK,
        anchor: str = "ms",
        scale: float = 1,
    ) -> None:
        """A word at a point that Pillow's anchor names."""
        self.words.append((x, y, text, fill, round(self.text * scale), anchor))

    def write_upright(self, x: float, top: float, text: str) -> None:
        """A word that reads upwards, ending at ``top``, centred on x."""
        mask = PILImage.new("L", (round(self.width(text)) + 2, round(self.text * 1.3)))
        ImageDraw.Draw(mask).text((0, mask.height), text, 255, _font(self.text), anchor="ld")
        turned = mask.transpose(PILImage.Transpose.ROTATE_90)
        self.uprights.append((round(x - turned.width / 2), round(top), turned))

    def finish(self) -> PILImage.Image:
        """The page at its size."""
        image = self.shapes.reduce(self.SCALE)
        pen = ImageDraw.Draw(image)
        for x, y, text, fill, size, anchor in self.words:
            pen.text((x, y), text, fill, _font(size), anchor)
        for left, top, mask in self.uprights:
            image.paste(INK, (left, top), mask)
        return image


@dataclass(frozen=True)
class _Plot:
    """The area between the axes, in pixels of the sheet."""

    left: float
    top: float
    right: float
    bottom: float

    def row(self, level: int) -> float:
        """The height of an axis level (0..10)."""
        return self.bottom - (self.bottom - self.top) * level / 10

    def centres(self, count: int) -> list[float]:
        """Evenly spread columns."""
        step = (self.right - self.left) / count
        return [self.left + (place + 0.5) * step for place in range(count)]


def _draw_large(scene: Scene, size: int) -> PILImage.Image:
    sheet = _Sheet(size)
    margin = round(size * 0.04)
    sheet.write(margin, margin, scene.theme.title, TITLE, "la", 1.35)
    measure = "share in percent" if scene.chart == "pie" else scene.theme.measure
    sheet.write(margin, margin + sheet.text * 1.8, measure, INK, "la")
    top = margin + sheet.text * 4.4
    if scene.chart == "pie":
        bottom = _legend(sheet, scene, margin)
        _large_pie(sheet, scene, top - sheet.text, bottom - sheet.text)
        return sheet.finish()
    labels = scene.words if scene.chart == "bar" else list(scene.periods)
    widest = max(map(sheet.width, labels))
    left = round(margin + sheet.width(str(10 * scene.unit)) + sheet.text * 0.6)
    upright = widest + sheet.text * 0.4 > (size - margin - left) / len(labels)
    below = widest + sheet.text * 0.4 if upright else sheet.text * 1.4
    bottom = size - margin if scene.chart == "bar" else _legend(sheet, scene, margin)
    plot = _Plot(left, round(top), size - margin, round(bottom - below - sheet.text * 0.4))
    _large_axes(sheet, scene, plot)
    for x, label in zip(plot.centres(len(labels)), labels, strict=True):
        if upright:
            sheet.write_upright(x, plot.bottom + sheet.text * 0.4, label)
        else:
            sheet.write(x, plot.bottom + sheet.text * 0.5, label, anchor="ma")
    (_large_bars if scene.chart == "bar" else _large_lines)(sheet, scene, plot)
    sheet.box(plot.left, plot.bottom, plot.right, plot.bottom + 1, INK)
    return sheet.finish()


def _large_axes(sheet: _Sheet, scene: Scene, plot: _Plot) -> None:
    for level in range(11):
        row = round(plot.row(level))
        sheet.box(plot.left, row, plot.right, row + 1, GRID)
        if level % 2 == 0:
            value = str(level * scene.unit)
            sheet.write(plot.left - sheet.text * 0.5, row, value, anchor="rm")


def _large_bars(sheet: _Sheet, scene: Scene, plot: _Plot) -> None:
    centres = plot.centres(len(scene.names))
    half = min((plot.right - plot.left) / len(centres) * 0.33, sheet.size * 0.07)
    for x, level in zip(centres, scene.columns[0], strict=True):
        row = round(plot.row(level))
        sheet.box(round(x - half), row, round(x + half), plot.bottom, PALETTE[scene.tint])
        if scene.printed:
            sheet.write(x, row - sheet.text * 0.3, str(level * scene.unit), TITLE)


def _item_colors(scene: Scene) -> list[Color]:
    return [PALETTE[(scene.tint + place) % len(PALETTE)] for place in range(len(scene.names))]


def _large_lines(sheet: _Sheet, scene: Scene, plot: _Plot) -> None:
    centres = plot.centres(len(scene.columns))
    for place, color in enumerate(_item_colors(scene)):
        rows = [plot.row(levels[place]) for levels in scene.columns]
        sheet.path(list(zip(centres, rows, strict=True)), color, max(1.5, sheet.size / 200))


def _large_pie(sheet: _Sheet, scene: Scene, top: float, bottom: float) -> None:
    x, y, radius = sheet.size / 2, (top + bottom) / 2, (bottom - top) / 2
    starts, ends = _angles(scene)
    shares = zip(scene.columns[0], _item_colors(scene), starts, ends, strict=True)
    for level, color, start, end in shares:
        sheet.slice(x, y, radius, start, end, color)
        if scene.printed:
            middle = radians((start + end) / 2)
            where = x + 0.68 * radius * cos(middle), y + 0.68 * radius * sin(middle)
            sheet.write(*where, f"{level * scene.unit}%", (255, 255, 255), "mm")


def _legend(sheet: _Sheet, scene: Scene, margin: float) -> float:
    """Write colour keys at the foot of the sheet, in rows as needed; return where they begin."""
    key, gap = sheet.text * 0.8, sheet.text * 1.2
    rows: list[list[tuple[str, Color, float]]] = [[]]
    room = sheet.size - 2 * margin
    for word, color in zip(scene.words, _item_colors(scene), strict=True):
        width = key * 1.5 + sheet.width(word) + gap
        if sum(entry[2] for entry in rows[-1]) + width > room:
            rows.append([])
        rows[-1].append((word, color, width))
    top = sheet.size - margin - len(rows) * sheet.text * 1.5
    for place, row in enumerate(rows):
        x = (sheet.size - sum(entry[2] for entry in row) + gap) / 2
        middle = top + (place + 0.5) * sheet.text * 1.5
        for word, color, width in row:
            sheet.box(x, middle - key / 2, x + key, middle + key / 2, color)
            sheet.write(x + key * 1.5, middle, word, anchor="lm")
            x += width
    return top - sheet.text * 0.4
