"""Generated grid scenes: coloured shapes in the cells of a grid, and what is where."""

import random
from collections.abc import Callable, Iterable
from functools import cache
from itertools import permutations, product
from math import comb
from typing import NamedTuple

from PIL import Image as PILImage
from PIL import ImageDraw

from sandbox.data.drawing import COLORS
from sandbox.data.generated import check_names, fingerprint, pick_questions, split_of, stream, thin
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

VERSION = 1  # raise it when the same arguments draw or ask something else

SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
OBJECT_COUNTS = (2, 3, 4, 5, 6)
# Pairs that occur in `heldout` only: 4 of 36. Every shape leaves out one colour.
BANNED = {("circle", "red"), ("square", "cyan"), ("triangle", "orange"), ("cross", "purple")}
ALLOWED = [pair for pair in product(SHAPES, COLORS) if pair not in BANNED]
# What can be tallied, and how many allowed pairs have it.
PLURALS = SHAPES | {color: f"{color} objects" for color in COLORS}
ALLOWED_WITH = {word: sum(word in pair for pair in ALLOWED) for word in PLURALS}
KEEP_COLOR = thin({color: ALLOWED_WITH[color] for color in COLORS})
# Relation, and the direction in which its first object lies: (down, right).
RELATIONS = (("left of", 0, -1), ("right of", 0, 1), ("above", -1, 0), ("below", 1, 0))


class Thing(NamedTuple):
    """One object of a scene; rows count from the top, columns from the left, both from 0."""

    shape: str
    color: str
    row: int
    column: int

    @property
    def pair(self) -> tuple[str, str]:
        """What the object is, wherever it stands."""
        return self.shape, self.color

    @property
    def name(self) -> str:
        """What questions call it; no two objects of a scene share it."""
        return f"the {self.color} {self.shape}"


def place_name(row: int, column: int, grid: int) -> str:
    """The words for a cell.

    >>> place_name(0, 2, grid=3), place_name(1, 1, grid=3), place_name(0, 3, grid=4)
    ('top right', 'middle center', 'row 1, column 4')
    """
    if grid == 3:
        return f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"
    return f"row {row + 1}, column {column + 1}"


# --- Questions -----------------------------------------------------------------------------------
# One function a type: (question, chance to keep it, the objects it touches). Chances thin what
# comes up too often until all answers to a question are equally frequent. Questions for places,
# shapes and relations need none: places are drawn independently of what stands there.

Asked = Iterable[tuple[Question, float, list[Thing]]]


def _color(things: list[Thing], grid: int, rng: random.Random) -> Asked:
    present = tuple(sorted({thing.color for thing in things}))
    for thing in things:
        text = f"What color is the object in the {place_name(thing.row, thing.column, grid)}?"
        yield Question(text, thing.color, "color", present), KEEP_COLOR[thing.color], [thing]


def _shape(things: list[Thing], grid: int, rng: random.Random) -> Asked:
    present = tuple(sorted({thing.shape for thing in things}))
    for thing in things:
        text = f"What shape is the object in the {place_name(thing.row, thing.column, grid)}?"
        yield Question(text, thing.shape, "shape", present), 1, [thing]


def _place(things: list[Thing], grid: int, rng: random.Random) -> Asked:
    places = [place_name(thing.row, thing.column, grid) for thing in things]
    for thing, place in zip(things, places, strict=True):
        yield Question(f"Where is {thing.name}?", place, "place", tuple(sorted(places))), 1, [thing]


def _count(things: list[Thing], grid: int, rng: random.Random) -> Asked:
    yield Question("How many objects are there?", str(len(things)), "count"), 1, things


def _tally(things: list[Thing], grid: int, rng: random.Random) -> Asked:
    # Words are drawn by lot before their chances: many fall away, and which others are left must
    # not decide whether one is asked.
    for word in rng.sample(list(PLURALS), 6):
        same = [thing for thing in things if word in thing.pair]
        keep = _keep_tally(word, len(things)).get(len(same), 0)
        yield Question(f"How many {PLURALS[word]} are there?", str(len(same)), "tally"), keep, same


def _relation(things: list[Thing], grid: int, rng: random.Random) -> Asked:
    # Objects in one column are left of each other in neither order: asking would favour "No".
    for one, other in permutations(things, 2):
        words, down, right = rng.choice(RELATIONS)
        distance = down * (one.row - other.row) + right * (one.column - other.column)
        if distance:
            text = f"Is {one.name} {words} {other.name}?"
            answer = "Yes" if distance > 0 else "No"
            yield Question(text, answer, "relation", ("No", "Yes")), 1, [one, other]


QUESTIONS: dict[str, Callable[[list[Thing], int, random.Random], Asked]] = {
    "color": _color,
    "shape": _shape,
    "place": _place,
    "count": _count,
    "tally": _tally,
    "relation": _relation,
}


@cache
def _keep_tally(word: str, total: int) -> dict[int, float]:
    """By number 0..2 of objects with this shape or colour, of all objects in the scene.

    A scene's objects are a random subset of the allowed pairs, so numbers are hypergeometric.
    """
    having = ALLOWED_WITH[word]
    lacking = len(ALLOWED) - having
    return thin({n: comb(having, n) * comb(lacking, total - n) for n in range(3)})


# --- Drawing -------------------------------------------------------------------------------------


