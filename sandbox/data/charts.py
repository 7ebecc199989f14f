"""Generated charts with questions in ChartQA's wording, balanced so that guessing gains nothing."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import combinations, permutations
from math import perm

from sandbox.data.drawing import COLORS, PALETTE, Scene, Theme, draw
from sandbox.data.generated import check_names, fingerprint, pick_questions, split_of, stream, thin
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

VERSION = 1  # raise it when the same arguments draw or ask something else

# BANNED[(level - 1) % 9] is the name (its place in the theme) that has this level in `heldout`
# only. One-to-one: 9 of 81 combinations, every name and every level is left out equally often.
BANNED = (5, 2, 7, 0, 4, 8, 1, 6, 3)

COLOR_THEME = Theme("color", "", "", tuple(COLORS))
THEMES = (
    Theme(
        "country",
        "Coffee exports by country",
        "in thousand tons",
        ("Brazil", "Canada", "China", "France", "Germany", "India", "Japan", "Kenya", "Mexico"),
    ),
    Theme(
        "product",
        "Sales by product",
        "in thousand dollars",
        ("Bread", "Butter", "Cheese", "Coffee", "Eggs", "Fish", "Milk", "Rice", "Tea"),
    ),
    Theme(
        "city",
        "Visitors by city",
        "in thousand people",
        ("Berlin", "Cairo", "Delhi", "Lima", "London", "Madrid", "Paris", "Rome", "Tokyo"),
    ),
    Theme(
        "sport",
        "Club members by sport",
        "in thousand people",
        ("Chess", "Football", "Golf", "Hockey", "Judo", "Rowing", "Rugby", "Skiing", "Tennis"),
    ),
)
YEARS = range(2000, 2021)

# The sets of levels a chart can show, by number of items: that is drawn first, then one of its
# sets. Levels are distinct, so that "the highest" is one. Those of a pie add up to 20 * 5 percent.
LEVEL_SETS: dict[str, list[list[tuple[int, ...]]]] = {
    "bar": [list(combinations(range(1, 10), count)) for count in (2, 3, 4, 5)],
    "line": [list(combinations(range(1, 10), count)) for count in (2, 3, 4)],
    "pie": [
        [levels for levels in combinations(range(2, 11), count) if sum(levels) == 20]
        for count in (3, 4, 5)
    ],
}
CHARTS = tuple(LEVEL_SETS)
FEWEST = {chart: len(sets[0][0]) for chart, sets in LEVEL_SETS.items()}  # items of a chart
MOST = {chart: len(sets[-1][0]) for chart, sets in LEVEL_SETS.items()}
STYLES = ("auto", "small", "large")
SMALLEST_LARGE = 160  # pixels a side at which labels become readable


def banned_name(level: int) -> int:
    """The name (its place in the theme) that has this level in the split `heldout` only."""
    return BANNED[(level - 1) % 9]


def _banned_pairs(names: Iterable[int], levels: Iterable[int]) -> int:
    return sum(banned_name(level) == name for name, level in zip(names, levels, strict=True))


def _random_scene(chart: str, most: int, large: bool, heldout: bool, rng: random.Random) -> Scene:
    """A scene without a held-out combination or, for ``heldout``, with exactly one."""
    sets = rng.choice(_level_sets(chart, most))
    chosen = rng.choice(sets)
    levels = tuple(rng.sample(chosen, len(chosen)))
    while True:  # most assignments will do, and for `heldout` about a third
        names = tuple(rng.sample(range(len(BANNED)), len(levels)))
        if _banned_pairs(names, levels) == int(heldout):
            break
    unit = 5 if chart == "pie" else 1
    if not large:
        return Scene(chart, COLOR_THEME, names, (levels,), unit=unit)
    if chart != "pie":
        unit = rng.choice((1, 10, 100))
    columns, periods = [levels], [""]
    if chart == "line":
        first = rng.choice(YEARS)
        periods = [str(first + place) for place in range(rng.choice((4, 5, 6)))]
        while len(columns) < len(periods):
            other = tuple(rng.sample(rng.choice(sets), len(levels)))
            if not _banned_pairs(names, other):
                columns.append(other)
        rng.shuffle(columns)
    return Scene(
        chart,
        rng.choice(THEMES),
        names,
        tuple(columns),
        tuple(periods),
        unit,
        large=True,
        tint=rng.randrange(len(PALETTE)),
        printed=chart != "line" and rng.random() < 0.5,
    )


def _level_sets(chart: str, most: int) -> list[list[tuple[int, ...]]]:
    """The sets of levels of a chart with at most ``most`` items, by number of items."""
    return LEVEL_SETS[chart][: most - FEWEST[chart] + 1]


def _tell(scene: Scene) -> str:
    """The scene in words, in drawing order.

    >>> _tell(Scene("bar", COLOR_THEME, (5, 0), ((7, 3),)))
    'bar chart: blue 7, red 3.'
    """
    title = f", {scene.theme.title}" if scene.theme.title else ""
    told = []
    for period, column in zip(scene.periods, scene.columns, strict=True):
        items = zip(scene.words, column, strict=True)
        values = ", ".join(f"{name} {level * scene.unit}" for name, level in items)
        told.append(f"{period}: {values}" if period else values)
    return f"{scene.chart} chart{title}: {'; '.join(told)}."


# --- Balance -------------------------------------------------------------------------------------
# With all combinations allowed, symmetry would make every colour the highest equally often. Holding
# some out tilts this: who never has level 9 is highest more seldom. So we count exactly how often
# each answer to a question comes up, and keep a question with the probability
# (least chance / chance of its answer): kept answers are uniform, for every question string.


def _ways(levels: Sequence[int], *absent: int) -> int:
    """How many ways distinct names, none of them absent, can take these levels in training."""
    held = [name for name in map(banned_name, levels) if name not in absent]
    repeats = tuple(sorted(map(held.count, set(held))))
    return _placements(len(levels), len(BANNED) - len(absent), repeats)


@cache
def _placements(levels: int, names: int, held: tuple[int, ...]) -> int:
    """The number of ways to give this many levels distinct names, off the held-out combinations.

    ``held`` counts the held-out levels of each name that has any. Inclusion and exclusion: take
    those ways that put j levels on held-out names, in turn off and on (rook numbers).
    """
    sums = [1]  # how many sets of j levels sit on j distinct held-out names
    for times in held:
        sums = [a + times * b for a, b in zip([*sums, 0], [0, *sums], strict=True)]
    return sum((-1) ** j * s * perm(names - j, levels - j) for j, s in enumerate(sums))


@cache
def _weighted_sets(chart: str, most: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every set of levels, with the chance of one particular assignment of names to it."""
    groups = _level_sets(chart, most)
    return [(1 / len(sets) / _ways(levels), levels) for sets in groups for levels in sets]


