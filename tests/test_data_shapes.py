import re
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
from PIL import Image as PILImage

from sandbox.data import shapes
from sandbox.data.drawing import COLORS
from sandbox.data.generated import fingerprint, split_of
from sandbox.data.shapes import QUESTIONS, SHAPES, Shapes, Thing
from sandbox.data.task import Sample
from sandbox.errors import UserError

KINDS = list(QUESTIONS)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


def read(image: PILImage.Image) -> list[Thing]:
    """The objects of a 48-pixel 3 x 3 scene, from four pixels of each cell."""
    pixels = np.asarray(image)
    things = []
    for row, column in product(range(3), range(3)):
        cell = pixels[16 * row + 1 : 16 * row + 15, 16 * column + 1 : 16 * column + 15]
        near = {name: np.abs(cell[7, 7].astype(int) - rgb).sum() for name, rgb in COLORS.items()}
        color = min(near, key=lambda name: near[name])
        if near[color]:
            continue
        corner, inner, foot = ((cell[y, x] == COLORS[color]).all() for y, x in INSIDE)
        shape = "square" if corner else "triangle" if foot else "circle" if inner else "cross"
        things.append(Thing(shape, color, row, column))
    return things


INSIDE = ((1, 1), (3, 3), (12, 1))  # what squares, circles and triangles fill and the next do not


def find(things: list[Thing], words: list[str]) -> list[Thing]:
    """The objects that have all of the words."""
    return [thing for thing in things if set(words) <= set(thing.pair)]


def solve(question: str, things: list[Thing]) -> str:
    """The answer to a question about the objects seen."""
    words = re.findall(r"\w+", question.replace("crosses", "cross"))
    named = [word for word in (w.removesuffix("s") for w in words) if word in (*COLORS, *SHAPES)]
    named += ["cross"] * ("cross" in words and "cross" not in named)
    if question.startswith("How many"):
        return str(len(find(things, named)))
    if question.startswith("What"):
        place = (ROWS.index(words[-2]), COLUMNS.index(words[-1]))
        (thing,) = (thing for thing in things if (thing.row, thing.column) == place)
        return thing.color if words[1] == "color" else thing.shape
    if question.startswith("Where"):
        (thing,) = find(things, named)
        return f"{ROWS[thing.row]} {COLUMNS[thing.column]}"
    colors = [match.split() for match in re.findall(rf"(?:{'|'.join(COLORS)}) \w+", question)]
    (one,), (other,) = (find(things, pair) for pair in colors)
    truth = {
        "left of": one.column < other.column,
        "right of": one.column > other.column,
        "above": one.row < other.row,
        "below": one.row > other.row,
    }
    (relation,) = (relation for relation in truth if f" {relation} " in question)
    return "Yes" if truth[relation] else "No"


def digest(sample: Sample) -> str:
    return fingerprint([image.tobytes() for image in sample.images], sample.questions)


@pytest.mark.parametrize("split", ["train", "val", "test", "heldout"])
def test_answers_are_what_the_pixels_show(split):
    """Guards against a picture, or one question type, that disagrees with the scene behind it."""
    task = Shapes(questions=KINDS, questions_per_image=60)
    kinds, answers = Counter(), Counter()
    for index in range(60):
        sample = task.sample(split, index)
        things = read(sample.images[0])
        for question in sample.questions:
            assert question.answer == solve(question.text, things), question
            kinds[question.kind] += 1
            answers[question.answer] += 1
    assert set(kinds) == set(KINDS)
    assert {*SHAPES, *COLORS, "Yes", "No"} <= set(answers) or split == "heldout"