@cache
def stencil(shape: str, side: int) -> PILImage.Image:
    """A mask [side, side] of a shape that fills it, with smooth edges."""
    large = side * 8
    mask = PILImage.new("L", (large, large))
    pen = ImageDraw.Draw(mask)
    end = large - 1
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        inset = side // 14 * 8  # a full square would look larger than the other shapes
        pen.rectangle((inset, inset, end - inset, end - inset), fill=255)
    elif shape == "triangle":
        pen.polygon(((end / 2, 0), (end, end), (0, end)), fill=255)
    else:
        arm = round(side / 3) * 8  # whole pixels, so that edges are sharp
        pen.rectangle((arm, 0, end - arm, end), fill=255)
        pen.rectangle((0, arm, end, end - arm), fill=255)
    return mask.reduce(8)


def _draw(things: list[Thing], size: int, grid: int) -> PILImage.Image:
    image = PILImage.new("RGB", (size, size), "white")
    side = size * 7 // (grid * 8)
    for thing in things:
        # Cell edges are rounded, so that grids that do not divide the size still fill it.
        left = round((thing.column + 0.5) * size / grid - side / 2)
        top = round((thing.row + 0.5) * size / grid - side / 2)
        box = (left, top, left + side, top + side)
        image.paste(COLORS[thing.color], box, stencil(thing.shape, side))
    return image


class Shapes(Task):
    """Scenes of 2 to 6 coloured shapes in a grid; no two objects share both shape and colour.

    Question types: ``color`` and ``shape`` of the object at a place, ``place`` of an object
    ("Where is the red circle?" "top left"), ``count`` of all objects, ``tally`` of those of a
    shape or colour (0..2), and ``relation`` ("Is the red circle left of the blue square?").
    Places are called "top left" in a 3 x 3 grid, "row 1, column 4" in others.

    Outside `heldout`, all possible answers are equally frequent, for each question string.
    `heldout` scenes have one object of a (shape, colour) pair that no other split has, and every
    question touches that object.

    Args:
        size: pixels a side.
        grid: cells a side; a cell needs 12 pixels or more.
        questions: question types; None means color, place, count and relation.
        questions_per_image: at most so many distinct questions an image, at least one.
        seed: another seed draws other scenes, from the same splits.

    Raises:
        UserError: an unknown question type, or a number out of range.
    """

    def __init__(
        self,
        size: int = 48,
        grid: int = 3,
        questions: list[str] | None = None,
        questions_per_image: int = 8,
        seed: int = 0,
    ) -> None:
        self.questions = ["color", "place", "count", "relation"] if questions is None else questions
        check_names("question type", self.questions, tuple(QUESTIONS))
        if grid < 2 or size < 12 * grid or questions_per_image < 1:
            raise UserError(
                "shapes need grid >= 2, size >= 12 * grid and questions_per_image >= 1, "
                f"got {grid}, {size} and {questions_per_image}"
            )
        self.pixels = size
        self.grid = grid
        self.questions_per_image = questions_per_image
        self.seed = seed

    def size(self, split: Split) -> None:
        """None: every split is generated without end."""

    def sample(self, split: Split, index: int) -> Sample:
        """The scene at ``index`` of ``split``: one RGB image and its questions."""
        rng = stream(self.seed, split, index)
        while True:
            things = self._random_things(split == "heldout", rng)
            content = fingerprint(sorted(things), self.grid, self.pixels)
            if split != "heldout" and split_of(content) != split:
                continue
            questions = self._ask(things, rng)
            if questions:
                image = _draw(things, self.pixels, self.grid)
                return Sample((image,), questions, content, text=self._tell(things))

    def _tell(self, things: list[Thing]) -> str:
        """The scene in words, row by row.

        >>> Shapes()._tell([Thing("circle", "red", 2, 1), Thing("square", "blue", 0, 0)])
        'top left blue square, bottom center red circle.'
        """
        in_order = sorted(things, key=lambda thing: (thing.row, thing.column))
        told = (f"{place_name(t.row, t.column, self.grid)} {t.color} {t.shape}" for t in in_order)
        return ", ".join(told) + "."

    def _random_things(self, heldout: bool, rng: random.Random) -> list[Thing]:
        count = rng.choice([n for n in OBJECT_COUNTS if n <= self.grid**2])
        pairs = rng.sample(ALLOWED, count - heldout)
        if heldout:
            pairs.append(rng.choice(sorted(BANNED)))
        cells = rng.sample(range(self.grid**2), count)
        return [
            Thing(shape, color, *divmod(cell, self.grid))
            for (shape, color), cell in zip(pairs, cells, strict=True)
        ]

    def _ask(self, things: list[Thing], rng: random.Random) -> tuple[Question, ...]:
        novel = [thing for thing in things if thing.pair in BANNED]
        by_kind = []
        for kind in self.questions:
            asked = QUESTIONS[kind](things, self.grid, rng)
            if novel:
                kept = [question for question, _, touched in asked if novel[0] in touched]
            else:
                kept = [question for question, keep, _ in asked if rng.random() < keep]
            by_kind.append(kept)
        return pick_questions(by_kind, self.questions_per_image, rng)

    def identity(self) -> str:
        """A short hash of the version and every argument."""
        asked = self.questions, self.questions_per_image
        return fingerprint("Shapes", VERSION, self.pixels, self.grid, *asked, self.seed)
