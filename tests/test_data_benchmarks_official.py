"""ChartQA, VQAv2 and DocVQA: tiny copies of their official layouts, and a slice of the real one."""

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from sandbox.data.benchmarks import ChartQA, DocVQA, VQAv2
from sandbox.data.benchmarks.base import Benchmark
from sandbox.data.media import MediaError
from sandbox.data.task import Question
from sandbox.errors import UserError

REAL = Path(__file__).parents[1] / "../shared/data/chartqa_slice"
PERSONS = [3, 1, 2, 5, 4, 10, 9, 8, 7, 6]  # answer_ids, in the order of a file that is not sorted


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(np.full((4, 6, 3), shade, dtype=np.uint8)).save(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def chart(image: str, query: str, label: str) -> dict[str, str]:
    return {"imgname": image, "query": query, "label": label}


@pytest.fixture
def chartqa(tmp_path: Path) -> Path:
    """Chart b is asked about first, and by both files."""
    root = tmp_path / "chartqa"
    for split in ("train", "test"):
        for shade, name in enumerate("abc"):
            write_image(root / split / "png" / f"{name}.png", shade + 10 * (split == "test"))
        human = [chart("b.png", "b?", "0.57"), chart("a.png", "a?", "Yes")]
        augmented = [chart("c.png", "c?", "[2003, 2004]"), chart("b.png", "b too?", "2013")]
        write_json(root / split / f"{split}_human.json", human)
        write_json(root / split / f"{split}_augmented.json", augmented)
    return root


def annotation(question: int, image: int, people: list[str]) -> dict[str, Any]:
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": person}
        for answer, person in zip(people, PERSONS, strict=True)
    ]
    return {
        "question_id": question,
        "image_id": image,
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": "red",
        "answers": answers,
    }


@pytest.fixture
def vqav2(tmp_path: Path) -> Path:
    """Two photos in val, three questions, annotations in another order; one photo in test-dev."""
    root = tmp_path / "vqav2"
    for shade, image in enumerate((42, 7)):
        write_image(root / f"val2014/COCO_val2014_{image:012d}.jpg", 90 * shade)
    write_image(root / "test2015/COCO_test2015_000000000009.jpg", 200)
    asked = [(420, 42), (70, 7), (421, 42)]
    questions = [{"image_id": i, "question": f"{q}?", "question_id": q} for q, i in asked]
    people = [f"said by {person}" for person in PERSONS]
    annotated = [annotation(q, i, people) for q, i in reversed(asked)]
    write_json(
        root / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": questions},
    )
    write_json(root / "v2_mscoco_val2014_annotations.json", {"annotations": annotated})
    write_json(
        root / "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        {
            "data_subtype": "test-dev2015",
            "questions": [{"image_id": 9, "question": "?", "question_id": 90}],
        },
    )
    return root


def page(number: int, image: str, **more: Any) -> dict[str, Any]:
    told = {"docId": 1, "ucsf_document_id": "x", "ucsf_document_page_no": "81"}
    return {"questionId": number, "question": f"{number}?", "image": image, **told, **more}


@pytest.fixture
def docvqa(tmp_path: Path) -> Path:
    """Val with question types, test without answers."""
    root = tmp_path / "docvqa"
    for shade, name in enumerate(("x_81", "y_1")):
        write_image(root / f"documents/{name}.png", 50 * shade)
    types = [["figure/diagram", "table/list"], [], ["form"]]
    images = ["documents/y_1.png", "documents/x_81.png", "documents/y_1.png"]
    typed = [
        page(n, image, answers=[f"first {n}", f"second {n}"], question_types=kind)
        for n, (image, kind) in enumerate(zip(images, types, strict=True))
    ]
    bare = [{k: v for k, v in record.items() if k != "question_types"} for record in typed]
    write_json(root / "val_v1.0_withQT.json", {"dataset_split": "val", "data": typed})
    write_json(root / "val_v1.0.json", {"dataset_split": "val", "data": bare})
    tested = [page(9, "documents/x_81.png")]
    write_json(root / "test_v1.0.json", {"dataset_split": "test", "data": tested})
    return root


