import re
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
from PIL import Image as PILImage

from sandbox.data import clips
from sandbox.data.clips import QUESTIONS, Clips
from sandbox.data.drawing import COLORS
from sandbox.data.generated import fingerprint, split_of
from sandbox.data.task import Sample
from sandbox.data.words import InWords
from sandbox.errors import UserError

KINDS = list(QUESTIONS)
Seen = dict[str, list[tuple[int, int] | None]]  # by name: the cell in each frame


def read(images: tuple[PILImage.Image, ...]) -> Seen:
    """The objects of a 32-pixel clip, from the pixels of its frames."""
    seen: Seen = defaultdict(lambda: [None] * len(images))
    for frame, image in enumerate(images):
        pixels = np.asarray(image).astype(int)
        for row, column in product(range(4), range(4)):
            cell = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            if (cell == 255).all():
                continue
            color = min(COLORS, key=lambda name: np.abs(cell[4, 4] - COLORS[name]).sum())
            # What squares, circles and triangles fill, and the next does not.
            corner, inner, foot = (
                (cell[y, x] == COLORS[color]).all() for y, x in ((0, 0), (1, 2), (7, 1))
            )
            shape = "square" if corner else "triangle" if foot else "circle" if inner else "cross"
            seen[f"{color} {shape}"][frame] = (row, column)
    return dict(seen)


def solve(question: str, seen: Seen) -> str:
    """The answer to a question about the objects seen."""
    if question.startswith("How many"):
        return str(len(seen))
    named = re.findall(rf"(?:{'|'.join(COLORS)}) \w+", question)
    if question.startswith("Which appears"):
        entered = [next(f for f, cell in enumerate(seen[name]) if cell) for name in named]
        assert entered[0] != entered[1]
        return named[entered[0] > entered[1]]
    if question.startswith("Where"):
        cells = [cell for cell in seen[named[0]] if cell]
        return corner(cells[0] if "first" in question else cells[-1])
    (ways,) = ({way(seen[name])} for name in named)
    (found,) = ways
    return found


def corner(cell: tuple[int, int]) -> str:
    """The quarter of the picture that a cell lies in."""
    return f"{'top' if cell[0] < 2 else 'bottom'} {'left' if cell[1] < 2 else 'right'}"


def way(cells: list[tuple[int, int] | None]) -> str:
    """Where an object goes: it is shown in two places, which lie two cells apart."""
    first, last = dict.fromkeys(cell for cell in cells if cell)
    step = (last[0] - first[0], last[1] - first[1])
    return {(0, 2): "right", (0, -2): "left", (2, 0): "down", (-2, 0): "up"}[step]


def digest(sample: Sample) -> str:
    drawn = [image.tobytes() for image in sample.images]
    return fingerprint(drawn, sample.times, sample.questions)


@pytest.mark.parametrize("split", ["train", "val", "test", "heldout"])
@pytest.mark.parametrize("frames", [4, 6, 9])
def test_answers_are_what_the_pixels_show(split, frames):
    """Guards against frames, or one question type, that disagree with the story behind them."""
    task = Clips(frames=frames, questions_per_sample=60)
    asked = Counter()
    for index in range(30):
        sample = task.sample(split, index)
        assert len(sample.images) == len(sample.times) == frames
        seen = read(sample.images)
        for question in sample.questions:
            assert question.answer == solve(question.text, seen), question
            asked[question.kind] += 1
    assert set(asked) == set(KINDS)


@pytest.mark.parametrize("frames", [4, 6, 9])
def test_no_single_frame_tells(frames):
    """Guards against a count that one frame gives away, and a direction or an order that follows
    from where, or beside what, an object stands in one of them.
    """
    task, places = Clips(frames=frames, questions=["direction"]), defaultdict(Counter)
    shown = defaultdict(set)
    for index in range(250):
        seen = read(task.sample("train", index).images)
        for frame in range(frames):
            cells = [cells[frame] for cells in seen.values() if cells[frame]]
            assert len(cells) < len(seen)
            shown[len(cells)].add(len(seen))
        for cells in seen.values():
            for cell in cells:
                if cell:
                    places[cell][way(cells)] += 1
    assert all(len(counts) > 1 for counts in shown.values()), "no frame fits one count alone"
    assert len(places) == 16
    for ways in places.values():
        assert len(ways) == 4
        assert max(ways.values()) / ways.total() < 0.25 + 5 * (0.1875 / ways.total()) ** 0.5 + 0.02


