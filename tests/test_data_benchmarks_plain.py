"""Questions from JSON lines and from parquet files, whose images are inside."""

import json
import pickle
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from sandbox.data.benchmarks import JsonlQA, ParquetQA
from sandbox.data.media import MediaError
from sandbox.data.task import Question, Split
from sandbox.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(color: tuple[int, int, int]) -> bytes:
    file = BytesIO()
    PILImage.new("RGB", (4, 3), color).save(file, "png")
    return file.getvalue()


def lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "png").mkdir()
    for name, color in (("red", RED), ("blue", BLUE)):
        (tmp_path / f"png/{name}.png").write_bytes(png(color))
    return tmp_path


def record(image: Any = "png/red.png", **more: Any) -> dict[str, Any]:
    return {"image": image, "question": "Which?", "answer": "red", **more}


# --- JSON lines -----------------------------------------------------------------------------------


def test_jsonl(folder: Path) -> None:
    """Guards against defaults that are not those of the documented table, and against lines about
    the same images that do not share them.
    """
    both = ["png/red.png", "png/blue.png"]
    path = folder / "quiz.jsonl"
    lines(
        path,
        {"image": both, "question": "Odd?", "answers": ["", "a", "b"]},
        record(image="./png/red.png", answers=["rot", "red"], id=7, type="color"),
        record(image="png/blue.png", choices=["red", "blue"], id="x"),
        {"image": both, "question": "Equal?", "answer": "no\u2028", "more": 1},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n", 1))
    task = JsonlQA(test=str(path))
    assert (task.splits, task.size("test")) == (("test",), 3)
    pair, red, blue = (task.sample("test", index) for index in range(3))
    assert [image.getpixel((0, 0)) for image in pair.images] == [RED, BLUE]
    assert pair.questions == (
        Question("Odd?", "a", "question", answers=("", "a", "b"), id="quiz/1"),
        Question("Equal?", "no\u2028", "question", answers=("no\u2028",), id="quiz/5"),
    )
    assert red.questions == (Question("Which?", "red", "color", answers=("rot", "red"), id="7"),)
    assert blue.questions[0].choices == ("red", "blue")
    assert (blue.questions[0].id, blue.questions[0].answers) == ("x", ("red",))
    assert len({pair.content, red.content, blue.content}) == 3


def test_jsonl_folder_of_images(folder: Path) -> None:
    """Guards against images that are looked for beside the file, in spite of what is asked for."""
    (folder / "lists").mkdir()
    path = lines(folder / "lists/val.jsonl", record())
    assert JsonlQA(val=path, images=str(folder)).sample("val", 0).images[0].size == (4, 3)
    with pytest.raises(UserError, match=r"1 of 1 images are not in .*lists: png/red.png"):
        JsonlQA(val=path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b"{", r"line 2: no JSON \(.*\(1 of 2 records"),
        (b"[" * 100_000, "line 2: no JSON"),
        (b'"text"', "line 2: expected an object, got 'text'"),
        ({"question": "?", "answer": "a"}, "line 2: 'image' must be a text, got None"),
        (record(image=[]), "line 2: 'image' must name 1 to 48 images, got 0"),
        (record(image=["png/red.png"] * 49), "line 2: 'image' must name 1 to 48 images, got 49"),
        (record(image=["png/red.png", 3]), "line 2: 'image' must be a text, got 3"),
        (record(image="png/../png/red.png"), "line 2: 'image' leaves the dataset's folder"),
        (record(image="/png/red.png"), "line 2: 'image' leaves the dataset's folder"),
        (record(image="."), "line 2: 'image' must be a path"),
        (record(question=3), "line 2: 'question' must be a text, got 3"),
        (record(answer=3), "line 2: 'answer' must be a text, got 3"),
        (record(answers="red"), "line 2: 'answers' must be a list of texts, got 'red'"),
        (record(answers=["red", 3]), "line 2: 'answers' must be a list of texts"),
        (record(choices="red"), "line 2: 'choices' must be a list of texts"),
        (record(type=3), "line 2: 'type' must be a text"),
        (record(id=True), "line 2: 'id' must be a text, got True"),
        (record(id="bad/1"), "line 2: the id 'bad/1' stands already at .*line 1"),
        (record(answer=None), r"line 2: no answer \(1 of 2 .*: train needs them"),
        (record(answer=""), r"line 2: no answer"),
        (record(image="png/none.png"), "1 of 2 images are not in .*: png/none.png"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_jsonl_damaged(folder: Path, wrong: Any, message: str) -> None:
    """Guards against a line that is left out, or that stops a run when its turn comes."""
    path = folder / "bad.jsonl"
    raw = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    path.write_bytes(json.dumps(record()).encode() + b"\n" + raw)
    with pytest.raises(UserError, match=message) as caught:
        JsonlQA(train=str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_jsonl_without_answers(folder: Path) -> None:
    """Guards against a test split for predictions alone that is refused, or one in which some
    questions cannot be scored.
    """
    bare = {"image": "png/red.png", "question": "Which?"}
    task = JsonlQA(test=lines(folder / "test.jsonl", bare, {**bare, "answers": []}))
    assert [q.answer for q in task.sample("test", 0).questions] == ["", ""]
    with pytest.raises(UserError, match=r"line 2: no answer \(1 of 2 .*has all or none"):
        JsonlQA(test=lines(folder / "test.jsonl", record(), bare))
    with pytest.raises(UserError, match="expected a file for train, val or test"):
        JsonlQA()
    with pytest.raises(UserError, match=r"empty.jsonl: holds no question"):
        JsonlQA(test=lines(folder / "empty.jsonl"))
    with pytest.raises(UserError, match=r"nowhere.jsonl: No such file"):
        JsonlQA(test=str(folder / "nowhere.jsonl"))


def test_folder_that_is_a_link(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against a way out of the dataset's folder by a link to another folder, and against
    the refusal of a dataset that the user reaches through a link.
    """
    path = lines(folder / "test.jsonl", record(image="other/red.png"))
    (folder / "other").symlink_to("png")
    assert JsonlQA(test=path).size("test") == 1
    outside = tmp_path_factory.mktemp("outside")
    (outside / "red.png").write_bytes(png(RED))
    (folder / "other").unlink()
    (folder / "other").symlink_to(outside)
    with pytest.raises(UserError, match=r"1 images are links that leave .*other/red\.png"):
        JsonlQA(test=path)
    (outside / "link").symlink_to(folder)
    lines(folder / "test.jsonl", record())
    assert JsonlQA(test=str(outside / "link/test.jsonl")).size("test") == 1


# --- Parquet --------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> str:
    """A parquet file with ``group`` rows a row group."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


IN_STRUCT = [{"bytes": png(color), "path": "a.png"} for color in (RED, BLUE, RED)]
MIRRORS = {
    "lmms": [
        {"image": image, "question": "Which?", "answer": str(n), "type": kind}
        for n, (image, kind) in enumerate(
            zip(IN_STRUCT, ("human_test", "augmented_test", "augmented_test"), strict=True)
        )
    ],
    "m4": [
        {"image": image, "query": "Which?", "label": [str(n)], "human_or_machine": kind}
        for n, (image, kind) in enumerate(zip(IN_STRUCT, (0, 1, 1), strict=True))
    ],
    "bytes": [
        {"image": image["bytes"], "question": "Which?", "label": str(n), "type": kind, "x": 1}
        for n, (image, kind) in enumerate(
            zip(IN_STRUCT, ("human", "augmented", "augmented"), strict=True)
        )
    ],
}


@pytest.mark.parametrize("mirror", MIRRORS)
def test_parquet(tmp_path: Path, mirror: str) -> None:
    """Guards against the image of another row or row group, and against a mirror whose parts are
    called otherwise than ChartQA's own.
    """
    task = ParquetQA(test=parquet(tmp_path / "test.parquet", MIRRORS[mirror]))
    assert task.size("test") == 2
    red, blue = task.sample("test", 0), task.sample("test", 1)
    assert [sample.images[0].getpixel((0, 0)) for sample in (red, blue)] == [RED, BLUE]
    assert [(q.answer, q.answers, q.kind, q.id) for q in red.questions] == [
        ("0", ("0",), "human", "test/0"),
        ("2", ("2",), "augmented", "test/2"),
    ]
    assert [(q.answer, q.kind) for q in blue.questions] == [("1", "augmented")]
    copy = pickle.loads(pickle.dumps(task))
    assert copy.sample("test", 1) == blue
    assert copy.identity() == task.identity()


def test_parquet_in_several_files(tmp_path: Path) -> None:
    """Guards against shards in any order, the same question twice, and a limit of each file."""
    rows = [{**row, "id": n} for n, row in enumerate(MIRRORS["lmms"])]
    parquet(tmp_path / "test-1.parquet", rows[2:])
    parquet(tmp_path / "test-0.parquet", rows[:2])
    pattern = str(tmp_path / "test-*.parquet")
    task = ParquetQA(val=pattern)
    assert [q.id for q in task.sample("val", 0).questions] == ["0", "2"]
    assert ParquetQA(val=pattern, limit=1).size("val") == 1
    assert ParquetQA(val=[str(tmp_path / "test-1.parquet")]).size("val") == 1
    parquet(tmp_path / "test-2.parquet", rows[:1])
    with pytest.raises(UserError, match=r"test-2.parquet, row 0: the id '0' stands .*test-0.par"):
        ParquetQA(val=pattern)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"row 1: no bytes in 'image'.*\(1 of 2"),
        ({"image": {"bytes": None, "path": "/etc/passwd"}}, r"row 1: no bytes in 'image'"),
        ({"image": {"bytes": b"", "path": None}}, r"row 1: no bytes in 'image'"),
        ({"question": None}, "row 1: 'question' must be a text"),
        ({"answer": None}, "row 1: no answer"),
        ({"type": " "}, "row 1: 'type' is blank"),
    ],
    ids=str,
)
def test_parquet_damaged(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Guards against rows that are left out, and images fetched from where a row says."""
    first, second = MIRRORS["lmms"][:2]
    path = parquet(tmp_path / "test.parquet", [first, {**second, **change}])
    with pytest.raises(UserError, match=message):
        ParquetQA(test=path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": b"x", "text": "?"}], "no column 'question', there is image, text"),
        ([{"question": "?", "answer": "a"}], "no column 'image', there is question, answer"),
        ([{"image": "a.png", "question": "?", "answer": "a"}], "must be bytes or a struct"),
    ],
)
def test_parquet_of_another_layout(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    """Guards against a traceback out of pyarrow for a file that holds something else."""
    with pytest.raises(UserError, match=message):
        ParquetQA(test=parquet(tmp_path / "test.parquet", rows))


def test_parquet_file_that_is_broken_or_changes(tmp_path: Path) -> None:
    """Guards against a file cut short that gives a traceback, and against the image of another
    question where a file is replaced while a run goes on.
    """
    path = tmp_path / "test.parquet"
    task = ParquetQA(test=parquet(path, MIRRORS["lmms"]))
    parquet(path, MIRRORS["lmms"][1:])
    with pytest.raises(MediaError, match=r"row group 0, row 0: the file has changed"):
        task.sample("test", 0)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"test.parquet: no complete parquet file"):
        ParquetQA(test=str(path))
    with pytest.raises(UserError, match=r"none-\*.parquet: no such file"):
        ParquetQA(test=str(tmp_path / "none-*.parquet"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback, or a folder of JSON that cannot be read, for want of pyarrow."""
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"need pyarrow: `uv sync --extra parquet`") as caught:
        ParquetQA(test=str(path))
    assert "\n" not in str(caught.value)


SPLITS: tuple[Split, ...] = ("train", "val", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_each_file_is_its_split(folder: Path, split: Split) -> None:
    """Guards against a test file that is trained on."""
    task: Any = JsonlQA(**{split: lines(folder / "a.jsonl", record())})
    assert {name: task.size(name) for name in SPLITS} == {n: int(n == split) for n in SPLITS}
    rows = parquet(folder / "a.parquet", MIRRORS["lmms"])
    task = ParquetQA(**{split: rows})  # type: ignore[arg-type]
    assert {name: task.size(name) for name in SPLITS} == {n: 2 * (n == split) for n in SPLITS}