@cache
def _keep_value(chart: str, most: int, name: int) -> dict[int, float]:
    """By level: the probability to keep the question for the value of this name."""
    chances: defaultdict[int, float] = defaultdict(float)
    for weight, levels in _weighted_sets(chart, most):
        for level in levels:
            if banned_name(level) != name:
                rest = [other for other in levels if other != level]
                chances[level] += weight * _ways(rest, name)
    return thin(chances)


@cache
def _keep_extremum(chart: str, most: int, highest: bool) -> dict[int, float]:
    """By name: the probability to keep the question which name is highest, or lowest."""
    chances: defaultdict[int, float] = defaultdict(float)
    for weight, levels in _weighted_sets(chart, most):
        extreme, rest = (levels[-1], levels[:-1]) if highest else (levels[0], levels[1:])
        for name in range(len(BANNED)):
            if banned_name(extreme) != name:
                chances[name] += weight * _ways(rest, name)
    return thin(chances)


@cache
def _keep_difference(chart: str, most: int, names: frozenset[int]) -> dict[int, float]:
    """By distance in levels: the probability to keep the question for these two names."""
    one, other = names
    chances: defaultdict[int, float] = defaultdict(float)
    for weight, levels in _weighted_sets(chart, most):
        for a, b in permutations(levels, 2):
            if banned_name(a) != one and banned_name(b) != other:
                rest = [level for level in levels if level not in (a, b)]
                chances[abs(a - b)] += weight * _ways(rest, one, other)
    return thin(chances)


