"""Image-caption sources: what they hold, leave out and refuse; and the batches made of them."""

import io
import json
import random
import re
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from sandbox.data.caption_files import CaptionFolder, CaptionJsonl, CaptionShards
from sandbox.data.captions import (
    CaptionData,
    CaptionSource,
    CaptionTokens,
    Pair,
    PairEncoder,
    Pairs,
    TaskCaptions,
    random_crop,
)
from sandbox.data.charts import Charts
from sandbox.data.media import MediaError
from sandbox.data.words import InWords
from sandbox.errors import UserError

ENCODER = PairEncoder(16, CaptionTokens("small", 12))


def noise(seed: int, size: int = 8) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, count: int, first: int = 0) -> Path:
    """Images of two classes, captioned with the number that decides their pixels."""
    for seed in range(first, first + count):
        folder = root / ("cat" if seed % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed}.png").write_bytes(png(seed))
        (folder / f"{seed}.txt").write_text(f"{seed}\n")
    return root


def write_jsonl(root: Path, count: int, first: int = 0) -> Path:
    """The same pairs, named by lines."""
    write_folder(root, count, first)
    lines = [
        {"image": f"{name}/{seed}.png", "caption": f" {seed} ", "label": name}
        for seed in range(first, first + count)
        for name in [("dog", "cat")[seed % 2]]
    ]
    path = root / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_shard(path: Path, samples: dict[str, dict[str, bytes]], mode: str = "w") -> Path:
    """A tar file of samples by key, each its parts by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for key, parts in samples.items():
            for part, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{part}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(root: Path, count: int, first: int = 0) -> str:
    """The same pairs again, in shards of ten that describe them in different ways."""
    for shard in range(first, first + count, 10):
        samples = {}
        for seed in range(shard, min(shard + 10, first + count)):
            label = ("dog", "cat")[seed % 2]
            text = {"txt": f"{seed}".encode(), "cls": label.encode()}
            if seed % 3 == 0:
                text = {"json": json.dumps({"caption": f"{seed}", "label": label}).encode()}
            samples[f"some/{seed:06}"] = {"png": png(seed), **text}
        write_shard(root / f"{shard:04}.tar", samples)
    return str(root / "*.tar")


KINDS = {
    CaptionFolder: write_folder,
    CaptionJsonl: write_jsonl,
    CaptionShards: write_shards,
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def make(kind: type[CaptionSource], root: Path, count: int = 60, **options: Any) -> CaptionSource:
    return kind(str(KINDS[kind](root, count)), **options)  # type: ignore[call-arg]


def captions(source: CaptionSource, split: Any) -> list[str]:
    return [source.pair(split, index).caption for index in range(source.size(split) or 0)]


# --- Sources --------------------------------------------------------------------------------------


@kinds
def test_image_caption_and_label_belong_together(kind: type[CaptionSource], tmp_path: Path) -> None:
    """Guards against captions that slip to the neighbour's image, and wrong tar offsets."""
    source = make(kind, tmp_path)
    for split in ("train", "val"):
        for index in range(source.size(split) or 0):
            pair = source.pair(split, index)
            assert np.array_equal(np.asarray(pair.image), np.asarray(noise(int(pair.caption))))
            assert pair.label == ("dog", "cat")[int(pair.caption) % 2]
    assert sorted(captions(source, "train") + captions(source, "val"), key=int) == [
        str(seed) for seed in range(60)
    ]


def test_splits_depend_on_content_alone(tmp_path: Path) -> None:
    """Guards against val images that turn into train images in another layout or order."""
    held = [set(captions(make(kind, tmp_path / kind.__name__), "val")) for kind in KINDS]
    assert held[0]
    assert held[0] == held[1] == held[2]


@kinds
def test_copies_of_an_image_are_on_one_side(kind: type[CaptionSource], tmp_path: Path) -> None:
    """Guards against validating on images that were trained on under another name."""
    if kind is CaptionShards:
        same = {f"{i}": {"png": png(i % 20), "txt": b"x"} for i in range(60)}
        source: CaptionSource = CaptionShards(str(write_shard(tmp_path / "a.tar", same)))
    else:
        path = KINDS[kind](tmp_path, 60)
        for seed in range(20, 60):
            name = ("dog", "cat")[seed % 2]
            (tmp_path / name / f"{seed}.png").write_bytes(png(seed % 20))
        source = kind(str(path))  # type: ignore[call-arg]
    sides = [
        {source.pair(split, i).image.tobytes() for i in range(source.size(split) or 0)}
        for split in ("train", "val")
    ]
    assert len(sides[0]) + len(sides[1]) == 20
    assert not sides[0] & sides[1]


