"""Benchmarks from their official files: a tiny copy of the layout, and the real data if present."""

import json
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from sandbox.data.benchmarks import EasyVQA
from sandbox.data.media import MediaError
from sandbox.data.task import Split
from sandbox.errors import UserError
from sandbox.evals.metrics import majority_baseline

REAL = Path(__file__).parents[1] / "../shared/data/easy_vqa"
SPLITS: tuple[Split, ...] = ("train", "val", "test", "heldout")

needs_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="the easy-VQA files are not at ../shared/data/easy_vqa"
)


def write_folder(folder: Path, images: int, seed: int) -> None:
    """A folder in easy-VQA's layout: noise images, two questions each, not sorted by image."""
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(seed)
    records = []
    for index in range(images):
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(folder / "images" / f"{index}.png")
        records += [["what color is the shape?", "red", index], ["is there a circle?", "no", index]]
    random.Random(seed).shuffle(records)
    (folder / "questions.json").write_text(json.dumps(records))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", 60, seed=1)
    write_folder(tmp_path / "test", 5, seed=2)
    (tmp_path / "answers.txt").write_text("circle\nred\nyes\nno\n")
    return tmp_path


def contents(task: EasyVQA, split: Split) -> list[str]:
    return [task.sample(split, index).content for index in range(task.size(split))]


def test_questions_are_grouped_by_image(root: Path) -> None:
    """Guards against questions asked about another image when records are not sorted."""
    task = EasyVQA(str(root))
    for index in range(task.size("test")):
        sample = task.sample("test", index)
        assert sorted(q.text for q in sample.questions) == [
            "is there a circle?",
            "what color is the shape?",
        ]
        with PILImage.open(root / "test/images" / f"{index}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(sample.images[0]))


def test_splits_are_disjoint_and_complete(root: Path) -> None:
    """Guards against an image in two splits, or in none."""
    task = EasyVQA(str(root))
    train, val, test = (contents(task, split) for split in SPLITS[:3])
    assert task.size("heldout") == 0
    assert len(train) + len(val) == 60
    assert len(val) > 0
    assert len(test) == 5
    assert len({*train, *val, *test}) == 65


def test_val_is_chosen_by_content_not_by_place(root: Path) -> None:
    """Guards against val images that become train images when files are renumbered."""
    before = set(contents(EasyVQA(str(root)), "val"))
    images, questions = root / "train/images", root / "train/questions.json"
    for index in range(60):
        (images / f"{index}.png").rename(images / f"{index + 100}.png")
    records = [[text, answer, i + 100] for text, answer, i in json.loads(questions.read_text())]
    questions.write_text(json.dumps(records))
    assert set(contents(EasyVQA(str(root)), "val")) == before


def test_test_images_are_dropped_from_train(root: Path) -> None:
    """Guards against training on the test, of which one image is copied into the train folder."""
    original = (root / "test/images/3.png").read_bytes()
    for index in range(60):
        if index % 2:
            (root / f"train/images/{index}.png").write_bytes(original)
    with pytest.warns(UserWarning, match="30 train images dropped"):
        task = EasyVQA(str(root))
    assert task.size("train") + task.size("val") == 30
    assert task.size("test") == 5


def test_index_out_of_range(root: Path) -> None:
    """Guards against negative indices that wrap around, and loops that never end."""
    task = EasyVQA(str(root))
    for split, index in (("test", 5), ("test", -1), ("heldout", 0)):
        with pytest.raises(IndexError, match=f"easy-VQA {split} holds"):
            task.sample(split, index)


def test_symmetries_are_train_samples_of_their_own(root: Path) -> None:
    """Guards against views that repeat, that reach the evaluation, or that lose their questions."""
    plain, turned = EasyVQA(str(root)), EasyVQA(str(root), symmetries=True)
    n = plain.size("train")
    assert turned.size("train") == 8 * n
    views = [turned.sample("train", 4 + n * view) for view in range(8)]
    assert len({view.images[0].tobytes() for view in views}) == 8
    assert {(view.content, view.questions) for view in views} == {
        (views[0].content, plain.sample("train", 4).questions)
    }
    for split in ("val", "test"):
        assert turned.size(split) == plain.size(split)
    assert turned.identity() != plain.identity()


def test_questions_alone_open_no_image(root: Path) -> None:
    """Guards against questions of another image than the sample's, turned ones included, and
    against a majority that costs the decoding of a whole train split.
    """
    task = EasyVQA(str(root), symmetries=True)
    size = task.size("train")
    asked = [task.sample("train", index).questions for index in range(size)]
    for image in root.glob("*/images/*.png"):
        image.unlink()
    assert [task.questions_of("train", index) for index in range(size)] == asked
    with pytest.raises(IndexError, match="easy-VQA train holds"):
        task.questions_of("train", size)


def test_limit(root: Path) -> None:
    """Guards against a limit that cuts before the train folder is split, or cuts views."""
    task, cut = EasyVQA(str(root)), EasyVQA(str(root), symmetries=True, limit=2)
    assert [cut.size(split) for split in SPLITS] == [16, min(2, task.size("val")), 2, 0]
    assert contents(cut, "test") == contents(task, "test")[:2]
    assert contents(cut, "train")[:2] == contents(task, "train")[:2]
    with pytest.raises(UserError, match="limit is -1"):
        EasyVQA(str(root), limit=-1)


def test_identity_follows_the_data_and_nothing_else(root: Path, tmp_path: Path) -> None:
    """Guards against a run that claims the same data after a pixel or a label changed."""
    first = EasyVQA(str(root)).identity()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("train", "test", "answers.txt"):
        (root / name).rename(moved / name)
    assert EasyVQA(str(moved)).identity() == first
    image = moved / "train/images/7.png"
    PILImage.new("RGB", (8, 8), "red").save(image)
    second = EasyVQA(str(moved)).identity()
    questions = moved / "test/questions.json"
    questions.write_text(questions.read_text().replace('"no"', '"yes"', 1))
    assert len({first, second, EasyVQA(str(moved)).identity()}) == 3


def test_task_reaches_data_workers(root: Path) -> None:
    """Guards against a task that cannot be sent to a spawned data worker."""
    task = EasyVQA(str(root))
    copy = pickle.loads(pickle.dumps(task))
    assert copy.identity() == task.identity()
    assert copy.sample("train", 3).questions == task.sample("train", 3).questions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("answers.txt", None, r"answers.txt: No such file.*root"),
        ("train/questions.json", None, r"train/questions.json: No such file.*root"),
        ("train/images/4.png", None, r"train/images/4.png: No such file.*root"),
        ("test/questions.json", '[["is there', r"test/questions.json: no complete JSON.*again"),
        ("test/questions.json", "", r"test/questions.json: no complete JSON"),
        ("test/questions.json", "{}", r"test/questions.json: expected a list of records.*dict"),
        ("test/questions.json", '[["a?", "no", 0], ["b?", "no"]]', r"json, record 1: expected \["),
        ("test/questions.json", '[["a?", "no", "0"]]', r"json, record 0: expected \["),
        ("test/questions.json", '[["a?", 3, 0]]', r"json, record 0: expected \["),
        ("test/questions.json", '[["a?", "blue", 0]]', r"record 0: the answer 'blue' is not in"),
        ("answers.txt", "circle\nyes\nno", r"record \d+: the answer 'red' is not in answers.txt"),
    ],
)
def test_damaged_files_are_named(root: Path, name: str, content: str | None, message: str) -> None:
    """Guards against tracebacks, and silently smaller data, out of an incomplete download."""
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        EasyVQA(str(root))
    assert "\n" not in str(caught.value)


