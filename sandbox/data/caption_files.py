"""Images and captions on disk: in folders, named by a list of JSON lines, or in WebDataset shards.

All three are lists of where in which file the bytes of an image lie, so every pair is found by its
number, tar files included. (A tar file that is read as a stream would be shuffled in a buffer, in
an order that depends on the number of workers, and a resumed run could not find its place.)
"""

import json
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from hashlib import blake2b
from io import BytesIO
from itertools import groupby
from os.path import normpath
from pathlib import Path

from PIL import Image as PILImage

from sandbox.data.captions import CaptionSource, Pair
from sandbox.data.generated import fingerprint
from sandbox.data.media import MediaError, decode_image
from sandbox.data.task import Split
from sandbox.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VAL_ONE_IN = 20  # images, unless validation has files of its own


@dataclass(frozen=True)
class Item:
    """A pair whose image is still on disk: ``size`` bytes from ``offset`` of ``file``."""

    name: str
    file: Path
    offset: int
    size: int
    caption: str
    label: str | None

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            MediaError: they cannot be read.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise MediaError(f"image {self.name}: {error.strerror}") from None

    def image(self) -> PILImage.Image:
        """The image, upright (EXIF), as RGB; transparency falls on white.

        Raises:
            MediaError: it cannot be read or decoded.
        """
        return decode_image(f"image {self.name}", BytesIO(self.read()))


@dataclass(frozen=True)
class Unusable:
    """A record without an image or a caption: where it stands, and what is wrong with it."""

    where: str
    why: str


Records = Iterator[Item | Unusable]


def usable(records: Records, source: str) -> list[Item]:
    """The usable ones; a warning counts the others, and names the first.

    Raises:
        UserError: none is usable.
    """
    items, first, left_out = list[Item](), None, 0
    for record in records:
        if isinstance(record, Item):
            items.append(record)
        else:
            first, left_out = first or record, left_out + 1
    told = f"{left_out} of {left_out + len(items)} records left out"
    if first:
        told += f"; the first is {first.where}: {first.why}"
    if not items:
        raise UserError(f"{source}: no image with a caption ({told})")
    if first:
        warnings.warn(f"{source}: {told}", stacklevel=3)
    return items