@kinds
def test_validation_from_files_of_its_own(kind: type[CaptionSource], tmp_path: Path) -> None:
    """Guards against a val source that is mixed in, or splits train once more."""
    val = str(KINDS[kind](tmp_path / "val", 7, 100))
    source = make(kind, tmp_path / "train", val=val)
    assert source.size("train") == 60
    assert sorted(captions(source, "val")) == [str(seed) for seed in range(100, 107)]
    assert source.size("test") == source.size("heldout") == 0


@kinds
def test_identity_is_that_of_the_data(kind: type[CaptionSource], tmp_path: Path) -> None:
    """Guards against resuming on other captions, and against a warning when files have moved."""
    first = make(kind, tmp_path / "a").identity()
    assert make(kind, tmp_path / "b").identity() == first
    assert make(kind, tmp_path / "c", count=61).identity() != first


def test_task_captions_are_its_samples(tmp_path: Path) -> None:
    """Guards against another split's scenes, and a task that cannot be told in words."""
    task = Charts(size=32)
    source = TaskCaptions(task)
    assert source.size("train") is None
    sample, pair = task.sample("val", 3), source.pair("val", 3)
    assert pair.caption == sample.text
    assert np.array_equal(np.asarray(pair.image), np.asarray(sample.images[0]))
    with pytest.raises(UserError, match="has no image"):
        TaskCaptions(InWords(task)).pair("val", 3)


# --- What is left out, and what is refused --------------------------------------------------------


def test_unusable_lines_are_counted(tmp_path: Path) -> None:
    """Guards against bad lines that end a run, or vanish without a word."""
    path = write_jsonl(tmp_path, 20)
    bad = [
        '{"image": "dog/0.png", "caption": ',
        '{"image": "none.png", "caption": "x"}',
        '{"image": "dog/0.png", "caption": "  "}',
        '["dog/0.png", "x"]',
        '{"image": 3, "caption": "x"}',
    ]
    path.write_text("\n".join(bad) + "\n\n" + path.read_text())
    line = f"{path}: 5 of 25 records left out; the first is line 1: malformed JSON"
    with pytest.warns(UserWarning, match=re.escape(line)):
        source = CaptionJsonl(str(path))
    assert source.size("train") + source.size("val") == 20
    for number, text in enumerate(bad[1:]):
        path.write_text(text)
        with pytest.raises(UserError, match=r"1 of 1 records left out; the first is line 1: ") as e:
            CaptionJsonl(str(path))
        assert ("no image" in str(e.value)) or number > 0
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["../secret.png", "dog/../../secret.png", "/etc/secret.png", ".."])
def test_images_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """Guards against a list from elsewhere that reads any file of this machine."""
    (tmp_path / "secret.png").write_bytes(png(0))
    path = write_jsonl(tmp_path / "in", 2)
    path.write_text(path.read_text() + json.dumps({"image": name, "caption": "x"}))
    with pytest.raises(UserError, match=rf"pairs.jsonl, line 3: image '{name}' is outside"):
        CaptionJsonl(str(path))


def test_jsonl_images_may_lie_elsewhere(tmp_path: Path) -> None:
    """Guards against an `images` that is ignored."""
    path = write_jsonl(tmp_path / "a", 5).rename(tmp_path / "pairs.jsonl")
    source = CaptionJsonl(str(path), images=str(tmp_path / "a"))
    assert source.size("train") + source.size("val") == 5


def test_images_without_captions_are_counted(tmp_path: Path) -> None:
    """Guards against a folder in which one missing file hides all others."""
    write_folder(tmp_path, 20)
    (tmp_path / "cat/1.txt").unlink()
    (tmp_path / "cat/3.txt").write_text(" \n")
    (tmp_path / "cat/5.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.warns(
        UserWarning, match=r"3 of 20 records left out; .*cat/1\.png: no \.txt beside"
    ):
        source = CaptionFolder(str(tmp_path))
    assert source.size("train") + source.size("val") == 17