def asked(task: Benchmark, split: Any, index: int) -> list[tuple[str, str, str, str]]:
    return [(q.text, q.answer, q.kind, q.id) for q in task.sample(split, index).questions]


def test_what_a_benchmark_knows_changes_no_identity() -> None:
    """Guards against runs on easy-VQA, whose identity hashes questions, that seem to be on other
    data since questions have ids.
    """
    bare, known = Question("a?", "b", "c"), Question("a?", "b", "c", (), ("b",), "1", ("b", "d"))
    assert repr(known) == repr(bare)
    assert known != bare


def test_chartqa(chartqa: Path) -> None:
    """Guards against charts in another order, questions under the wrong chart, type or id, and a
    chart that is encoded twice since both files ask about it.
    """
    task = ChartQA(str(chartqa))
    assert (task.splits, task.size("test"), task.size("val")) == (("train", "test"), 3, 0)
    assert asked(task, "test", 0) == [
        ("b?", "0.57", "human", "test_human/0"),
        ("b too?", "2013", "augmented", "test_augmented/1"),
    ]
    assert asked(task, "test", 1) == [("a?", "Yes", "human", "test_human/1")]
    assert asked(task, "test", 2) == [("c?", "[2003, 2004]", "augmented", "test_augmented/0")]
    assert [q.answers for q in task.sample("test", 0).questions] == [("0.57",), ("2013",)]
    shades = [task.sample("test", n).images[0].getpixel((0, 0)) for n in range(3)]
    assert shades == [(11, 11, 11), (10, 10, 10), (12, 12, 12)]
    assert task.sample("train", 0).content != task.sample("test", 0).content
    first = task.identity()
    inside = chartqa.parent / "release"
    inside.mkdir()
    chartqa.rename(inside / "ChartQA Dataset")
    assert ChartQA(str(inside)).identity() == first


def test_chartqa_with_one_part(chartqa: Path) -> None:
    """Guards against half of the benchmark that passes for all of it."""
    (chartqa / "test/test_augmented.json").unlink()
    with pytest.warns(UserWarning, match=r"test has test_human.json alone"):
        assert ChartQA(str(chartqa)).size("test") == 2


def test_vqav2(vqav2: Path) -> None:
    """Guards against annotations joined by their place, and people's answers in the file's order:
    the official score and files of predictions rest on both.
    """
    task = VQAv2(str(vqav2))
    assert task.splits == ("val", "test")
    assert asked(task, "val", 0) == [
        ("420?", "red", "other", "420"),
        ("421?", "red", "other", "421"),
    ]
    people = tuple(f"said by {person}" for person in range(1, 11))
    assert task.sample("val", 1).questions == (Question("70?", "red", "other", (), people, "70"),)
    assert task.sample("test", 0).questions == (Question("?", "", "question", id="90"),)


def test_vqav2_as_the_official_tools_have_it(vqav2: Path) -> None:
    """Guards against a folder that the official scripts read and we do not."""
    first = VQAv2(str(vqav2), splits=["val"]).identity()
    for name, folder in (("questions", "Questions"), ("annotations", "Annotations")):
        (vqav2 / folder).mkdir()
        for path in vqav2.glob(f"*_{name}.json"):
            path.rename(vqav2 / folder / path.name)
    (vqav2 / "Images/mscoco").mkdir(parents=True)
    (vqav2 / "val2014").rename(vqav2 / "Images/mscoco/val2014")
    assert VQAv2(str(vqav2), splits=["val"]).identity() == first
    elsewhere = vqav2.parent / "coco"
    (vqav2 / "Images/mscoco").rename(elsewhere)
    assert VQAv2(str(vqav2), str(elsewhere), ["val"]).sample("val", 1).images[0].size == (6, 4)


def test_vqav2_answer_that_is_blank(vqav2: Path) -> None:
    """Guards against a run that stops at the first question whose commonest answer is empty."""
    path = vqav2 / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["multiple_choice_answer"] = ""
    content["annotations"][0]["answers"][1]["answer"] = " "
    path.write_text(json.dumps(content))
    answers = {q.id: q.answer for q in VQAv2(str(vqav2)).sample("val", 0).questions}
    assert answers == {"420": "red", "421": "said by 2"}


