"""Generated sets of labelled pictures: what each shows, how two compare, which is the odd one."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

from PIL import Image as PILImage

from sandbox.data.drawing import COLORS
from sandbox.data.generated import check_names, fingerprint, pick_questions, split_of, stream
from sandbox.data.shapes import SHAPES, stencil
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

VERSION = 1  # raise it when the same arguments draw or ask something else

LETTERS = "ABCDEFGHIJKL"
NOTHING = "none"  # what a letter without a picture shows
HUES = tuple(color for color in COLORS if color != "orange")  # too near to red and to yellow
NUMBERS = (1, 2, 3)
# Pairs of shape and colour that occur in `heldout` only: 8 of 32. Every colour leaves out one
# shape and every shape two colours, so no colour, shape or pair that is left is special: whatever
# is drawn without naming one, all come up equally often, and questions need no further balance.
BANNED = [
    (shape, hue) for n, hue in enumerate(HUES) for m, shape in enumerate(SHAPES) if n % 4 == m
]
ALLOWED = [pair for pair in product(SHAPES, HUES) if pair not in BANNED]


class Picture(NamedTuple):
    """One to three objects alike; spots are the left and top of each, in pixels."""

    shape: str
    color: str
    spots: tuple[tuple[int, int], ...]

    @property
    def novel(self) -> bool:
        """Whether only `heldout` shows such objects."""
        return (self.shape, self.color) in BANNED

    def __str__(self) -> str:
        number = len(self.spots)
        return f"{number} {self.color} {self.shape if number == 1 else SHAPES[self.shape]}"


ASPECTS: dict[str, Callable[[Picture], str]] = {
    "color": lambda picture: picture.color,
    "shape": lambda picture: picture.shape,
    "number": lambda picture: str(len(picture.spots)),
}


class Scene(NamedTuple):
    """The pictures of a sample in order, and what they are called.

    ``mates`` are places of pictures drawn together: those share each aspect half of the time.
    A scene drawn for the question of the odd one out has none.
    """

    pictures: list[Picture]
    letters: list[str]
    mates: list[tuple[int, int]]


def odd_one(values: list[str]) -> int | None:
    """The place whose value differs where all others agree; None where there is no such place.

    >>> odd_one(["red", "red", "blue"]), odd_one(["red", "blue"]), odd_one(["red", "red"])
    (2, None, None)
    """
    if len(values) < 3 or len(set(values)) != 2:
        return None
    single = [place for place, value in enumerate(values) if values.count(value) == 1]
    return single[0] if single else None


# --- Questions -----------------------------------------------------------------------------------
# One function a type: questions, each with the pictures that it touches.

Asked = Iterator[tuple[Question, list[Picture]]]


def _look_up(aspect: str, kind: str, wording: str) -> Callable[[Scene, list[str]], Asked]:
    """A type that asks for one picture's aspect, where the pictures differ in it.

    (Where all agree, any picture would tell.)
    """

    def ask(scene: Scene, aspects: list[str]) -> Asked:
        values = [ASPECTS[aspect](picture) for picture in scene.pictures]
        present = tuple(sorted(set(values)))
        if aspect in aspects and len(present) > 1:
            for picture, letter, value in zip(scene.pictures, scene.letters, values, strict=True):
                yield Question(wording.format(letter), value, kind, present), [picture]

    return ask


def _same(scene: Scene, aspects: list[str]) -> Asked:
    for one, other in scene.mates:
        pair = [scene.pictures[one], scene.pictures[other]]
        names = f"{scene.letters[one]} and {scene.letters[other]}"
        for aspect in aspects:
            of = " of objects" if aspect == "number" else ""
            text = f"Do pictures {names} show the same {aspect}{of}?"
            agree = len({ASPECTS[aspect](picture) for picture in pair}) == 1
            yield Question(text, "Yes" if agree else "No", "same", ("No", "Yes")), pair


def _more(scene: Scene, aspects: list[str]) -> Asked:
    for mates in scene.mates if "number" in aspects else ():
        for one, other in (mates, mates[::-1]):
            pair = [scene.pictures[one], scene.pictures[other]]
            a, b = (len(picture.spots) for picture in pair)
            if a != b:  # "No" to both orders would be one "No" too many
                text = (
                    f"Does picture {scene.letters[one]} show more objects "
                    f"than picture {scene.letters[other]}?"
                )
                yield Question(text, "Yes" if a > b else "No", "more", ("No", "Yes")), pair


def _odd(scene: Scene, aspects: list[str]) -> Asked:
    if not scene.mates:
        (place,) = _odd_ones(scene.pictures)
        text, present = "Which picture is the odd one out?", tuple(sorted(scene.letters))
        yield Question(text, scene.letters[place], "odd", present), scene.pictures


QUESTIONS: dict[str, Callable[[Scene, list[str]], Asked]] = {
    "color": _look_up("color", "color", "What color does picture {} show?"),
    "shape": _look_up("shape", "shape", "What shape does picture {} show?"),
    "count": _look_up("number", "count", "How many objects does picture {} show?"),
    "same": _same,
    "more": _more,
    "odd": _odd,
}
ABOUT_NUMBERS = {"count", "more"}  # a held-out pair is nothing new to these


# --- Scenes --------------------------------------------------------------------------------------


def _odd_ones(pictures: list[Picture]) -> list[int]:
    """The odd one out by each aspect that has one."""
    found = (odd_one([value(picture) for picture in pictures]) for value in ASPECTS.values())
    return [place for place in found if place is not None]


def _picture(shape: str, color: str, number: int, size: int, rng: random.Random) -> Picture:
    """Objects in distinct quarters of the picture, each anywhere inside its quarter."""
    half = size // 2
    slack = half - _side(size)
    spots = []
    for quarter in rng.sample(range(4), number):
        left, top = half * (quarter % 2), half * (quarter // 2)
        # A pixel from the edge: two squares that touch would be a rectangle.
        spots.append((left + rng.randint(1, slack - 1), top + rng.randint(1, slack - 1)))
    return Picture(shape, color, tuple(sorted(spots)))


def _side(size: int) -> int:
    """Pixels a side of an object: 12 of 32."""
    return size * 3 // 8


def _two(novel: bool, size: int, rng: random.Random) -> list[Picture]:
    """Two pictures that share each aspect with probability 1/2, independently.

    A novel first one has a held-out pair, and so has the second if it shares both.
    """
    shape, color = rng.choice(BANNED if novel else ALLOWED)
    shares = (rng.random() < 0.5, rng.random() < 0.5)
    if all(shares):
        pair = (shape, color)
    else:
        pair = rng.choice([(s, c) for s, c in ALLOWED if (s == shape, c == color) == shares])
    number = rng.choice(NUMBERS)
    others = [n for n in NUMBERS if n != number]
    second = number if rng.random() < 0.5 else rng.choice(others)
    return [_picture(shape, color, number, size, rng), _picture(*pair, second, size, rng)]


def _random_mates(count: int, heldout: bool, size: int, rng: random.Random) -> Scene:
    """``count`` pictures drawn in twos; the last has no mate where the count is odd."""
    pictures = [p for n in range(0, count, 2) for p in _two(heldout and n == 0, size, rng)][:count]
    order = rng.sample(range(count), count)
    place = {drawn: shown for shown, drawn in enumerate(order)}
    mates = [(place[n], place[n + 1]) for n in range(0, count - 1, 2)]
    mates = [rng.choice((pair, pair[::-1])) for pair in mates]
    return Scene([pictures[drawn] for drawn in order], rng.sample(LETTERS, count), mates)


def _random_odd(count: int, heldout: bool, size: int, rng: random.Random) -> Scene:
    """``count`` pictures of which one is odd, by colour or by shape, and none by anything else."""
    while True:
        aspect = rng.choice(("color", "shape"))
        common, other = rng.sample(HUES if aspect == "color" else list(SHAPES), 2)
        values = rng.sample([other] + [common] * (count - 1), count)
        shapes = values if aspect == "shape" else rng.choices(list(SHAPES), k=count)
        colors = values if aspect == "color" else rng.choices(HUES, k=count)
        pairs = list(zip(shapes, colors, strict=True))
        if sum(pair in BANNED for pair in pairs) == int(heldout):
            pictures = [_picture(*pair, rng.choice(NUMBERS), size, rng) for pair in pairs]
            if len(_odd_ones(pictures)) == 1:
                return Scene(pictures, rng.sample(LETTERS, count), [])


def _draw(picture: Picture, size: int) -> PILImage.Image:
    image = PILImage.new("RGB", (size, size), "white")
    side = _side(size)
    for left, top in picture.spots:
        box = (left, top, left + side, top + side)
        image.paste(COLORS[picture.color], box, stencil(picture.shape, side))
    return image


class Pictures(Task):
    """Several small pictures, each called by a letter, and questions that name the letters.

    A picture shows one to three objects of one shape and one colour. Letters are drawn anew for
    every sample, out of 12 and in any order, so who learned from two pictures knows the names of
    eight: train on ``images: [2]`` and test with ``images=[8]``.

    Question types: ``color``, ``shape`` and ``count`` ask what one picture shows ("What color does
    picture C show?"), where not all pictures show the same; ``same`` and ``more`` compare two ("Do
    pictures A and C show the same shape?", "Does picture A show more objects than picture C?");
    ``odd`` asks which of three or more is the odd one out: all others share a colour, or a shape,
    and no other picture is odd by anything (one in so many scenes as there are types is drawn for
    that question alone).

    All possible answers are equally frequent, for each question string. `heldout` has pairs of
    shape and colour that no other split has, and each question touches one: none is about numbers.
    With two pictures exchanged, ``same`` has the same answer, and ``more`` the other.

    Args:
        size: pixels a side, even.
        images: numbers of pictures a sample may have, 2 to 12; None means 2.
        questions: question types; None means all but odd.
        questions_per_sample: at most so many distinct questions a sample, at least one.
        gaps: up to so many further letters stand among the others and have no picture ("K: none.").
            Which picture comes first then tells less, and its letter all the more.
        seed: another seed draws other pictures, from the same splits.

    Raises:
        UserError: an unknown question type, or a number out of range.
    """

    def __init__(
        self,
        size: int = 32,
        images: list[int] | None = None,
        questions: list[str] | None = None,
        questions_per_sample: int = 8,
        gaps: int = 0,
        seed: int = 0,
    ) -> None:
        self.images = [2] if images is None else images
        self.questions = [kind for kind in QUESTIONS if kind != "odd"]
        self.questions = self.questions if questions is None else questions
        check_names("question type", self.questions, tuple(QUESTIONS))
        if not self.images or not all(2 <= count <= len(LETTERS) for count in self.images):
            raise UserError(f"pictures: images must list numbers 2 to 12, got {self.images}")
        if not 0 <= gaps <= len(LETTERS) - max(self.images):
            raise UserError(
                f"pictures: {max(self.images)} images leave {len(LETTERS) - max(self.images)} of "
                f"{len(LETTERS)} letters, got gaps={gaps}"
            )
        if "odd" in self.questions and max(self.images) < 3:
            raise UserError(f"pictures: the odd one out is one of 3 or more, got {self.images}")
        if size < 24 or size % 2 or questions_per_sample < 1:
            raise UserError(
                "pictures need an even size >= 24 and questions_per_sample >= 1, "
                f"got {size} and {questions_per_sample}"
            )
        self.pixels = size
        self.questions_per_sample = questions_per_sample
        self.gaps = gaps
        self.seed = seed

    def size(self, split: Split) -> int | None:
        """None: generated without end. No `heldout` where all questions are about numbers."""
        return 0 if split == "heldout" and ABOUT_NUMBERS.issuperset(self.questions) else None

    def sample(self, split: Split, index: int) -> Sample:
        """The sample at ``index`` of ``split``: RGB images, their labels and the questions."""
        rng = stream(self.seed, split, index)
        if self.size(split) == 0:
            raise IndexError(f"pictures: no '{split}' for {self.questions}")
        while True:
            scene = self._random_scene(split == "heldout", rng)
            # Neither order nor letters: the same pictures otherwise arranged are in no other split.
            content = fingerprint(sorted(scene.pictures), self.pixels)
            if split != "heldout" and split_of(content) != split:
                continue
            questions = self._ask(scene, split == "heldout", rng)
            if questions:
                before = self._gaps(scene, rng)
                empty = [letter for letters in before for letter in letters]
                told = [*zip(scene.letters, map(str, scene.pictures), strict=True)]
                return Sample(
                    tuple(_draw(picture, self.pixels) for picture in scene.pictures),
                    questions,
                    content,
                    labels=tuple(
                        "".join(f"{gap}: {NOTHING}. " for gap in letters) + f"{letter}:"
                        for letters, letter in zip(before, scene.letters, strict=True)
                    ),
                    text=_tell([*told, *((letter, NOTHING) for letter in empty)]),
                )

    def _gaps(self, scene: Scene, rng: random.Random) -> list[list[str]]:
        """Letters without a picture, by the picture that they stand before."""
        before: list[list[str]] = [[] for _ in scene.pictures]
        if self.gaps:
            free = [letter for letter in LETTERS if letter not in scene.letters]
            for letter in rng.sample(free, rng.randint(0, self.gaps)):
                rng.choice(before).append(letter)
        return before

    def _random_scene(self, heldout: bool, rng: random.Random) -> Scene:
        count = rng.choice(self.images)
        odd = "odd" in self.questions and count >= 3 and rng.random() * len(self.questions) < 1
        return (_random_odd if odd else _random_mates)(count, heldout, self.pixels, rng)

    def _ask(self, scene: Scene, heldout: bool, rng: random.Random) -> tuple[Question, ...]:
        kinds = [kind for kind in self.questions if (kind == "odd") == (not scene.mates)]
        aspects = [aspect for aspect in ASPECTS if not (heldout and aspect == "number")]
        by_kind = [
            [
                question
                for question, touched in QUESTIONS[kind](scene, aspects)
                if not heldout or any(picture.novel for picture in touched)
            ]
            for kind in kinds
        ]
        return pick_questions(by_kind, self.questions_per_sample, rng)

    def identity(self) -> str:
        """A short hash of the version and every argument."""
        asked = self.questions, self.questions_per_sample
        drawn = self.pixels, self.images, self.gaps
        return fingerprint("Pictures", VERSION, *drawn, *asked, self.seed)


def _tell(told: Iterable[tuple[str, str]]) -> str:
    """The pictures in words, in the order of their letters: who tells has to read the letters.

    >>> _tell([("C", "2 red crosses"), ("A", "1 blue circle")])
    'A: 1 blue circle. C: 2 red crosses.'
    """
    return " ".join(f"{letter}: {words}." for letter, words in sorted(told))