def test_samples_of_shards_without_parts_are_counted(tmp_path: Path) -> None:
    """Guards against samples that borrow the caption of the next one."""
    good = {f"{i}": {"jpg": png(i), "txt": b"x", "seg.png": b"no image"} for i in range(9)}
    bad = {
        "a": {"jpg": png(0)},
        "b": {"txt": b"x"},
        "c": {"jpg": png(0), "txt": b" "},
        "d": {"jpg": png(0), "json": b"[1]"},
        "e": {"jpg": png(0), "txt": b"\xff"},
    }
    path = write_shard(tmp_path / "x.tar", bad | good)
    with pytest.warns(UserWarning, match=r"5 of 14 records left out; .*x\.tar/a: no caption"):
        source = CaptionShards(str(path))
    assert source.size("train") + source.size("val") == 9


def test_shards_are_found_by_pattern(tmp_path: Path) -> None:
    """Guards against shards that are read twice, out of order, or not at all."""
    write_shards(tmp_path, 40)
    held = str(tmp_path / "0000.tar")
    every = CaptionShards(str(tmp_path / "*.tar"), val=held)
    assert captions(every, "train") == [str(seed) for seed in range(40)]
    some = CaptionShards([str(tmp_path / "{0030,00{1,2}0}.tar")], val=held)
    assert captions(some, "train") == [str(seed) for seed in (*range(30, 40), *range(10, 30))]


