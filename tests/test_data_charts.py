import re
import time
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image as PILImage

from sandbox.data import charts
from sandbox.data.charts import CHARTS, QUESTIONS, Charts
from sandbox.data.drawing import COLORS, GRID, INK, PALETTE
from sandbox.data.generated import contact_sheet, fingerprint, pick_questions, split_of, stream
from sandbox.data.task import Sample
from sandbox.errors import UserError

KINDS = list(QUESTIONS)
SPLITS = ("train", "val", "test")
CODE = np.array([65536, 256, 1])  # a pixel as one number


def read(chart: str, image: PILImage.Image) -> dict[str, int]:
    """The value of each colour, measured in the pixels of a small chart."""
    codes = np.asarray(image).astype(int) @ CODE
    step = 0.088 * image.height  # rows of one axis level; zero lies at 94% of the height
    values = {}
    for name, color in COLORS.items():
        rows, columns = np.nonzero(codes == CODE @ color)
        if not len(rows):
            continue
        if chart == "bar":
            values[name] = round((rows.max() - rows.min() + 1) / step)
        elif chart == "line":
            middle = (rows.max() + rows.min()) / 2
            values[name] = round((0.94 * image.height - middle) / step)
        else:
            filled = (codes != CODE @ (255, 255, 255)).sum()
            values[name] = 5 * round(20 * len(columns) / filled)
    return values


def solve(question: str, values: dict[str, int]) -> str:
    """The answer to a question about a small chart, from its measured values."""
    named = [values[word] for word in re.findall(r"\w+", question) if word in COLORS]
    if question.startswith("What is the value"):
        return str(named[0])
    if question.startswith("Which"):
        return (max if "highest" in question else min)(values, key=lambda name: values[name])
    if question.startswith("How many"):
        return str(len(values))
    if question.startswith("Is the value"):
        return "Yes" if named[0] > named[1] else "No"
    return str(abs(named[0] - named[1]))


def digest(sample: Sample) -> str:
    pixels = [image.tobytes() for image in sample.images]
    return fingerprint(pixels, sample.questions)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("split", [*SPLITS, "heldout"])
def test_answers_are_what_the_pixels_show(chart, split):
    """Guards against a picture, or one question type, that disagrees with the scene behind it."""
    task = Charts(charts=[chart], questions=KINDS, questions_per_image=60)
    kinds = Counter()
    for index in range(40):
        sample = task.sample(split, index)
        values = read(chart, sample.images[0])
        for question in sample.questions:
            assert question.answer == solve(question.text, values), question
            kinds[question.kind] += 1
    assert set(kinds) == set(KINDS)