def test_truncated_image_is_named(root: Path) -> None:
    """Guards against a half-grey image that trains as if it were whole."""
    image = root / "test/images/2.png"
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(MediaError, match=re.escape(str(image))):
        EasyVQA(str(root)).sample("test", 2)


@pytest.fixture(scope="module")
def real() -> EasyVQA:
    return EasyVQA(str(REAL))


@needs_data
def test_real_sizes_and_splits(real: EasyVQA) -> None:
    """Guards against lost images, and states that the official test shares none with train."""
    assert real.size("train") + real.size("val") == 4000
    assert real.size("test") == 1000
    assert 150 < real.size("val") < 250
    assert real.sample("test", 0).images[0].size == (64, 64)


@needs_data
def test_real_question_types(real: EasyVQA) -> None:
    """Guards against a type that mixes answers: colours under ``shape``, "no" under ``color``."""
    answers: dict[str, Counter[str]] = {}
    kinds: dict[str, str] = {}
    for index in range(real.size("test")):
        for question in real.sample("test", index).questions:
            answers.setdefault(question.kind, Counter())[question.answer] += 1
            assert kinds.setdefault(question.text, question.kind) == question.kind
    colors = {"red", "green", "blue", "gray", "teal", "black", "yellow", "brown"}
    assert {kind: set(counts) for kind, counts in answers.items()} == {
        "color": colors,
        "shape": {"circle", "rectangle", "triangle"},
        "presence": {"yes", "no"},
        "absence": {"yes", "no"},
    }
    assert sum(sum(counts.values()) for counts in answers.values()) == 9673
    for text, kind in (
        ("is no circle present?", "absence"),
        ("does the image not contain a red shape?", "absence"),
        ("is there a teal shape?", "presence"),
        ("what is the color of the shape?", "color"),
        ("what is the blue shape?", "shape"),
    ):
        assert kinds[text] == kind


@needs_data
def test_real_blind_baseline(real: EasyVQA) -> None:
    """Guards against scores that look like seeing: two thirds are right without any image."""
    asked = {
        split: [q for i in range(real.size(split)) for q in real.sample(split, i).questions]
        for split in ("train", "test")
    }
    assert majority_baseline(asked["train"], asked["test"]) == pytest.approx(0.666, abs=0.005)