def test_a_sample_depends_on_nothing_but_arguments_split_and_index():
    """Guards against state that leaks between samples: workers and resumed runs would differ."""
    one, two = Shapes(questions=KINDS), Shapes(questions=KINDS)
    forward = [digest(one.sample("train", index)) for index in range(20)]
    backward = [digest(two.sample("train", index)) for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20
    assert digest(Shapes(questions=KINDS, seed=1).sample("train", 0)) not in forward


def test_default_scenes_are_the_same_everywhere():
    """Guards against a change of pixels, wording or order without a new VERSION."""
    samples = [Shapes().sample("train", 0), Shapes().sample("test", 7)]
    assert shapes.VERSION == 1, "write the new digests here"
    assert [digest(sample) for sample in samples] == ["d98dd7c18252f0b7", "0181533257d8bf00"]


def test_splits_share_no_content_whatever_the_seed():
    """Guards against training on test scenes through another seed."""
    for seed, split in enumerate(("train", "val", "test")):
        task = Shapes(seed=seed)
        assert {split_of(task.sample(split, index).content) for index in range(200)} == {split}


def test_content_names_the_pixels_and_not_their_order():
    """Guards against equal scenes of two contents, whose copies could lie in two splits."""
    small = Shapes(size=24, grid=2, questions=["count"])  # small enough that scenes come again
    pixels = defaultdict(set)
    count = 3000
    for index in range(count):
        sample = small.sample("train", index)
        pixels[sample.content].add(sample.images[0].tobytes())
    assert len(pixels) < count, "scenes do come again"
    assert all(len(drawn) == 1 for drawn in pixels.values())
    assert len({drawn for same in pixels.values() for drawn in same}) == len(pixels)


def test_held_out_pairs_are_never_drawn_elsewhere():
    """Guards against an out-of-distribution figure measured on pairs seen in training."""
    task = Shapes(questions=["place"])
    seen = {
        thing.pair
        for split, count in (("train", 300), ("val", 50), ("test", 50))
        for index in range(count)
        for thing in read(task.sample(split, index).images[0])
    }
    novel = set()
    for index in range(60):
        sample = task.sample("heldout", index)
        (new,) = (thing for thing in read(sample.images[0]) if thing.pair not in seen)
        (question,) = sample.questions
        assert question.text == f"Where is {new.name}?"
        novel.add(new.pair)
    assert len(novel) == 4
    assert seen == set(product(SHAPES, COLORS)) - novel
    assert {shape for shape, _ in novel} == set(SHAPES)


def test_held_out_questions_touch_the_new_object():
    """Guards against held-out figures diluted by questions about ordinary objects."""
    task = Shapes(questions=KINDS, questions_per_image=60)
    for index in range(60):
        sample = task.sample("heldout", index)
        (new,) = (t for t in read(sample.images[0]) if t.pair in shapes.BANNED)
        place = f"{ROWS[new.row]} {COLUMNS[new.column]}"
        for question in sample.questions:
            about = {
                "color": place,
                "shape": place,
                "place": new.name,
                "count": "objects",
                "tally": SHAPES[new.shape] if new.color not in question.text else new.color,
                "relation": new.name,
            }
            assert about[question.kind] in question.text


POSSIBLE = {"color": 9, "shape": 4, "place": 9, "count": 5, "tally": 3, "relation": 2}


def test_guessing_the_commonest_answer_gains_nothing(monkeypatch):
    """Guards against questions whose wording gives the answer away to a model that sees nothing."""
    monkeypatch.setattr(shapes, "_draw", lambda things, size, grid: None)
    task = Shapes(questions=KINDS, questions_per_image=12)
    learned, tried = (defaultdict(Counter) for _ in range(2))
    for index in range(4000):
        for book, split in ((learned, "train"), (tried, "val")):
            if split == "train" or index < 800:
                for question in task.sample(split, index).questions:
                    # Strings of pairs of objects are too many to count: one of the two will do.
                    text = re.sub(r"(of|above|below) the .*", r"\1", question.text)
                    book[question.kind, text][question.answer] += 1
    hits, total, spread, freedom = Counter(), Counter(), Counter(), Counter()
    for (kind, text), answers in learned.items():
        hits[kind] += tried[kind, text][answers.most_common(1)[0][0]]
        total[kind] += tried[kind, text].total()
        expected = answers.total() / POSSIBLE[kind]
        spread[kind] += sum((count - expected) ** 2 / expected for count in answers.values())
        spread[kind] += expected * (POSSIBLE[kind] - len(answers))
        freedom[kind] += POSSIBLE[kind] - 1
    assert set(hits) == set(KINDS)
    for kind, possible in POSSIBLE.items():
        noise = ((possible - 1) / possible**2 / total[kind]) ** 0.5
        assert hits[kind] / total[kind] < 1 / possible + 3.5 * noise + 0.01, kind
        # Chi-squared over all strings of the type, with room for five standard deviations.
        assert spread[kind] / freedom[kind] < 1.15 + 5 * (2 / freedom[kind]) ** 0.5, kind


def test_present_lists_what_a_reader_without_binding_could_answer():
    """Guards against a guess-among-present baseline that misses the answer, or is too easy."""
    for index in range(50):
        sample = Shapes(questions=KINDS).sample("val", index)
        things = read(sample.images[0])
        expected = {
            "color": {thing.color for thing in things},
            "shape": {thing.shape for thing in things},
            "place": {f"{ROWS[thing.row]} {COLUMNS[thing.column]}" for thing in things},
            "count": set(),
            "tally": set(),
            "relation": {"Yes", "No"},
        }
        for question in sample.questions:
            assert set(question.present) == expected[question.kind]
            assert len(set(question.present)) == len(question.present)


def test_questions_are_distinct_and_as_many_as_asked_for():
    """Guards against an image that asks one thing twice."""
    for index in range(100):
        questions = Shapes(questions_per_image=5).sample("train", index).questions
        assert 1 <= len({question.text for question in questions}) == len(questions) <= 5


def test_other_grids_fill_the_picture_and_number_their_cells():
    """Guards against objects outside their cell, or places that an answer cannot name."""
    task = Shapes(size=100, grid=5, questions=["place"], questions_per_image=9)
    reached = np.zeros((100, 100), bool)
    for index in range(200):
        sample = task.sample("train", index)
        painted = (np.asarray(sample.images[0]) != 255).any(axis=-1)
        reached |= painted
        cells = painted.reshape(5, 20, 5, 20).any(axis=(1, 3))
        places = {f"row {row + 1}, column {column + 1}" for row, column in np.argwhere(cells)}
        assert {question.answer for question in sample.questions} == places
        assert len(places) in shapes.OBJECT_COUNTS
    rows, columns = np.nonzero(reached)
    assert max(rows.min(), columns.min()) <= 2
    assert min(rows.max(), columns.max()) >= 97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": ["colour"]}, "unknown question type 'colour': did you mean 'color'"),
        ({"size": 32}, r"size >= 12 \* grid.* got 3, 32"),
        ({"grid": 1}, "grid >= 2"),
        ({"questions_per_image": 0}, "questions_per_image >= 1"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message):
    """Guards against a typing error that silently trains on something else."""
    with pytest.raises(UserError, match=message):
        Shapes(**arguments)


def test_identity_changes_with_every_argument():
    """Guards against two data sets that a run's record cannot tell apart."""
    tasks = [
        Shapes(),
        Shapes(size=49),
        Shapes(grid=2),
        Shapes(questions=["shape"]),
        Shapes(questions_per_image=7),
        Shapes(seed=1),
    ]
    assert len({task.identity() for task in tasks}) == len(tasks)
    assert Shapes().identity() == Shapes().identity()