# --- Questions -----------------------------------------------------------------------------------
# One function a type: the questions about one column of a scene that pass their balance. About a
# held-out scene nothing is thinned, and what can touch the held-out combination must touch it.


class _View:
    """One column of a scene as the questions see it."""

    def __init__(self, scene: Scene, column: int, most: int, rng: random.Random) -> None:
        period = scene.periods[column]
        self.scene = scene
        self.drawn = scene.chart, most  # what the balance of its questions depends on
        self.when = f" in {period}" if period else ""
        self.levels = scene.columns[column]
        self.items = list(zip(scene.names, self.levels, strict=True))
        held = [name for name, level in self.items if banned_name(level) == name]
        self.target = held[0] if held else None
        self.rng = rng

    @property
    def noun(self) -> str:
        """What an item is: small line charts have coloured circles, large ones several lines."""
        chart = self.scene.chart
        return {"bar": "bar", "pie": "slice", "line": "line" if self.scene.large else "circle"}[
            chart
        ]

    def call(self, name: int) -> str:
        """What a question calls an item: "the red bar" or "Canada"."""
        word = self.scene.theme.names[name]
        return word if self.scene.large else f"the {word} {self.noun}"

    def amount(self, level: int) -> str:
        """A level, or a difference of levels, as an answer."""
        return str(level * self.scene.unit)

    def keeps(self, chance: float, *names: int) -> bool:
        """Whether to ask a question about these names that is to be kept with this chance."""
        if self.target is not None:
            return self.target in names
        return chance == 1 or self.rng.random() < chance


def _value(view: _View) -> list[Question]:
    present = tuple(view.amount(level) for level in sorted(view.levels))
    questions = []
    for name, level in view.items:
        if view.keeps(_keep_value(*view.drawn, name).get(level, 0), name):
            text = f"What is the value of {view.call(name)}{view.when}?"
            questions.append(Question(text, view.amount(level), "value", present))
    return questions


def _extremum(view: _View) -> list[Question]:
    theme = view.scene.theme
    present = tuple(sorted(theme.names[name] for name in view.scene.names))
    questions = []
    for word, level in (("highest", max(view.levels)), ("lowest", min(view.levels))):
        name = view.scene.names[view.levels.index(level)]
        if view.keeps(_keep_extremum(*view.drawn, word == "highest").get(name, 0), name):
            text = f"Which {theme.category} has the {word} value{view.when}?"
            questions.append(Question(text, theme.names[name], "extremum", present))
    return questions


def _count(view: _View) -> list[Question]:
    text = f"How many {view.noun}s are there?"
    return [Question(text, str(len(view.scene.names)), "count")]


def _comparison(view: _View) -> list[Question]:
    # Yes and no are equally frequent where swapping the two values gives another allowed scene.
    questions = []
    for (one, a), (other, b) in permutations(view.items, 2):
        if view.keeps(banned_name(b) != one and banned_name(a) != other, one, other):
            text = f"Is the value of {view.call(one)} greater than the value of {view.call(other)}"
            answer = "Yes" if a > b else "No"
            questions.append(Question(f"{text}{view.when}?", answer, "comparison", ("No", "Yes")))
    return questions


def _difference(view: _View) -> list[Question]:
    gaps = {abs(a - b) for a, b in combinations(view.levels, 2)}
    present = tuple(view.amount(gap) for gap in sorted(gaps))
    questions = []
    for (one, a), (other, b) in permutations(view.items, 2):
        keep = _keep_difference(*view.drawn, frozenset((one, other)))[abs(a - b)]
        if view.keeps(keep, one, other):
            text = f"What is the difference between {view.call(one)} and {view.call(other)}"
            answer = view.amount(abs(a - b))
            questions.append(Question(f"{text}{view.when}?", answer, "difference", present))
    return questions


QUESTIONS: dict[str, Callable[[_View], list[Question]]] = {
    "value": _value,
    "extremum": _extremum,
    "count": _count,
    "comparison": _comparison,
    "difference": _difference,
}