def test_docvqa(docvqa: Path) -> None:
    """Guards against question types that are there and not read, and answers that are lost."""
    task = DocVQA(str(docvqa))
    assert asked(task, "val", 0) == [
        ("0?", "first 0", "figure/diagram, table/list", "0"),
        ("2?", "first 2", "form", "2"),
    ]
    assert task.sample("val", 1).questions[0].kind == "question"
    assert task.sample("val", 1).questions[0].answers == ("first 1", "second 1")
    assert asked(task, "test", 0) == [("9?", "", "question", "9")]
    (docvqa / "val_v1.0_withQT.json").unlink()
    assert {kind for _, _, kind, _ in asked(DocVQA(str(docvqa)), "val", 0)} == {"question"}
    (docvqa / "val").mkdir()
    for part in ("documents", "val_v1.0.json"):
        (docvqa / part).rename(docvqa / "val" / part)
    assert DocVQA(str(docvqa), splits=["val"]).size("val") == 2
    assert DocVQA(str(docvqa), str(docvqa / "val")).size("test") == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_docvqa_without_answers_is_not_trained_on(docvqa: Path, split: str) -> None:
    """Guards against a run that stops at its first empty answer, or validation that does."""
    (docvqa / "val_v1.0_withQT.json").unlink()
    (docvqa / "test_v1.0.json").rename(docvqa / f"{split}_v1.0.json")
    with pytest.raises(UserError, match=rf"record 0: no answer \(1 of 1 .*{split} needs them"):
        DocVQA(str(docvqa), splits=[split])  # type: ignore[list-item]


Loader = Callable[..., Benchmark]
ALL: list[tuple[Loader, str]] = [(ChartQA, "test"), (VQAv2, "val"), (DocVQA, "val")]
FIRST = {
    ChartQA: "test/png/b.png",
    VQAv2: "val2014/COCO_val2014_000000000042.jpg",
    DocVQA: "documents/y_1.png",
}
each = pytest.mark.parametrize(("load", "split"), ALL, ids=lambda x: getattr(x, "__name__", x))


@pytest.fixture
def root(request: pytest.FixtureRequest, load: type) -> Path:
    folder: Path = request.getfixturevalue(load.__name__.lower())
    return folder


@each
def test_absent_splits(root: Path, load: Loader, split: Any) -> None:
    """Guards against a score of nothing, a message that leaves the user guessing what is there, and
    a folder without one split that serves none.
    """
    absent: Any = {"test": "val", "val": "train"}[split]
    with pytest.raises(UserError, match=rf"no {absent} split, there is .*{split}"):
        load(str(root), splits=[absent])
    task = load(str(root))
    with pytest.raises(UserError, match=rf"no {absent} split, there is .*{split}"):
        task.sample(absent, 0)
    assert (task.size(absent), task.size("heldout")) == (0, 0)
    for place, index in ((split, task.size(split)), (split, -1), ("heldout", 0)):
        with pytest.raises(IndexError, match=place):
            task.sample(place, index)
    assert load(str(root), splits=[split]).splits == (split,)
    with pytest.raises(UserError, match=r"no split is there, expected \w+"):
        load(str(root.parent))
    with pytest.raises(UserError, match="no such folder"):
        load(str(root / "nowhere"))


@each
def test_limit(root: Path, load: Loader, split: Any) -> None:
    """Guards against a limit that counts questions, or that keeps others than the first samples."""
    task, cut = load(str(root)), load(str(root), limit=1)
    assert cut.size(split) == 1 < task.size(split)
    assert cut.sample(split, 0) == task.sample(split, 0)
    assert load(str(root), limit=99).identity() == task.identity() != cut.identity()
    with pytest.raises(UserError, match="limit is 0"):
        load(str(root), limit=0)