class CaptionFiles(CaptionSource):
    """What sources on disk share: a list of items, split by content.

    One image in twenty is for validation, chosen by a hash of its bytes (for which all images are
    read once at the start), so copies of an image are on one side, and stay there when files are
    added or renamed. Whoever gives validation items of its own saves the reading.
    """

    def __init__(self, items: list[Item], val: list[Item] | None) -> None:
        if val is None:
            held = [_is_val(item.read()) for item in items]
            val = [item for item, is_val in zip(items, held, strict=True) if is_val]
            items = [item for item, is_val in zip(items, held, strict=True) if not is_val]
        self._items: dict[Split, list[Item]] = {"train": items, "val": val}

    def size(self, split: Split) -> int:
        """How many pairs the split holds; 0 but for ``train`` and ``val``."""
        return len(self._items.get(split, ()))

    def pair(self, split: Split, index: int) -> Pair:
        """The pair at ``index``, in the order of the files.

        Raises:
            MediaError: its image cannot be read or decoded.
        """
        if not 0 <= index < self.size(split):
            raise IndexError(f"{split} holds {self.size(split)} pairs, not {index}")
        item = self._items[split][index]
        return Pair(item.image(), item.caption, item.label)

    def identity(self) -> str:
        """A short hash of all names, sizes, captions, labels and splits."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        told = {
            split: [(item.name, item.size, item.caption, item.label) for item in items]
            for split, items in self._items.items()
        }
        return fingerprint(type(self).__qualname__, told)


def _is_val(data: bytes) -> bool:
    return int.from_bytes(blake2b(data, digest_size=8).digest()) % VAL_ONE_IN == 0


# --- Folders --------------------------------------------------------------------------------------


class CaptionFolder(CaptionFiles):
    """Images with their captions beside them: ``cat.jpg`` and ``cat.txt``.

    The folder that an image lies in is its class, unless that is ``root`` itself.

    Args:
        root: holds images, or folders of them.
        val: a folder of the same kind for validation; None splits ``root`` by content.

    Raises:
        UserError: there is no such folder, or no image with a caption in it.
    """

    def __init__(self, root: str, val: str | None = None) -> None:
        folders = [root] if val is None else [root, val]
        items = [usable(_of_folder(Path(folder)), folder) for folder in folders]
        super().__init__(items[0], items[1] if val else None)


def _of_folder(root: Path) -> Records:
    if not root.is_dir():
        raise UserError(f"captions {root}: no such folder")
    for image in sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGES):
        try:
            caption = image.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            yield Unusable(str(image), "no .txt beside it")
        except (OSError, UnicodeDecodeError) as error:
            yield Unusable(str(image), f"its .txt cannot be read ({error})")
        else:
            if caption:
                name = image.relative_to(root).as_posix()
                label = None if image.parent == root else image.parent.name
                yield Item(name, image, 0, image.stat().st_size, caption, label)
            else:
                yield Unusable(str(image), "its .txt is empty")


# --- JSON lines -----------------------------------------------------------------------------------


class CaptionJsonl(CaptionFiles):
    """One JSON object a line: ``{"image": "a/cat.jpg", "caption": "A cat.", "label": "cat"}``.

    ``label`` may be missing. Lines that are malformed, have no caption, or name an image that does
    not exist are left out, with a warning.

    Args:
        path: the file of lines.
        images: the folder that images are relative to; None = that of the file.
        val: a file of the same kind for validation; None splits ``path`` by content.

    Raises:
        UserError: the file cannot be read, holds no usable line, or names an image outside the
            folder.
    """

    def __init__(self, path: str, images: str | None = None, val: str | None = None) -> None:
        files = [path] if val is None else [path, val]
        items = [usable(_of_jsonl(Path(file), images), file) for file in files]
        super().__init__(items[0], items[1] if val else None)


def _of_jsonl(path: Path, images: str | None) -> Records:
    root = path.parent if images is None else Path(images)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"captions {path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            record = json.loads(line)
        except ValueError:
            yield Unusable(where, "malformed JSON")
            continue
        match record:
            case {"image": str(name), "caption": str(text)} if name and text.strip():
                yield _named_image(path, where, root, name, text.strip(), _label(record))
            case _:
                yield Unusable(where, 'no {"image": path, "caption": text} with both filled in')


def _named_image(
    path: Path, where: str, root: Path, name: str, caption: str, label: str | None
) -> Item | Unusable:
    inside = normpath(name)
    if inside.startswith("..") or Path(inside).is_absolute():
        raise UserError(f"captions {path}, {where}: image {name!r} is outside {root}")
    file = root / inside
    if not file.is_file():
        return Unusable(where, f"no image {file}")
    return Item(inside, file, 0, file.stat().st_size, caption, label)


def _label(record: dict[str, object]) -> str | None:
    label = record.get("label")
    return None if label is None else str(label)


# --- Shards ---------------------------------------------------------------------------------------


class CaptionShards(CaptionFiles):
    """Tar files in WebDataset's layout: neighbours that share a name up to the first dot.

    A sample is an image (``jpg``, ``png``, ...), its caption as ``txt`` (or ``caption`` in a
    ``json``), and perhaps its class as ``cls`` (or ``label`` in the ``json``). At the start the
    headers of all shards and their captions are read: about 0.1 ms a pair. Samples without an image
    or a caption are left out, with a warning.

    Args:
        urls: paths of uncompressed tar files. ``{000..127}``, ``{a,b}``, ``*`` and ``?`` are
            expanded.
        val: the same for validation; None splits ``urls`` by content.

    Raises:
        UserError: no file matches, one cannot be read, or none holds an image with a caption.
    """

    def __init__(self, urls: str | list[str], val: str | list[str] | None = None) -> None:
        items = usable(_of_shards(urls), "captions")
        super().__init__(items, None if val is None else usable(_of_shards(val), "captions"))


def _of_shards(urls: str | list[str]) -> Records:
    for pattern in [urls] if isinstance(urls, str) else urls:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise UserError(f"captions {pattern}: shards are read from disk; fetch them first")
        for path in braces(pattern):
            found = [path] if Path(path).is_file() else sorted(glob(path))  # noqa: PTH207
            if not found:
                raise UserError(f"captions {path}: no such file")
            for shard in found:
                yield from _of_shard(Path(shard))


def braces(pattern: str) -> list[str]:
    """The paths that a shell would make of a pattern with braces.

    >>> braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    choices: Sequence[str] = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = numbers.groups()
        choices = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    paths = [
        path
        for choice in choices
        for path in braces(pattern[: found.start()] + choice + pattern[found.end() :])
    ]
    return list(dict.fromkeys(paths))  # nested braces would name some twice


def _of_shard(path: Path) -> Records:
    try:
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if member.isfile())
            for key, members in groupby(files, key=lambda member: _key(member.name)[0]):
                yield _of_members(path, key, tar, list(members))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"captions {path}: no uncompressed tar file ({error})") from None


def _of_members(
    path: Path, key: str, tar: tarfile.TarFile, members: list[tarfile.TarInfo]
) -> Item | Unusable:
    parts = {_key(member.name)[1]: member for member in members}
    images = [part for part in parts if f".{part}" in IMAGES]
    where = f"{path}/{key}"
    if not images:
        return Unusable(where, f"no image (it has {', '.join(sorted(parts))})")

    def text(part: str) -> str:
        file = tar.extractfile(parts[part]) if part in parts else None
        return file.read().decode().strip() if file else ""

    try:
        record = json.loads(text("json") or "{}")
        caption = text("txt") or str(record.get("caption") or "").strip()
        label = text("cls") or _label(record)
    except (ValueError, AttributeError) as error:
        return Unusable(where, f"its text cannot be read ({error})")
    if not caption:
        return Unusable(where, "no caption")
    image = parts[images[0]]
    name = f"{path.name}/{image.name}"
    return Item(name, path, image.offset_data, image.size, caption, label)


def _key(name: str) -> tuple[str, str]:
    """A member's sample, and which part of the sample it is.

    >>> _key("a.b/0001.seg.png")
    ('a.b/0001', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, part = base.partition(".")
    return folder + slash + stem, part.lower()