class Charts(Task):
    """Charts with questions in ChartQA's wording: "What is the value of the red bar?" "7".

    Two styles. The small one is what a tiny model can learn to read in minutes: 2 to 5 bars, or 2
    to 4 circles on a line, of distinct colours and distinct values 1..9 on an axis 0..10; or a pie
    of 3 to 5 slices of 10..50 percent. The large one is drawn as a person would: title, labels,
    legend, values up to 9, 90 or 900; items are called by their labels, and its line charts have
    2 to 4 lines over 4 to 6 years ("What is the value of Canada in 2013?").

    Outside `heldout`, all possible answers are equally frequent, for each question string.
    `heldout` has charts with one combination of a name and a height (for a pie: a share) that no
    other split has: each colour, country, ... leaves out one. Its questions, except for counts,
    touch that combination.

    Args:
        size: pixels a side, 32 or more.
        charts: chart types, of "bar", "line", "pie"; None means bar.
        questions: question types, of "value", "extremum", "count", "comparison", "difference";
            None means value, extremum and count, which a tiny model learns first.
        questions_per_image: the largest number of distinct questions an image, at least one.
        style: "small", "large" (from 160 pixels), or "auto": large where it can be.
        seed: another seed draws other scenes, from the same splits.
        most_items: the largest number of bars, circles, lines or slices; None: as many as above.

    Raises:
        UserError: an unknown chart, question type or style, or a number out of range.
    """

    def __init__(
        self,
        size: int = 64,
        charts: list[str] | None = None,
        questions: list[str] | None = None,
        questions_per_image: int = 8,
        style: str = "auto",
        seed: int = 0,
        most_items: int | None = None,
    ) -> None:
        self.charts = ["bar"] if charts is None else charts
        self.questions = ["value", "extremum", "count"] if questions is None else questions
        check_names("chart", self.charts, CHARTS)
        check_names("question type", self.questions, tuple(QUESTIONS))
        check_names("style", [style], STYLES)
        smallest = SMALLEST_LARGE if style == "large" else 32
        if size < smallest or questions_per_image < 1:
            raise UserError(
                f"charts of style {style!r} need size >= {smallest} and questions_per_image >= 1, "
                f"got {size} and {questions_per_image}"
            )
        fewest, most = (max(limit[chart] for chart in self.charts) for limit in (FEWEST, MOST))
        self.most_items = most if most_items is None else min(most_items, most)
        if self.most_items < fewest:
            raise UserError(
                f"most_items: {' and '.join(self.charts)} charts need {fewest}, got {most_items}"
            )
        self.pixels = size
        self.large = style == "large" or (style == "auto" and size >= SMALLEST_LARGE)
        self.questions_per_image = questions_per_image
        self.seed = seed

    def size(self, split: Split) -> None:
        """None: every split is generated without end."""

    def sample(self, split: Split, index: int) -> Sample:
        """The chart at ``index`` of ``split``: one RGB image and its questions."""
        rng = stream(self.seed, split, index)
        while True:
            chart = rng.choice(self.charts)
            scene = _random_scene(chart, self.most_items, self.large, split == "heldout", rng)
            content = fingerprint(*vars(scene).values(), self.pixels)
            if split != "heldout" and split_of(content) != split:
                continue
            questions = self._ask(scene, rng)
            if questions:
                image = draw(scene, self.pixels)
                return Sample((image,), questions, content, text=_tell(scene))

    def _ask(self, scene: Scene, rng: random.Random) -> tuple[Question, ...]:
        views = [_View(scene, column, self.most_items, rng) for column in range(len(scene.columns))]
        # In a held-out chart with periods, only one period has the new combination.
        views = [view for view in views if view.target is not None] or views
        by_kind = [
            list(dict.fromkeys(question for view in views for question in QUESTIONS[kind](view)))
            for kind in self.questions
        ]
        return pick_questions(by_kind, self.questions_per_image, rng)

    def identity(self) -> str:
        """A short hash of the version and every argument."""
        drawn = self.pixels, self.charts, self.large
        asked = self.questions, self.questions_per_image
        fewer = self.most_items < max(MOST[chart] for chart in self.charts)
        most = [self.most_items] if fewer else []  # without it, the identity is what it was before
        return fingerprint("Charts", VERSION, *drawn, *asked, self.seed, *most)