@each
def test_identity(root: Path, load: Loader, split: Any, tmp_path: Path) -> None:
    """Guards against a run that claims the same data after a label or an image changed, or other
    data because it was moved or sent to a worker.
    """
    task = load(str(root))
    first = task.identity()
    assert pickle.loads(pickle.dumps(task)).identity() == first
    moved = tmp_path / "moved"
    root.rename(moved)
    assert load(str(moved)).identity() == first
    name = "*annotations.json" if load is VQAv2 else f"{split}*.json"
    labels = sorted(moved.rglob(name))[-1]
    changed = labels.read_text()
    for old, new in (('"red"', '"blue"'), ('"first 0"', '"last 0"'), ('"0.57"', '"0.58"')):
        changed = changed.replace(old, new)
    labels.write_text(changed)
    second = load(str(moved)).identity()
    image = max(moved.rglob("*.*g"))
    image.write_bytes(image.read_bytes() + b"one byte more")
    assert len({first, second, load(str(moved)).identity()}) == 3


@each
def test_missing_images(root: Path, load: Loader, split: Any) -> None:
    """Guards against an evaluation that stops at a missing image, or quietly goes on without it."""
    whole = load(str(root), splits=[split])
    n = whole.size(split)
    image = root / FIRST[load]
    data = image.read_bytes()
    image.unlink()
    with pytest.raises(
        UserError, match=rf"1 of {n} images are not in .*{image.name}.*skip_missing"
    ):
        load(str(root), splits=[split])
    with pytest.warns(UserWarning, match=rf"1 of {n} samples \(2 questions\) left out"):
        rest = load(str(root), splits=[split], skip_missing=True)
    image.write_bytes(data)
    assert rest.size(split) == n - 1
    assert rest.sample(split, 0) == whole.sample(split, 1)
    image.unlink()
    with pytest.warns(UserWarning, match="left out"):
        assert load(str(root), splits=[split], skip_missing=True, limit=1).size(split) == 1
    image.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=image.name):
        load(str(root), splits=[split]).sample(split, 0)
    shutil.rmtree(image.parent)
    with pytest.raises(UserError, match=rf"{n} of {n} images are not in"):
        load(str(root), splits=[split])
    with pytest.raises(UserError, match="no sample is left"):
        load(str(root), splits=[split], skip_missing=True)


CHARTS, PAGES = "test/test_human.json", "val_v1.0_withQT.json"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    ("load", "name", "old", "new", "message"),
    [
        (ChartQA, CHARTS, None, '[{"imgname', "no complete JSON"),
        (ChartQA, CHARTS, None, "{}", "expected a list of records, got a dict"),
        (ChartQA, CHARTS, None, "[]", "test_human.json: holds no record"),
        (ChartQA, CHARTS, None, "[3, 4]", r"record 0: expected an object, got 3 \(2 of 4"),
        (ChartQA, CHARTS, '"0.57"', "0.57", r"record 0: 'label' must be a text, got 0.57 \(1 of 4"),
        (ChartQA, CHARTS, '"0.57"', '" "', "record 0: 'label' is blank"),
        (ChartQA, CHARTS, '"0.57"', r'"\ud800"', "record 0: 'label' is no text in Unicode"),
        (ChartQA, CHARTS, '"query": "a?", ', "", "record 1: no 'query'"),
        (ChartQA, CHARTS, '"b.png"', '"../b.png"', "record 0: 'imgname' leaves the dataset"),
        (ChartQA, CHARTS, '"b.png"', '"/etc/b.png"', "record 0: 'imgname' leaves the dataset"),
        (ChartQA, CHARTS, '"b.png"', r'"x\\b.png"', "record 0: 'imgname' must be a path with"),
        (ChartQA, CHARTS, '"b.png"', r'"b\u0000.png"', "record 0: 'imgname' must be a path with"),
        (VQAv2, QUESTIONS, '"val2014"', '"../x"', "'data_subtype' must be one such as"),
        (VQAv2, QUESTIONS, '"questions"', '"data"', "expected an object with .* 'questions'"),
        (VQAv2, QUESTIONS, "421}", "420}", r"record 2: the id '420' stands already at .*record 0"),
        (
            VQAv2,
            QUESTIONS,
            "421}",
            "422}",
            r"annotation of question_id 422: there is none \(1 of 3",
        ),
        (VQAv2, QUESTIONS, '"question_id": 421', '"question_id": "421"', "must be a whole number"),
        (VQAv2, QUESTIONS, '"image_id": 7,', '"image_id": 8,', "is about image 7, the question ab"),
        (VQAv2, QUESTIONS, '"image_id": 7,', '"image_id": true,', "'image_id' must be a whole num"),
        (VQAv2, ANNOTATIONS, '"question_id": 70,', '"question_id": 420,', "is annotated already"),
        (VQAv2, ANNOTATIONS, '"answer_id": 6', '"answer_id": 7', "10 different numbers"),
        (VQAv2, ANNOTATIONS, '"answer_id": 6', '"answer_id": "6"', "10 different numbers"),
        (VQAv2, ANNOTATIONS, '"said by 3"', "3", "'answers' must hold answer and answer_id"),
        (VQAv2, ANNOTATIONS, '"red"', "null", r"'multiple_choice_answer' must be a .*\(3 of 3"),
        (VQAv2, ANNOTATIONS, '"other"', "1", "'answer_type' must be a text"),
        (
            VQAv2,
            ANNOTATIONS,
            '"annotations": [',
            '"annotations": [5, ',
            "record 0: expected an obj",
        ),
        (
            DocVQA,
            PAGES,
            '"data"',
            '"dat"',
            "expected an object with a list of records under 'data'",
        ),
        (DocVQA, PAGES, '"questionId": 2', '"questionId": 0', "record 2: the id '0' stands alread"),
        (
            DocVQA,
            PAGES,
            '["first 0", "second 0"]',
            '"first 0"',
            "'answers' must be a list of texts",
        ),
        (DocVQA, PAGES, '["first 0", "second 0"]', "[0]", "'answers' must be a list of texts"),
        (DocVQA, PAGES, '["first 0", "second 0"]', "[]", r"record 0: no answer \(1 of 3"),
        (DocVQA, PAGES, '["first 0", "second 0"]', '[""]', "record 0: every answer is blank"),
        (DocVQA, PAGES, '"documents/x_81.png"', "null", "record 1: 'image' must be a text"),
        (DocVQA, PAGES, '["form"]', '"form"', "'question_types' must be a list"),
    ],
)
def test_damaged_files(
    root: Path, load: Loader, name: str, old: str | None, new: str, message: str
) -> None:
    """Guards against a crash in the middle of an evaluation, and silently smaller data."""
    path = root / name
    content = path.read_text()
    if old is not None:
        assert old in content
    path.write_text(new if old is None else content.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        load(str(root))
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value) or load is VQAv2


