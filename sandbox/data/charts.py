"""Generated charts with questions in ChartQA's wording, balanced so that guessing gains nothing."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations
from math import perm

from sandbox.data.drawing import COLORS, Scene, Theme, draw
from sandbox.data.generated import check_names, fingerprint, pick_questions, split_of, stream, thin
from sandbox.data.task import Question, Sample, Split, Task

VERSION = 1  # raise it when the same arguments draw or ask something else

LEVELS = range(1, 10)
# BANNED[level - 1] is the name (by its place in the theme) that has this level in `heldout` only.
# One-to-one: 9 of 81 combinations, and every name and every level is left out equally often.
BANNED = (5, 2, 7, 0, 4, 8, 1, 6, 3)

COLOR_THEME = Theme("color", "", tuple(COLORS))
THEMES = (
    Theme(
        "country",
        "Exports by country",
        ("Brazil", "Canada", "China", "France", "Germany", "India", "Japan", "Kenya", "Mexico"),
    ),
)

# The sets of levels a chart can show; its number of items is drawn first, then one of its sets.
LEVEL_SETS: dict[str, list[list[tuple[int, ...]]]] = {
    "bar": [list(combinations(LEVELS, count)) for count in (2, 3, 4, 5)],
}
CHARTS = tuple(LEVEL_SETS)
ITEM = {"bar": "bar"}


def is_banned(name: int, level: int) -> bool:
    """Whether this name (its place in the theme) has this level in the split `heldout` only."""
    return BANNED[level - 1] == name


def _random_scene(chart: str, heldout: bool, rng: random.Random) -> Scene:
    """A scene without a held-out combination or, for ``heldout``, with exactly one."""
    chosen = rng.choice(rng.choice(LEVEL_SETS[chart]))
    levels = tuple(rng.sample(chosen, len(chosen)))
    while True:  # a third to two thirds of all assignments will do
        names = tuple(rng.sample(range(len(BANNED)), len(levels)))
        if sum(map(is_banned, names, levels)) == int(heldout):
            return Scene(chart, COLOR_THEME, names, (levels,))


# --- Balance -------------------------------------------------------------------------------------
# With all combinations allowed, symmetry would make every colour the highest equally often. Holding
# some out tilts this: who never has level 9 is highest more seldom. So we count exactly how often
# each answer to a question comes up, and keep a question with the probability
# (least chance / chance of its answer): kept answers are uniform, for every question string.


def _ways(levels: Sequence[int], *absent: int) -> int:
    """How many ways distinct names, none of them absent, can take these levels outside `heldout`.

    Inclusion and exclusion over the held-out combinations, one a level (rook numbers).
    """
    allowed = [level for level in levels if BANNED[level - 1] not in absent]
    sums = [1]  # elementary symmetric sums: how many sets of j levels sit on held-out names
    for times in Counter(BANNED[level - 1] for level in allowed).values():
        sums = [a + times * b for a, b in zip([*sums, 0], [0, *sums], strict=True)]
    free = len(BANNED) - len(absent)
    return sum((-1) ** j * s * perm(free - j, len(levels) - j) for j, s in enumerate(sums))


@cache
def _weighted_sets(chart: str) -> list[tuple[float, tuple[int, ...]]]:
    """Every set of levels, with the chance of one particular assignment of names to it."""
    return [
        (1 / len(sets) / _ways(levels), levels) for sets in LEVEL_SETS[chart] for levels in sets
    ]


@cache
def _keep_value(chart: str, name: int) -> dict[int, float]:
    """By level: the probability to keep the question for the value of this name."""
    chances: defaultdict[int, float] = defaultdict(float)
    for weight, levels in _weighted_sets(chart):
        for level in levels:
            if not is_banned(name, level):
                rest = [other for other in levels if other != level]
                chances[level] += weight * _ways(rest, name)
    return thin(chances)


@cache
def _keep_extremum(chart: str, highest: bool) -> dict[int, float]:
    """By name: the probability to keep the question which name is highest, or lowest."""
    chances: defaultdict[int, float] = defaultdict(float)
    for weight, levels in _weighted_sets(chart):
        extreme, rest = (levels[-1], levels[:-1]) if highest else (levels[0], levels[1:])
        for name in range(len(BANNED)):
            if not is_banned(name, extreme):
                chances[name] += weight * _ways(rest, name)
    return thin(chances)


@cache
def _keep_difference(chart: str, one: int, other: int) -> dict[int, float]:
    """By distance in levels: the probability to keep the question for it."""
    chances: defaultdict[int, float] = defaultdict(float)
    for weight, levels in _weighted_sets(chart):
        for a in levels:
            for b in levels:
                if a != b and not is_banned(one, a) and not is_banned(other, b):
                    rest = [level for level in levels if level not in (a, b)]
                    chances[abs(a - b)] += weight * _ways(rest, one, other)
    return thin(chances)


# --- Questions -----------------------------------------------------------------------------------
# One function a type: the questions about one column of a scene that pass their balance. About a
# held-out scene nothing is thinned, and what can touch the held-out combination must touch it.


@dataclass(frozen=True)
class _View:
    """One column of a scene as the questions see it."""

    scene: Scene
    levels: tuple[int, ...]
    when: str  # " in 2013", or nothing
    rng: random.Random

    @property
    def items(self) -> list[tuple[int, int]]:
        """(name, level) of every item."""
        return list(zip(self.scene.names, self.levels, strict=True))

    @property
    def target(self) -> int | None:
        """The name that has a held-out level here."""
        return next((name for name, level in self.items if is_banned(name, level)), None)

    def call(self, name: int) -> str:
        """What a question calls an item: "the red bar" or "Canada"."""
        word = self.scene.theme.names[name]
        if self.scene.theme is COLOR_THEME:
            return f"the {word} {ITEM[self.scene.chart]}"
        return word

    def amount(self, level: int) -> str:
        """A level as an answer."""
        return str(level * self.scene.unit)

    def keeps(self, chance: float, *names: int) -> bool:
        """Whether to ask a question about these names that is to be kept with this chance."""
        if self.target is not None:
            return self.target in names
        return self.rng.random() < chance


def _value(view: _View) -> list[Question]:
    present = tuple(view.amount(level) for level in sorted(view.levels))
    return [
        Question(
            f"What is the value of {view.call(name)}{view.when}?",
            view.amount(level),
            "value",
            present,
        )
        for name, level in view.items
        if view.keeps(_keep_value(view.scene.chart, name).get(level, 0), name)
    ]


def _extremum(view: _View) -> list[Question]:
    theme, chart = view.scene.theme, view.scene.chart
    present = tuple(sorted(theme.names[name] for name in view.scene.names))
    questions = []
    for word, level in (("highest", max(view.levels)), ("lowest", min(view.levels))):
        name = view.scene.names[view.levels.index(level)]
        if view.keeps(_keep_extremum(chart, word == "highest")[name], name):
            text = f"Which {theme.category} has the {word} value{view.when}?"
            questions.append(Question(text, theme.names[name], "extremum", present))
    return questions


def _count(view: _View) -> list[Question]:
    text = f"How many {ITEM[view.scene.chart]}s are there?"
    return [Question(text, str(len(view.scene.names)), "count")]


def _comparison(view: _View) -> list[Question]:
    # Yes and no are equally frequent where swapping the two values gives another allowed scene.
    return [
        Question(
            f"Is the value of {view.call(one)} greater than the value of {view.call(other)}"
            f"{view.when}?",
            "Yes" if a > b else "No",
            "comparison",
            ("No", "Yes"),
        )
        for (one, a), (other, b) in permutations(view.items, 2)
        if view.keeps(not is_banned(one, b) and not is_banned(other, a), one, other)
    ]


def _difference(view: _View) -> list[Question]:
    gaps = {abs(a - b) for a, b in combinations(view.levels, 2)}
    present = tuple(view.amount(gap) for gap in sorted(gaps))
    return [
        Question(
            f"What is the difference between {view.call(one)} and {view.call(other)}{view.when}?",
            view.amount(abs(a - b)),
            "difference",
            present,
        )
        for (one, a), (other, b) in permutations(view.items, 2)
        if view.keeps(_keep_difference(view.scene.chart, one, other).get(abs(a - b), 0), one, other)
    ]


QUESTIONS: dict[str, Callable[[_View], list[Question]]] = {
    "value": _value,
    "extremum": _extremum,
    "count": _count,
    "comparison": _comparison,
    "difference": _difference,
}


class Charts(Task):
    """Charts with questions in ChartQA's wording.

    Small bar charts are what a tiny model can learn to read in minutes: 2 to 5 bars of distinct
    colours and distinct values 1..9 on an axis 0..10.

    Every answer to a question is equally frequent, for each question string, outside `heldout`.
    `heldout` has charts with one combination of a colour and a value that no other split has
    (each colour leaves out one value); its questions, except for counts, touch that combination.

    Args:
        size: pixels a side.
        charts: chart types, of "bar".
        questions: question types, of "value", "extremum", "count", "comparison", "difference";
            None means value, extremum and count, which a tiny model learns first.
        questions_per_image: at most so many distinct questions an image, at least one.
        seed: another seed draws other scenes, from the same splits.

    Raises:
        ValueError: an unknown chart or question type, or a number out of range.
    """

    def __init__(
        self,
        size: int = 64,
        charts: list[str] | None = None,
        questions: list[str] | None = None,
        questions_per_image: int = 8,
        seed: int = 0,
    ) -> None:
        self.charts = ["bar"] if charts is None else charts
        self.questions = ["value", "extremum", "count"] if questions is None else questions
        check_names("chart", self.charts, CHARTS)
        check_names("question type", self.questions, tuple(QUESTIONS))
        if size < 32 or questions_per_image < 1:
            raise ValueError(
                f"a chart needs size >= 32 and questions_per_image >= 1, "
                f"got {size} and {questions_per_image}"
            )
        self.pixels = size
        self.questions_per_image = questions_per_image
        self.seed = seed

    def size(self, split: Split) -> None:
        """None: every split is generated without end."""

    def sample(self, split: Split, index: int) -> Sample:
        """The chart at ``index`` of ``split``: one RGB image and its questions."""
        rng = stream(self.seed, split, index)
        while True:
            scene = _random_scene(rng.choice(self.charts), split == "heldout", rng)
            content = fingerprint(scene, self.pixels)
            if split != "heldout" and split_of(content) != split:
                continue
            questions = self._ask(scene, rng)
            if questions:
                return Sample((draw(scene, self.pixels),), questions, content)

    def _ask(self, scene: Scene, rng: random.Random) -> tuple[Question, ...]:
        views = [
            _View(scene, levels, f" in {period}" if period else "", rng)
            for levels, period in zip(scene.columns, scene.periods, strict=True)
        ]
        by_kind = [
            [question for view in views for question in QUESTIONS[kind](view)]
            for kind in self.questions
        ]
        return pick_questions(by_kind, self.questions_per_image, rng)

    def identity(self) -> str:
        """A short hash of the version and every argument."""
        asked = self.questions, self.questions_per_image
        return fingerprint("Charts", VERSION, self.pixels, self.charts, *asked, self.seed)