@pytest.mark.parametrize("objects", [[1], [3], [1, 2, 3, 4]])
def test_clips_have_as_many_objects_as_said(objects):
    """Guards against two objects that one word names, and against a number that never comes."""
    task, numbers = Clips(objects=objects), set()
    for split in ("train", "heldout"):
        for index in range(40):
            names = [name.split() for name in read(task.sample(split, index).images)]
            numbers.add(len(names))
            assert all(len(set(words)) == len(names) for words in zip(*names, strict=True))
    assert numbers == {*objects}


def test_a_sample_depends_on_nothing_but_arguments_split_and_index():
    """Guards against state that leaks between samples: workers and resumed runs would differ."""
    one, two = Clips(), Clips()
    forward = [digest(one.sample("train", index)) for index in range(20)]
    backward = [digest(two.sample("train", index)) for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20
    assert digest(Clips(seed=1).sample("train", 0)) not in forward


def test_default_clips_are_the_same_everywhere():
    """Guards against a change of pixels, wording or order without a new VERSION."""
    samples = [Clips().sample("train", 0), Clips().sample("test", 7)]
    assert clips.VERSION == 2, "write the new digests here"
    assert [digest(sample) for sample in samples] == ["320da09423d74499", "d0375a0d483fe560"]


def test_splits_share_no_content_whatever_the_seed():
    """Guards against training on test clips through another seed."""
    for seed, split in enumerate(("train", "val", "test")):
        task = Clips(seed=seed)
        assert {split_of(task.sample(split, index).content) for index in range(200)} == {split}


def test_content_names_the_pixels():
    """Guards against a hash that leaves out something drawn, or that tells equal clips apart."""
    actor = clips.Actor("circle", "red", 0, 2, 1, 2, "left")
    other = clips.Actor("cross", "blue", 2, 4, 1, 2, "up")
    task = Clips(frames=4)
    found = {}
    for changed in (
        [actor, other],
        [other, actor],
        *([actor._replace(**change), other] for change in CHANGES),
    ):
        patched = pytest.MonkeyPatch()
        patched.setattr(clips, "_random_actors", lambda *_, actors=changed: actors)
        patched.setattr(clips, "split_of", lambda content: "train")
        sample = task.sample("train", 0)
        patched.undo()
        drawn = tuple(image.tobytes() for image in sample.images)
        assert found.setdefault(sample.content, drawn) == drawn
    assert len(found) == len(set(found.values())) == 1 + len(CHANGES)


CHANGES: list[dict] = [
    {"shape": "square"},
    {"color": "green"},
    {"enters": 1, "leaves": 3},
    {"leaves": 3},
    {"row": 2},
    {"column": 1},
    {"way": "right"},
]


def test_held_out_pairs_are_never_drawn_elsewhere():
    """Guards against an out-of-distribution figure measured on pairs seen in training, and
    against held-out figures diluted by questions about ordinary objects.
    """
    task = Clips(questions_per_sample=60)
    seen = {
        name
        for split in ("train", "val", "test")
        for index in range(80)
        for name in read(task.sample(split, index).images)
    }
    novel = set()
    for index in range(70):
        sample = task.sample("heldout", index)
        (new,) = read(sample.images).keys() - seen
        assert all(q.kind == "count" or f"the {new}" in q.text for q in sample.questions)
        novel.add(new)
    assert len(novel) == 8
    assert len(seen) == 24


POSSIBLE = {"place": 4, "direction": 4, "order": 2, "count": 3}


def test_guessing_the_commonest_answer_gains_nothing(monkeypatch):
    """Guards against questions whose wording gives the answer away to a model that sees nothing."""
    monkeypatch.setattr(clips, "_draw", lambda actors, frame, size: None)
    task = Clips(questions_per_sample=60)
    answers = defaultdict(Counter)
    for index in range(2000):
        for question in task.sample("train", index).questions:
            named = re.findall(rf"(?:{'|'.join(COLORS)}) \w+", question.text)
            if question.kind == "order":
                # Of two objects, which: the first that the question names, by that one's name.
                answers["order", named[0]][named.index(question.answer)] += 1
            else:
                answers[question.kind, *named][question.answer] += 1
    spread, freedom = Counter(), Counter()
    for (kind, *_), counts in answers.items():
        expected = counts.total() / POSSIBLE[kind]
        spread[kind] += sum((n - expected) ** 2 / expected for n in counts.values())
        spread[kind] += expected * (POSSIBLE[kind] - len(counts))
        freedom[kind] += POSSIBLE[kind] - 1
    assert freedom == {"place": 24 * 3, "direction": 24 * 3, "order": 24, "count": 2}
    for kind in KINDS:
        # Several order questions of a clip share an object, so their counts spread more.
        room = 3 if kind == "order" else 1.1
        assert spread[kind] / freedom[kind] < room + 5 * (2 / freedom[kind]) ** 0.5, kind


def test_present_lists_what_a_reader_without_binding_could_answer():
    """Guards against a guess-among-present baseline that misses the answer, or is too easy."""
    for index in range(50):
        sample = Clips().sample("val", index)
        seen = read(sample.images)
        for question in sample.questions:
            named = set(re.findall(rf"(?:{'|'.join(COLORS)}) \w+", question.text))
            ways = {way(cells) for cells in seen.values()}
            places = {corner(cell) for cells in seen.values() for cell in cells if cell}
            known = {"place": places, "direction": ways, "order": named, "count": set()}
            expected = known[question.kind]
            assert set(question.present) == expected
            assert len(set(question.present)) == len(question.present)


def test_the_twin_tells_every_frame():
    """Guards against a caption of another clip, or of frames in another order."""
    for index in range(20):
        seen = read(Clips().sample("train", index).images)
        sample = InWords(Clips()).sample("train", index)
        assert not sample.images
        assert sample.times is None
        told: dict[str, list[str | None]] = defaultdict(lambda: [None] * 6)
        for place, words in enumerate(re.findall(r"\d\.\ds: ([^.]+)\.", sample.text)):
            for name, where in re.findall(r"(\w+ \w+) (\w+ \w+)(?:;|$)", words):
                told[name][place] = where
        corners = {n: [cell and corner(cell) for cell in cells] for n, cells in seen.items()}
        assert told == corners
        assert sample.text.startswith("0.0s: ")
        assert "2.5s: " in sample.text


def test_questions_are_distinct_and_as_many_as_asked_for():
    """Guards against a clip that asks one thing twice."""
    for index in range(100):
        questions = Clips(questions_per_sample=5).sample("train", index).questions
        assert 1 <= len({question.text for question in questions}) == len(questions) <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": ["ordre"]}, "unknown question type 'ordre': did you mean 'order'"),
        ({"size": 34}, "divides by 4.* got 34"),
        ({"size": 28}, "size >= 32"),
        ({"frames": 3}, "frames >= 4"),
        ({"questions_per_sample": 0}, "questions_per_sample >= 1"),
        ({"objects": []}, "a clip has 1 to 4 of them"),
        ({"objects": [2, 5]}, "a clip has 1 to 4 of them"),
        ({"objects": [1], "questions": ["order"]}, "one object has no order"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message):
    """Guards against a typing error that silently trains on something else."""
    with pytest.raises(UserError, match=message):
        Clips(**arguments)


def test_identity_changes_with_every_argument():
    """Guards against two data sets that a run's record cannot tell apart."""
    tasks = [
        Clips(),
        Clips(size=64),
        Clips(frames=5),
        Clips(questions=["order"]),
        Clips(questions_per_sample=7),
        Clips(objects=[2, 3]),
        Clips(seed=1),
    ]
    assert len({task.identity() for task in tasks}) == len(tasks)
    assert Clips().identity() == Clips(questions=KINDS).identity()