def test_links(chartqa: Path, tmp_path: Path) -> None:
    """Guards against a dataset that shows the user's own files to a model that somebody trained."""
    outside = tmp_path / "outside.png"
    write_image(outside, 1)
    png = chartqa / "test/png"
    (png / "a.png").unlink()
    (png / "a.png").symlink_to(png / "b.png")
    assert ChartQA(str(chartqa)).size("test") == 3
    (png / "a.png").unlink()
    (png / "a.png").symlink_to(outside)
    with pytest.raises(UserError, match=r"1 images are links that leave .*a\.png"):
        ChartQA(str(chartqa))
    (png / "a.png").unlink()
    (png / "a.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"1 of 3 images are not in .*a\.png"):
        ChartQA(str(chartqa))


@pytest.mark.skipif(not REAL.is_dir(), reason="no ChartQA files at ../shared/data/chartqa_slice")
def test_real_charts() -> None:
    """Guards against a layout that only our own copy of it has: real charts, labels and names."""
    task = ChartQA(str(REAL))
    assert (task.splits, task.size("test")) == (("test",), 160)
    questions = [q for n in range(160) for q in task.sample("test", n).questions]
    assert Counter(q.kind for q in questions) == {"human": 144, "augmented": 110}
    assert len({q.id for q in questions}) == len(questions)
    assert all(q.answers == (q.answer,) for q in questions)


def test_questions_alone_open_no_image(chartqa: Path) -> None:
    """Guards against questions of another image than the sample's, and against a control without
    images that reads them all.
    """
    task = ChartQA(str(chartqa))
    asked = [task.sample("test", index).questions for index in range(3)]
    for image in chartqa.glob("test/png/*.png"):
        image.unlink()
    assert [task.questions_of("test", index) for index in range(3)] == asked
    with pytest.raises(IndexError, match="no 3"):
        task.questions_of("test", 3)
    with pytest.raises(UserError, match="no val split"):
        task.questions_of("val", 0)