def test_a_sample_depends_on_nothing_but_arguments_split_and_index():
    """Guards against state that leaks between samples: workers and resumed runs would differ."""
    one, two = Charts(questions=KINDS), Charts(questions=KINDS)
    forward = [digest(one.sample("train", index)) for index in range(20)]
    backward = [digest(two.sample("train", index)) for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20
    assert digest(one.sample("val", 0)) not in forward
    assert digest(Charts(questions=KINDS, seed=1).sample("train", 0)) not in forward


def test_default_charts_are_the_same_everywhere():
    """Guards against a change of pixels, wording or order without a new VERSION."""
    samples = [Charts().sample("train", 0), Charts().sample("test", 7)]
    assert charts.VERSION == 1, "write the new digests here"
    assert [digest(sample) for sample in samples] == ["417c9da76a3ea4e7", "75ea85fa65658497"]


def test_splits_share_no_content_whatever_the_seed():
    """Guards against training on test charts through another seed: charts of two bars are few."""
    seen = {
        split: {Charts(seed=seed).sample(split, index).content for index in range(500)}
        for seed, split in enumerate(SPLITS)
    }
    again = {Charts(seed=5).sample("train", index).content for index in range(500)}
    assert seen["train"] & again, "equal charts do recur, so disjoint splits say something"
    for split, contents in seen.items():
        assert {split_of(content) for content in contents} == {split}


@pytest.mark.parametrize("size", [64, 192])
def test_content_names_the_pixels(size):
    """Guards against a hash that leaves out something drawn: equal charts could cross splits."""
    task = Charts(size=size, charts=list(CHARTS))
    count = 1000 if size == 64 else 60
    pixels = defaultdict(set)
    for index in range(count):
        sample = task.sample("train", index)
        pixels[sample.content].add(sample.images[0].tobytes())
    assert all(len(drawn) == 1 for drawn in pixels.values())
    assert len({drawn for same in pixels.values() for drawn in same}) == len(pixels)


@pytest.mark.parametrize("chart", CHARTS)
def test_held_out_combinations_are_never_drawn_elsewhere(chart):
    """Guards against an out-of-distribution figure measured on combinations seen in training."""
    task = Charts(charts=[chart], questions=["value"])
    seen = {
        pair
        for split, count in (("train", 700), ("val", 100), ("test", 100))
        for index in range(count)
        for pair in read(chart, task.sample(split, index).images[0]).items()
    }
    novel = set()
    for index in range(150):
        sample = task.sample("heldout", index)
        new = set(read(chart, sample.images[0]).items()) - seen
        assert len(new) == 1
        (name, value), (question,) = new.pop(), sample.questions
        assert f" {name} " in question.text
        assert question.answer == str(value)
        novel.add((name, value))
    assert len(novel) == 9
    assert len(seen) == 72
    assert {name for name, _ in novel} == set(COLORS) == {name for name, _ in seen}
    assert {value for _, value in novel} == {value for _, value in seen}


def test_held_out_questions_touch_the_new_combination():
    """Guards against held-out figures diluted by questions about ordinary bars."""
    task = Charts(questions=KINDS, questions_per_image=60)
    for index in range(100):
        questions = task.sample("heldout", index).questions
        new = next(re.findall(r"the (\w+) bar", q.text)[0] for q in questions if q.kind == "value")
        for question in questions:
            assert question.kind == "count" or new in (question.text + question.answer)


CHANCE = {"value": 1 / 8, "extremum": 1 / 9, "comparison": 1 / 2, "difference": 1 / 8}


@pytest.fixture
def drawn_without_pixels(monkeypatch):
    """Thousands of samples are needed where only questions matter."""
    monkeypatch.setattr(charts, "draw", lambda scene, size: None)


@pytest.mark.parametrize(("chart", "most"), [*((chart, None) for chart in CHARTS), ("bar", 2)])
@pytest.mark.usefixtures("drawn_without_pixels")
def test_guessing_the_commonest_answer_gains_nothing(chart, most):
    """Guards against questions whose wording gives the answer away to a model that sees nothing."""
    kinds = [kind for kind in KINDS if kind != "count" or most is None]  # two are always two
    task = Charts(charts=[chart], questions=kinds, most_items=most)
    counts = {"bar": 4, "line": 3, "pie": 3}[chart]
    learned, tried = (defaultdict(Counter) for _ in range(2))
    for index in range(2500):
        for book, split in ((learned, "train"), (tried, "val")):
            if split == "train" or index < 600:
                for question in task.sample(split, index).questions:
                    book[question.kind, question.text][question.answer] += 1
    hits, total, spread, freedom = Counter(), Counter(), Counter(), Counter()
    for (kind, text), answers in learned.items():
        guess = answers.most_common(1)[0][0]
        hits[kind] += tried[kind, text][guess]
        total[kind] += tried[kind, text].total()
        possible = {"value": 8, "extremum": 9, "comparison": 2, "difference": 8, "count": counts}
        expected = answers.total() / possible[kind]
        spread[kind] += sum((count - expected) ** 2 / expected for count in answers.values())
        spread[kind] += expected * (possible[kind] - len(answers))
        freedom[kind] += possible[kind] - 1
    for kind in kinds:
        chance = {**CHANCE, "count": 1 / counts}[kind]
        noise = (chance * (1 - chance) / total[kind]) ** 0.5
        assert hits[kind] / total[kind] < chance + 3.5 * noise + 0.01, kind
        # Chi-squared over all strings of the type, with room for five standard deviations.
        assert spread[kind] / freedom[kind] < 1.15 + 5 * (2 / freedom[kind]) ** 0.5, kind


def test_present_lists_what_a_reader_without_binding_could_answer():
    """Guards against a guess-among-present baseline that misses the answer, or is too easy."""
    task = Charts(questions=KINDS)
    for index in range(50):
        sample = task.sample("val", index)
        values = read("bar", sample.images[0])
        gaps = {str(abs(a - b)) for a in values.values() for b in values.values() if a != b}
        expected = {
            "value": {str(value) for value in values.values()},
            "extremum": set(values),
            "comparison": {"Yes", "No"},
            "difference": gaps,
            "count": set(),
        }
        for question in sample.questions:
            assert set(question.present) == expected[question.kind]
            assert len(set(question.present)) == len(question.present)


def test_questions_are_distinct_and_as_many_as_asked_for():
    """Guards against an image that asks one thing twice, or lets one type crowd out another."""
    for index in range(100):
        questions = Charts(questions=KINDS, questions_per_image=5).sample("train", index).questions
        assert 1 <= len({question.text for question in questions}) == len(questions) <= 5
        assert Counter(question.kind for question in questions)["comparison"] <= 3


@pytest.mark.parametrize("chart", CHARTS)
def test_charts_of_few_items_keep_to_their_splits(chart):
    """Guards against too many items, and against easy training charts among the test charts."""
    few = Charts(charts=[chart], most_items=3)
    for split in SPLITS:
        for index in range(60):
            sample = few.sample(split, index)
            assert len(read(chart, sample.images[0])) <= 3
            assert split_of(sample.content) == split
    # The same picture has the same content, whatever the number of items may be.
    drawn = {Charts(charts=[chart]).sample("train", index).content for index in range(400)}
    assert drawn & {few.sample("train", index).content for index in range(400)} or chart != "pie"


# --- The large style ------------------------------------------------------------------------------


def test_large_bars_stand_at_their_values():
    """Guards against labels of the axis that disagree with the heights of the bars."""
    task = Charts(size=256, questions=["value"])
    units = set()
    for index in range(30):
        sample = task.sample("train", index)
        pixels = np.asarray(sample.images[0])
        axis = (pixels == INK).all(axis=-1).sum(axis=1).argmax()
        # A title's smooth edges have that grey as well, but only a grid line is mostly grey.
        top = int(np.argmax((pixels == GRID).all(axis=-1).mean(axis=1) > 0.5))
        bars = np.zeros(pixels.shape[:2], bool)
        for color in PALETTE:
            bars |= (pixels == color).all(axis=-1)
        heights = bars[:axis].sum(axis=0)
        starts = [b for a, b in pairwise([0, *heights]) if b and not a]
        values = sorted(int(value) for value in sample.questions[0].present)
        unit = 10 ** (len(str(values[0])) - 1)
        assert sorted(round(10 * height / (axis - top)) * unit for height in starts) == values
        units.add(unit)
    assert units == {1, 10, 100}


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.usefixtures("drawn_without_pixels")
def test_large_charts_answer_consistently(chart):
    """Guards against questions that mix up the periods of a chart, or name what it lacks."""
    task = Charts(size=256, charts=[chart], questions=KINDS, questions_per_image=10_000)
    checked = Counter()
    for index in range(40):
        questions = task.sample("test", index).questions
        values = {q.text[21:-1]: int(q.answer) for q in questions if q.kind == "value"}
        if chart == "line":
            assert all(re.fullmatch(r"\w+ in 20\d\d", name) for name in values)
        for question in questions:
            when = match[0] if (match := re.search(r" in \d+", question.text)) else ""
            named = [name for name in values if name.endswith(when)]
            a_and_b = [n for n in named if re.search(rf"\b{n.removesuffix(when)}\b", question.text)]
            if question.kind in ("comparison", "difference") and len(a_and_b) == 2:
                a, b = sorted(a_and_b, key=lambda n: question.text.index(n.removesuffix(when)))
                gap = values[a] - values[b]
                expected = str(abs(gap)) if question.kind == "difference" else "YNeos"[gap < 0 :: 2]
                assert question.answer == expected
                checked[question.kind] += 1
            elif question.kind == "extremum" and question.answer + when in values:
                value = values[question.answer + when]
                best = max if "highest" in question.text else min
                assert best(value, *(values[n] for n in named)) == value
                checked["extremum"] += 1
    assert min(checked[kind] for kind in ("comparison", "difference", "extremum")) > 5


@pytest.mark.usefixtures("drawn_without_pixels")
def test_a_held_out_line_chart_asks_about_one_period():
    """Guards against held-out questions about a year in which nothing is new."""
    task = Charts(size=256, charts=["line"], questions=["value", "comparison"])
    for index in range(50):
        texts = [question.text for question in task.sample("heldout", index).questions]
        assert len({text[-6:] for text in texts}) == 1


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("size", [160, 256, 448])
def test_nothing_of_a_large_chart_is_cut_off(chart, size):
    """Guards against titles, labels or legends that run over the edge of the picture."""
    task = Charts(size=size, charts=[chart])
    for index in range(12):
        image = task.sample("train", index).images[0]
        assert image.size == (size, size)
        pixels = np.asarray(image)
        for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert (edge == 255).all(), (chart, size, index)


# --- Arguments, identity, and what all generated tasks share --------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": ["valeu"]}, "unknown question type 'valeu': did you mean 'value'"),
        ({"questions": []}, "at least one question type"),
        ({"charts": ["lines"]}, "unknown chart 'lines': did you mean 'line'"),
        ({"style": "big"}, "unknown style 'big'"),
        ({"style": "large"}, "size >= 160.* got 64"),
        ({"size": 16}, "size >= 32.* got 16"),
        ({"questions_per_image": 0}, "questions_per_image >= 1"),
        ({"most_items": 1}, "most_items: bar charts need 2, got 1"),
        ({"charts": ["bar", "pie"], "most_items": 2}, "most_items: bar and pie charts need 3"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message):
    """Guards against a typing error that silently trains on something else."""
    with pytest.raises(UserError, match=message):
        Charts(**arguments)


def test_an_unknown_split_or_index_is_refused():
    """Guards against an endless search for content that no split owns."""
    with pytest.raises(ValueError, match="unknown split 'tset': did you mean 'test'"):
        Charts().sample("tset", 0)
    with pytest.raises(IndexError, match="-1"):
        Charts().sample("train", -1)


def test_identity_changes_with_every_argument():
    """Guards against two data sets that a run's record cannot tell apart."""
    tasks = [
        Charts(),
        Charts(size=65),
        Charts(charts=["pie"]),
        Charts(questions=["value"]),
        Charts(questions_per_image=7),
        Charts(seed=1),
        Charts(size=200),
        Charts(size=200, style="small"),
        Charts(most_items=2),
        Charts(most_items=4),
        Charts(charts=["bar", "line"], most_items=4),
        Charts(charts=["bar", "line"]),
    ]
    assert len({task.identity() for task in tasks}) == len(tasks)
    assert Charts().identity() == Charts(charts=["bar"], style="small").identity()
    assert Charts().identity() == Charts(most_items=5).identity() == "b040976e9ef737b4"


def test_drawing_takes_a_small_part_of_a_training_step():
    """Guards against data that starves training: a step of 16 images takes about 250 ms."""
    task = Charts()
    task.sample("train", 0)
    times = []
    for batch in range(8):
        start = time.process_time()
        for index in range(100):
            task.sample("train", 100 * batch + index)
        times.append((time.process_time() - start) / 100)
    assert min(times) < 0.3e-3


def test_kinds_take_turns():
    """Guards against a type that leaves no place for the others, or comes last and never."""
    questions = Charts(questions=KINDS, questions_per_image=60).sample("train", 1).questions
    by_kind = [[q for q in questions if q.kind == kind] for kind in KINDS]
    picked = pick_questions(by_kind, len(KINDS), stream(0, "train", 0))
    assert {q.kind for q in picked} == {q.kind for q in questions}
    single = Charts(questions=KINDS, questions_per_image=1)
    alone = [question for i in range(40) for question in single.sample("train", i).questions]
    assert len(alone) == 40
    assert {question.kind for question in alone} == set(KINDS)


def test_contact_sheet_shows_the_pictures():
    """Guards against a look at the data that shows something else than the model gets."""
    task = Charts()
    sheet = contact_sheet(task, "val", 3, columns=2)
    drawn = task.sample("val", 0).images[0].resize((192, 192), PILImage.Resampling.NEAREST)
    assert sheet.crop((8, 8, 200, 200)).tobytes() == drawn.tobytes()
    caption = np.asarray(sheet.crop((8, 200, 200, 215)))
    assert (caption == 0).any(), "the first question stands below"
