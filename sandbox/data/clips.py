"""Generated clips: coloured shapes come, move and go, and no single frame tells the story."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

from PIL import Image as PILImage

from sandbox.data.drawing import COLORS
from sandbox.data.generated import check_names, fingerprint, pick_questions, split_of, stream
from sandbox.data.pictures import ALLOWED, BANNED
from sandbox.data.shapes import stencil
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

VERSION = 2  # raise it when the same arguments draw or ask something else

CELLS = 4  # a side
ACROSS = 2  # cells that an object goes: from one half of the frame to the other
SECONDS = 0.5  # between frames
# Where a step leads: (down, right).
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
ACTOR_COUNTS = (2, 3, 4)
AT_ONCE = 2  # the most that one frame shows, so that a full frame does not tell how many there are


def quarter(row: int, column: int) -> str:
    """The words for the quarter of the picture that a cell lies in.

    >>> quarter(0, 3)
    'top right'
    """
    return f"{('top', 'bottom')[row >= ACROSS]} {('left', 'right')[column >= ACROSS]}"


class Actor(NamedTuple):
    """One object of a clip, on stage from frame ``enters`` on until before frame ``leaves``."""

    shape: str
    color: str
    enters: int
    leaves: int
    row: int  # where it enters, counted from the top
    column: int  # from the left
    way: str

    @property
    def name(self) -> str:
        """What questions call it."""
        return f"{self.color} {self.shape}"

    @property
    def novel(self) -> bool:
        """Whether only `heldout` shows such an object."""
        return (self.shape, self.color) in BANNED

    @property
    def first(self) -> str:
        """The quarter of the picture in which it enters."""
        return quarter(self.row, self.column)

    @property
    def last(self) -> str:
        """The quarter of the picture from which it leaves."""
        return quarter(*self._cell(crossed=True))

    def cell(self, frame: int) -> tuple[int, int] | None:
        """Row and column in a frame, None where it is not on stage.

        It crosses to the other half of the frame halfway through its stay.
        """
        if not self.enters <= frame < self.leaves:
            return None
        return self._cell(crossed=frame >= (self.enters + self.leaves) // 2)

    def _cell(self, *, crossed: bool) -> tuple[int, int]:
        down, right = STEPS[self.way]
        return self.row + ACROSS * crossed * down, self.column + ACROSS * crossed * right


# --- Questions -----------------------------------------------------------------------------------
# One function a type: questions, each with the objects that it touches.

Asked = Iterator[tuple[Question, list[Actor]]]


def _direction(actors: list[Actor]) -> Asked:
    present = tuple(sorted({actor.way for actor in actors}))
    for actor in actors:
        text = f"Which way does the {actor.name} move?"
        yield Question(text, actor.way, "direction", present), [actor]


def _place(actors: list[Actor]) -> Asked:
    present = tuple(sorted({half for actor in actors for half in (actor.first, actor.last)}))
    for actor in actors:
        for when, place in (("first appear", actor.first), ("last stand", actor.last)):
            yield Question(f"Where does the {actor.name} {when}?", place, "place", present), [actor]


def _order(actors: list[Actor]) -> Asked:
    for one, other in permutations(actors, 2):
        if one.enters != other.enters:
            first = one if one.enters < other.enters else other
            text = f"Which appears first, the {one.name} or the {other.name}?"
            present = tuple(sorted((one.name, other.name)))
            yield Question(text, first.name, "order", present), [one, other]


def _count(actors: list[Actor]) -> Asked:
    yield Question("How many objects appear in all?", str(len(actors)), "count"), actors


QUESTIONS: dict[str, Callable[[list[Actor]], Asked]] = {
    "place": _place,
    "direction": _direction,
    "order": _order,
    "count": _count,
}


# --- Clips ---------------------------------------------------------------------------------------


def _random_actors(
    counts: Sequence[int], frames: int, heldout: bool, rng: random.Random
) -> list[Actor]:
    """As many objects as a count says, never two in one cell, and of several never all at once."""
    count = rng.choice(counts)
    while True:
        pairs = rng.sample(ALLOWED, count - heldout) + rng.sample(BANNED, int(heldout))
        if all(len(set(names)) == count for names in zip(*pairs, strict=True)):
            break  # no shape twice, and no colour
    while True:
        actors = []
        for pair in pairs:
            enters, leaves = _stay(frames, rng)
            way = rng.choice(list(STEPS))
            row, column = (_start(step, rng) for step in STEPS[way])
            actors.append(Actor(*pair, enters, leaves, row, column, way))
        if all(_fits(actors, frame) for frame in range(frames)):
            return actors


def _start(step: int, rng: random.Random) -> int:
    """A row or column from which an object stays in the frame that goes so many cells a step."""
    if step == 0:
        return rng.randrange(CELLS)
    return rng.randrange(CELLS - ACROSS) + (ACROSS if step < 0 else 0)


def _stay(frames: int, rng: random.Random) -> tuple[int, int]:
    """When an object enters and leaves: it stays for an even number of frames, half of all at most.

    So it is in either half equally long, and where it stands tells nothing of where it goes.
    """
    length = 2 * rng.randint(1, frames // 4)
    enters = rng.randint(0, frames - length)
    return enters, enters + length


def _fits(actors: list[Actor], frame: int) -> bool:
    """Whether few enough objects are on stage, and each in a cell of its own."""
    cells = [cell for actor in actors if (cell := actor.cell(frame))]
    return len(cells) <= _most_at_once(len(actors)) and len(set(cells)) == len(cells)


def _most_at_once(actors: int) -> int:
    """How many of a clip's objects one frame may show.

    >>> [_most_at_once(actors) for actors in (1, 2, 3, 4)]
    [1, 1, 2, 2]
    """
    return max(1, min(AT_ONCE, actors - 1))


def _draw(actors: list[Actor], frame: int, size: int) -> PILImage.Image:
    image = PILImage.new("RGB", (size, size), "white")
    side = size // CELLS
    for actor in actors:
        if cell := actor.cell(frame):
            top, left = (side * place for place in cell)
            box = (left, top, left + side, top + side)
            image.paste(COLORS[actor.color], box, stencil(actor.shape, side))
    return image


class Clips(Task):
    """Clips of a few frames in which some shapes (two to four) come, move and go.

    Each object is on stage for some frames in a row, first in one half of the picture and then in
    the other. Where it stands in one frame does not tell which way it goes: it may be about to
    leave that half, or just have come. At most two objects are on stage at once, and never all of
    several, so no single frame tells how many there are. No two objects of a clip share a shape or
    a colour: what is asked is what happens, not who is who.

    Question types: ``place`` ("Where does the red circle first appear?", "... last stand?" "top
    left"), ``direction`` ("Which way does the red circle move?"), ``order`` ("Which appears
    first, the red circle or the blue square?") and ``count`` ("How many objects appear in all?").
    Frames in another order leave the count as it is. They destroy the order of events. Of places
    and direction they leave which two quarters there are: half of the guesses are then right.

    All possible answers are equally frequent, for each question string. A `heldout` clip has one
    object of a (shape, colour) pair that no other split has, and every question touches it.

    Args:
        size: pixels a side, a multiple of 4.
        frames: frames of a clip, 4 or more, half a second apart.
        questions: question types; None means all.
        questions_per_sample: at most so many distinct questions a clip, at least one.
        objects: how many a clip may have, each number equally often. Of one, nothing has to be
            told apart, so where things are is learned sooner (experiments/LOG.md).
        seed: another seed draws other clips, from the same splits.

    Raises:
        UserError: an unknown question type, or a number out of range.
    """

    def __init__(
        self,
        size: int = 32,
        frames: int = 6,
        questions: list[str] | None = None,
        questions_per_sample: int = 8,
        objects: Sequence[int] = ACTOR_COUNTS,
        seed: int = 0,
    ) -> None:
        self.questions = list(QUESTIONS) if questions is None else questions
        check_names("question type", self.questions, tuple(QUESTIONS))
        if size < 32 or size % CELLS or frames < 4 or questions_per_sample < 1:
            raise UserError(
                "clips need a size >= 32 that divides by 4, frames >= 4 and "
                f"questions_per_sample >= 1, got {size}, {frames} and {questions_per_sample}"
            )
        if not objects or min(objects) < 1 or max(objects) > max(ACTOR_COUNTS):
            raise UserError(f"objects={list(objects)}: a clip has 1 to {max(ACTOR_COUNTS)} of them")
        if max(objects) == 1 and self.questions == ["order"]:
            raise UserError("objects=[1]: one object has no order; give other questions")
        self.pixels = size
        self.frames = frames
        self.objects = tuple(objects)
        self.questions_per_sample = questions_per_sample
        self.seed = seed

    def size(self, split: Split) -> None:
        """None: every split is generated without end."""

    def sample(self, split: Split, index: int) -> Sample:
        """The clip at ``index`` of ``split``: RGB frames, their times and the questions."""
        rng = stream(self.seed, split, index)
        while True:
            actors = _random_actors(self.objects, self.frames, split == "heldout", rng)
            content = fingerprint(sorted(actors), self.frames, self.pixels)
            if split != "heldout" and split_of(content) != split:
                continue
            questions = self._ask(actors, split == "heldout", rng)
            if questions:
                return Sample(
                    tuple(_draw(actors, frame, self.pixels) for frame in range(self.frames)),
                    questions,
                    content,
                    times=tuple(SECONDS * frame for frame in range(self.frames)),
                    text=" ".join(_tell(actors, frame) for frame in range(self.frames)),
                )

    def _ask(self, actors: list[Actor], heldout: bool, rng: random.Random) -> tuple[Question, ...]:
        by_kind = [
            [
                question
                for question, touched in QUESTIONS[kind](actors)
                if not heldout or any(actor.novel for actor in touched)
            ]
            for kind in self.questions
        ]
        return pick_questions(by_kind, self.questions_per_sample, rng)

    def identity(self) -> str:
        """A short hash of the version and every argument."""
        asked = self.questions, self.questions_per_sample, self.objects
        return fingerprint("Clips", VERSION, self.pixels, self.frames, *asked, self.seed)


def _tell(actors: list[Actor], frame: int) -> str:
    """One frame in words.

    >>> actor = Actor("circle", "red", 1, 3, 0, 1, "right")
    >>> _tell([actor], 0), _tell([actor], 2)
    ('0.0s: nothing.', '1.0s: red circle top right.')
    """
    told = [
        f"{actor.name} {quarter(*cell)}" for actor in sorted(actors) if (cell := actor.cell(frame))
    ]
    return f"{SECONDS * frame:.1f}s: {'; '.join(told) or 'nothing'}."