def test_impossible_sources_are_refused_in_one_line(tmp_path: Path) -> None:
    """Guards against a traceback, or an empty run, where a path is wrong."""
    compressed = write_shard(tmp_path / "x.tar", {"a": {"jpg": png(0), "txt": b"x"}}, "w:gz")
    truncated = tmp_path / "cut.tar"
    whole = write_shard(tmp_path / "whole.tar", {"a": {"jpg": png(0) * 9, "txt": b"x"}})
    truncated.write_bytes(whole.read_bytes()[:700])
    (tmp_path / "empty").mkdir()
    for build, message in [
        (lambda: CaptionFolder(str(tmp_path / "none")), "no such folder"),
        (lambda: CaptionFolder(str(tmp_path / "empty")), r"no image with a caption \(0 of 0"),
        (lambda: CaptionJsonl(str(tmp_path / "none.jsonl")), "none.jsonl: No such file"),
        (lambda: CaptionShards(str(tmp_path / "{0..3}.tar")), "0.tar: no such file"),
        (lambda: CaptionShards("https://example.org/0.tar"), "fetch them first"),
        (lambda: CaptionShards(str(compressed)), "no uncompressed tar file"),
        (lambda: CaptionShards(str(truncated)), "no uncompressed tar file"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            build()
        assert "\n" not in str(error.value)


def test_broken_images_are_named(tmp_path: Path) -> None:
    """Guards against a decoder's error that does not say which of a million images it is."""
    write_folder(tmp_path, 40)
    for seed in range(40):
        (tmp_path / ("cat" if seed % 2 else "dog") / f"{seed}.png").write_bytes(b"%d" % seed)
    source = CaptionFolder(str(tmp_path))
    with pytest.raises(MediaError, match=r"image cat/1\.png: not an image"):
        source.pair("train", 0)
    with pytest.raises(IndexError, match="train holds"):
        source.pair("train", -1)


# --- Batches --------------------------------------------------------------------------------------


def test_captions_become_rows_in_the_form_of_clip() -> None:
    """Guards against a caption without its end, which the text tower is read at."""
    tokens = CaptionTokens("small", 8)
    short, long = tokens.rows(["red", "one two three four five six seven eight nine ten"]).tolist()
    text = tokens.rows(["red"])[0].tolist()[1 : short.index(tokens.end)]
    assert short == [tokens.begin, *text, tokens.end] + [0] * (8 - 2 - len(text))
    assert len(text) >= 1
    assert long[0] == tokens.begin
    assert long[-1] == tokens.end
    assert long.count(tokens.end) == 1
    with pytest.raises(UserError, match="begin, text and end need 3"):
        CaptionTokens("small", 2)


def test_clip_rows_are_those_of_open_clip() -> None:
    """Guards against ids that pretrained MetaCLIP text towers do not know."""
    open_clip = pytest.importorskip("open_clip")
    texts = ["A photo of a CAT.", "word " * 100, "naïve café"]
    expected = open_clip.get_tokenizer("ViT-B-16")(texts)
    assert torch.equal(CaptionTokens("clip", 77).rows(texts), expected)


def test_batches_hold_what_pairs_say() -> None:
    """Guards against labels that point at another batch's classes, and pixels out of place."""
    pairs = [Pair(noise(i, 16), f"{i}", label) for i, label in enumerate(["b", None, "a", "b", ""])]
    batch = ENCODER(pairs, "some")
    assert batch.classes == ("", "a", "b")
    assert batch.labels.tolist() == [2, -1, 1, 2, 0]
    assert torch.equal(batch.tiles[3].permute(1, 2, 0), torch.from_numpy(np.array(pairs[3].image)))
    assert batch.real_tokens == 3 * 5
    moved = batch.to("meta")
    assert isinstance(moved, Pairs)
    assert {moved.tiles.device.type, moved.tokens.device.type, moved.labels.device.type} == {"meta"}
    assert (moved.classes, moved.name) == (batch.classes, "some")


@pytest.mark.parametrize("pinned", [False, True])
def test_pinned_pairs_are_copied_without_waiting(
    pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against page-locked memory in vain: Lightning calls ``batch.to(device)`` bare, and the
    host then waited for each tensor; and against copies that read other memory too late.
    """
    asked: list[bool] = []
    copy = torch.Tensor.to

    def to(tensor: torch.Tensor, device: Any, *, non_blocking: bool) -> torch.Tensor:
        asked.append(non_blocking)
        return copy(tensor, device)

    batch = ENCODER([Pair(noise(0, 16), "a", None)], "some")
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch.to("cpu")
    assert asked == [pinned] * 3
    batch.to("cpu", non_blocking=not pinned)
    assert asked[3:] == [not pinned] * 3


@kinds
def test_batches_do_not_depend_on_workers(kind: type[CaptionSource], tmp_path: Path) -> None:
    """Guards against an order, or crops, that change with the number of workers."""
    source = make(kind, tmp_path)
    found = []
    for workers in (0, 2):
        data = CaptionData(source, batch_size=16, crop=(0.5, 1.0), workers=workers, seed=3)
        data.pairs = ENCODER
        found.append(list(islice(data.train_dataloader(), 5)))
    for one, other in zip(*found, strict=True):
        assert one.name == other.name
        assert torch.equal(one.tiles, other.tiles)
        assert torch.equal(one.tokens, other.tokens)


def test_crops_are_for_training_alone(tmp_path: Path) -> None:
    """Guards against evaluating on random parts, and against one crop in every pass."""
    source = make(CaptionFolder, tmp_path)
    plain, cropped = (CaptionData(source, 8, crop=crop) for crop in (None, (0.3, 0.6)))
    plain.pairs = cropped.pairs = ENCODER
    (whole,), (val,) = ([*data.val_dataloader()[0]] for data in (plain, cropped))
    assert torch.equal(whole.tiles, val.tiles)
    size = source.size("train") or 0
    by_caption: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for batch in islice(cropped.train_dataloader(), -(-2 * size // 8)):
        for tokens, tile in zip(batch.tokens, batch.tiles, strict=True):
            by_caption.setdefault(tuple(tokens.tolist()), []).append(tile)
    twice = [tiles for tiles in by_caption.values() if len(tiles) > 1]
    assert len(twice) > size / 2
    assert sum(torch.equal(*tiles[:2]) for tiles in twice) < len(twice) / 4  # few on 8 x 8 pixels
    for crop in [(0.0, 1.0), (0.9, 0.8), (0.5, 1.5)]:
        with pytest.raises(UserError, match=r"crop is \["):
            CaptionData(source, crop=crop)


@pytest.mark.parametrize("size", [(64, 64), (120, 40), (40, 120), (3, 3)])
def test_crops_have_the_asked_area_and_shape(size: tuple[int, int]) -> None:
    """Guards against crops that leave the image, distort it or keep too little of it."""
    image = PILImage.new("RGB", size)
    rng = random.Random(0)
    crops = [random_crop(image, (0.4, 0.9), rng).size for _ in range(200)]
    for width, height in crops:
        assert 1 <= width <= size[0]
        assert 1 <= height <= size[1]
        if size[0] > 3:  # on three pixels, rounding decides
            assert 0.72 < width / height < 1.38
        if size == (64, 64):
            assert 0.38 < width * height / 64**2 < 0.92
    assert len(set(crops)) > 1 or 3 * min(size) == max(size)
