import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image as PILImage

from sandbox.data import pictures
from sandbox.data.drawing import COLORS
from sandbox.data.generated import contact_sheet, fingerprint, split_of
from sandbox.data.pictures import LETTERS, QUESTIONS, Pictures, odd_one
from sandbox.data.shapes import SHAPES
from sandbox.data.task import Sample
from sandbox.data.words import InWords
from sandbox.errors import UserError

KINDS = list(QUESTIONS)
SIDE = 12  # pixels of an object in a picture of 32


def read(image: PILImage.Image) -> tuple[str, str, str]:
    """Shape, colour and number of a 32-pixel picture, from its pixels."""
    pixels = np.asarray(image).astype(int)
    painted = (pixels != 255).any(-1)
    quarters = [(y, x) for y in (0, 16) for x in (0, 16) if painted[y : y + 16, x : x + 16].any()]
    looks = set()
    for y, x in quarters:
        rows, columns = np.nonzero(painted[y : y + 16, x : x + 16])
        top, left = y + rows.min(), x + columns.min()
        assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == SIDE
        inside = pixels[top + SIDE // 2, left + SIDE // 2]
        color = min(COLORS, key=lambda name: np.abs(inside - COLORS[name]).sum())
        # What squares, circles and triangles fill, and the next does not.
        corner, inner, foot = (
            (pixels[top + y, left + x] == COLORS[color]).all() for y, x in ((0, 0), (2, 2), (11, 1))
        )
        shape = "square" if corner else "triangle" if foot else "circle" if inner else "cross"
        looks.add((shape, color))
    ((shape, color),) = looks
    return shape, color, str(len(quarters))


ASPECT = {"shape": 0, "color": 1, "many": 2, "number": 2}


def solve(question: str, seen: dict[str, tuple[str, str, str]]) -> str:
    """The answer to a question about the pictures seen, by letter."""
    named = [seen[letter] for letter in re.findall(r"\b[A-L]\b", question)]
    if "odd one" in question:
        letters = list(seen)
        odd = [odd_one([seen[letter][aspect] for letter in letters]) for aspect in range(3)]
        (place,) = (place for place in odd if place is not None)
        return letters[place]
    if "more" in question:
        return "Yes" if named[0][2] > named[1][2] else "No"
    (aspect,) = {
        place for word, place in ASPECT.items() if f" {word} " in question.replace("?", " ")
    }
    if "same" in question:
        return "Yes" if named[0][aspect] == named[1][aspect] else "No"
    return named[0][aspect]


def look(sample: Sample) -> dict[str, tuple[str, str, str]]:
    assert sample.labels is not None
    return {
        label.removesuffix(":"): read(image)
        for label, image in zip(sample.labels, sample.images, strict=True)
    }


def digest(sample: Sample) -> str:
    drawn = [image.tobytes() for image in sample.images]
    return fingerprint(drawn, sample.labels, sample.questions)


@pytest.mark.parametrize("split", ["train", "val", "test", "heldout"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_answers_are_what_the_pixels_show(split, count):
    """Guards against a picture, a label or a question type that disagrees with the scene, and
    against an odd one out that is none, or not the only one.
    """
    kinds = KINDS[:-1] if count == 2 else KINDS
    task = Pictures(images=[count], questions=kinds, questions_per_sample=60)
    asked = Counter()
    for index in range(40):
        sample = task.sample(split, index)
        seen = look(sample)
        assert len(seen) == count
        for question in sample.questions:
            assert question.answer == solve(question.text, seen), question
            asked[question.kind] += 1
    assert set(asked) == set(kinds) - ({"count", "more"} if split == "heldout" else set())


def test_a_sample_depends_on_nothing_but_arguments_split_and_index():
    """Guards against state that leaks between samples: workers and resumed runs would differ."""
    one, two = (Pictures(images=[2, 3, 4], questions=KINDS) for _ in range(2))
    forward = [digest(one.sample("train", index)) for index in range(20)]
    backward = [digest(two.sample("train", index)) for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20
    other = Pictures(images=[2, 3, 4], questions=KINDS, seed=1)
    assert digest(other.sample("train", 0)) not in forward


def test_default_pictures_are_the_same_everywhere():
    """Guards against a change of pixels, wording or order without a new VERSION."""
    samples = [Pictures().sample("train", 0), Pictures().sample("test", 7)]
    assert pictures.VERSION == 1, "write the new digests here"
    assert [digest(sample) for sample in samples] == ["403d2f6f74cbe173", "9c16a9e215c07f25"]


def test_splits_share_no_content_whatever_the_seed():
    """Guards against training on test pictures through another seed."""
    for seed, split in enumerate(("train", "val", "test")):
        task = Pictures(images=[2, 3], questions=KINDS, seed=seed)
        assert {split_of(task.sample(split, index).content) for index in range(200)} == {split}


def test_content_is_that_of_the_pictures_in_any_order():
    """Guards against a test scene that is a training scene with its pictures exchanged, and
    against a hash that leaves out something drawn.
    """
    one, other = (pictures.Picture("circle", "blue", ((left, 1),)) for left in (1, 2))
    task, seen = Pictures(questions=["same"]), defaultdict(set)
    for order in ([one, other], [other, one], [one, one]):
        scene = pictures.Scene(order, ["A", "B"], [(0, 1)])
        task._random_scene = lambda heldout, rng, scene=scene: scene
        for split in ("train", "val", "test"):
            content = fingerprint(sorted(order), 32)
            if split_of(content) == split:
                sample = task.sample(split, 0)
                assert sample.content == content
                seen[content].add(tuple(sorted(image.tobytes() for image in sample.images)))
    assert len(seen) == 2
    assert all(len(drawn) == 1 for drawn in seen.values())


def test_held_out_pairs_are_never_drawn_elsewhere():
    """Guards against an out-of-distribution figure measured on pairs seen in training, and
    against held-out figures diluted by questions about ordinary pictures.
    """
    task = Pictures(images=[2, 4], questions=KINDS, questions_per_sample=60)
    seen = {
        read(image)[:2]
        for split in ("train", "val", "test")
        for index in range(100)
        for image in task.sample(split, index).images
    }
    novel = set()
    for index in range(100):
        sample = task.sample("heldout", index)
        new = {letter: of[:2] for letter, of in look(sample).items() if of[:2] not in seen}
        assert new
        novel |= set(new.values())
        for question in sample.questions:
            assert question.kind in ("color", "shape", "same", "odd")
            assert "number" not in question.text
            named = re.findall(r"\b[A-L]\b", question.text)
            assert question.kind == "odd" or set(named) & set(new)
    assert len(novel) == 8
    assert len(seen) == 24
    assert Counter(shape for shape, _ in novel) == dict.fromkeys(SHAPES, 2)
    assert max(Counter(color for _, color in novel).values()) == 1


def test_a_task_about_numbers_offers_no_held_out_pairs():
    """Guards against an endless search for a held-out question that does not exist."""
    task = Pictures(questions=["count", "more"])
    assert task.size("heldout") == 0
    assert task.size("test") is None
    with pytest.raises(IndexError):
        task.sample("heldout", 0)


POSSIBLE = {"color": 8, "shape": 4, "count": 3, "same": 2, "more": 2, "odd": 12}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_guessing_the_commonest_answer_gains_nothing(count, monkeypatch):
    """Guards against questions whose wording, or whose letters' places in the prompt, give the
    answer away to a model that sees nothing.
    """
    monkeypatch.setattr(pictures, "_draw", lambda picture, size: PILImage.new("RGB", (1, 1)))
    kinds = KINDS[:-1] if count == 2 else KINDS
    task = Pictures(images=[count], questions=kinds, questions_per_sample=60)
    learned = defaultdict(Counter)
    for index in range(1500):
        sample = task.sample("train", index)
        letters = [label[0] for label in sample.labels]
        for question in sample.questions:
            # Letters say nothing of their own, so take them by place: first, second, ...
            text = question.text
            for place, letter in enumerate(letters):
                text = re.sub(rf"\b{letter}\b", str(place), text)
            learned[question.kind, text][question.answer] += 1
    spread, freedom = Counter(), Counter()
    for (kind, _), answers in learned.items():
        possible = POSSIBLE[kind]
        expected = answers.total() / possible
        spread[kind] += sum((n - expected) ** 2 / expected for n in answers.values())
        spread[kind] += expected * (possible - len(answers))
        freedom[kind] += possible - 1
    assert set(spread) == set(kinds)
    for kind in kinds:
        # Chi-squared over all strings of the type. Questions of a sample hang together, so there
        # is room beyond the five standard deviations of independent ones.
        assert spread[kind] / freedom[kind] < 1.5 + 5 * (2 / freedom[kind]) ** 0.5, kind


def test_no_place_is_the_odd_one_more_often(monkeypatch):
    """Guards against an answer that can be had from the order of the pictures."""
    monkeypatch.setattr(pictures, "_draw", lambda picture, size: PILImage.new("RGB", (1, 1)))
    task, places = Pictures(images=[4], questions=["odd"]), Counter()
    for index in range(1000):
        sample = task.sample("train", index)
        (question,) = sample.questions
        places[sample.labels.index(f"{question.answer}:")] += 1
    assert len(places) == 4
    assert all(abs(n - 250) < 4 * (1000 * 3 / 16) ** 0.5 for n in places.values())


def test_present_lists_what_a_reader_without_binding_could_answer():
    """Guards against a guess-among-present baseline that misses the answer, or is too easy, and
    against look-ups that any picture of the sample would answer.
    """
    for index in range(60):
        sample = Pictures(images=[2, 5], questions=KINDS).sample("val", index)
        seen = look(sample)
        shape, color, number = ({of[aspect] for of in seen.values()} for aspect in range(3))
        expected = {
            "color": color,
            "shape": shape,
            "count": number,
            "same": {"Yes", "No"},
            "more": {"Yes", "No"},
            "odd": set(seen),
        }
        for question in sample.questions:
            assert set(question.present) == expected[question.kind]
            assert len(question.present) == len(expected[question.kind]) > 1


def test_letters_are_drawn_anew_in_any_order():
    """Guards against names that two pictures never have, so that eight could not be asked about."""
    task = Pictures(images=[2])
    first = Counter(task.sample("train", index).labels for index in range(1000))
    assert {letter for labels in first for letter in labels} == {f"{letter}:" for letter in LETTERS}
    assert len(first) == 12 * 11


def test_the_twin_says_what_the_pictures_show():
    """Guards against a caption of other pictures, and a twin that lacks what a question names."""
    for index in range(20):
        sample = InWords(Pictures(images=[3])).sample("train", index)
        seen = look(Pictures(images=[3]).sample("train", index))
        assert not sample.images
        assert not sample.labels
        told = re.findall(r"([A-L]): (\d) (\w+) (\w+)\.", sample.text)
        assert told == sorted(told)
        plural = {word: one for one, many in SHAPES.items() for word in (one, many)}
        assert {letter: (plural[shape], color, n) for letter, n, color, shape in told} == seen


def test_questions_are_distinct_and_as_many_as_asked_for():
    """Guards against a sample that asks one thing twice."""
    task = Pictures(images=[4], questions_per_sample=5)
    for index in range(100):
        questions = task.sample("train", index).questions
        assert 1 <= len({question.text for question in questions}) == len(questions) <= 5


def test_objects_keep_apart_at_every_size():
    """Guards against two squares that touch and look like one rectangle."""
    for size in (24, 32, 50):
        for index in range(40):
            for image in Pictures(size=size, images=[4]).sample("train", index).images:
                painted = (np.asarray(image) != 255).any(-1)
                assert image.size == (size, size)
                middle = slice(size // 2 - 1, size // 2 + 1)
                assert not painted[middle].any()
                assert not painted[:, middle].any()


def test_a_contact_sheet_shows_every_picture_under_its_label():
    """Guards against labels that cover pictures, or pictures left out of a sheet."""
    task = Pictures(images=[3])
    sheet = np.asarray(contact_sheet(task, "val", 1))
    white = (sheet == 255).all(-1)
    images = task.sample("val", 0).images
    expected = sum((np.asarray(image) == 255).all(-1).sum() for image in images) * 9
    assert white.sum() == expected
    assert (sheet[:23] < 100).all(-1).any(), "there is writing over them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": ["colour"]}, "unknown question type 'colour': did you mean 'color'"),
        ({"size": 31}, "even size >= 24.* got 31"),
        ({"images": [1]}, r"2 to 12, got \[1\]"),
        ({"images": [13]}, r"2 to 12, got \[13\]"),
        ({"images": []}, "2 to 12"),
        ({"images": [2], "questions": ["odd"]}, r"one of 3 or more, got \[2\]"),
        ({"questions_per_sample": 0}, "questions_per_sample >= 1"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message):
    """Guards against a typing error that silently trains on something else."""
    with pytest.raises(UserError, match=message):
        Pictures(**arguments)


def test_identity_changes_with_every_argument():
    """Guards against two data sets that a run's record cannot tell apart."""
    tasks = [
        Pictures(),
        Pictures(size=34),
        Pictures(images=[3]),
        Pictures(questions=["shape"]),
        Pictures(questions_per_sample=7),
        Pictures(seed=1),
    ]
    assert len({task.identity() for task in tasks}) == len(tasks)
    assert Pictures().identity() == Pictures(images=[2]).identity()
