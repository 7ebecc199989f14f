"""Images as files below one folder: whether they are there, without a look at each."""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from posixpath import split as parent_and_name

from sandbox.data.benchmarks.base import Item, Stored, check_limit, grouped
from sandbox.data.benchmarks.records import Entry
from sandbox.data.media import MediaError
from sandbox.errors import UserError

TOLD = 3  # missing images that a message names


@dataclass(frozen=True)
class ImageFile(Stored):
    """An image file, by its name below a folder."""

    folder: Path
    name: str

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.name

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            MediaError: they cannot be read.
        """
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise MediaError(f"image {self.where}: {error.strerror}") from None

    def told(self) -> object:
        """Its name and size.

        Raises:
            MediaError: it is gone.
        """
        try:
            return self.name, self.path.stat().st_size
        except OSError as error:
            raise MediaError(f"image {self.where}: {error.strerror}") from None


def items_of(
    where: str, folder: Path, entries: Sequence[Entry], limit: int | None, skip_missing: bool
) -> list[Item]:
    """The samples of a split.

    Args:
        where: the split, for messages.
        folder: the images' names are relative to it.
        entries: the split's questions.
        limit: keep the first so many samples; None = all. Images of others need not be there.
        skip_missing: leave out samples of which an image is not there, with a warning, and before
            the limit counts.

    Raises:
        UserError: images are not there, or are links that lead out of the folder.
    """
    check_limit(limit)
    samples = grouped(entries)
    if not skip_missing:
        samples = dict(islice(samples.items(), limit))
    names = {name for images in samples for name in images}
    missing = absent(where, folder, names)
    if missing:
        lost = {i: q for i, q in samples.items() if not missing.isdisjoint(i)}
        ordered = [name for images in lost for name in images if name in missing]
        first = ", ".join(list(dict.fromkeys(ordered))[:TOLD])
        told = f"{where}: {len(missing)} of {len(names)} images are not in {folder}: {first}"
        told += ", ..." if len(missing) > TOLD else ""
        if not skip_missing:
            raise UserError(f"{told}; fetch them, or go on without them by skip_missing: true")
        if len(lost) == len(samples):
            raise UserError(f"{told}; no sample is left")
        questions = sum(map(len, lost.values()))
        warnings.warn(
            f"{told}; {len(lost)} of {len(samples)} samples ({questions} questions) left out",
            stacklevel=3,
        )
        samples = {images: asked for images, asked in samples.items() if images not in lost}
    return [
        Item(tuple(ImageFile(folder, name) for name in images), questions)
        for images, questions in islice(samples.items(), limit)
    ]


def absent(where: str, folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the names, as ``image_name`` gives them, that are no file below the folder.

    Each folder is listed once (0.07 s for 40,000 images): to ask for each is slow where a disk is
    on the network.

    Raises:
        UserError: a name leads through a link to somewhere outside, or a folder cannot be listed.
    """
    by_folder = defaultdict[str, dict[str, str]](dict)
    for name in names:
        parent, base = parent_and_name(name)
        by_folder[parent][base] = name
    root = folder.resolve()
    missing, outside = set[str](), list[str]()
    for parent, wanted in by_folder.items():
        within = (folder / parent).resolve()
        if not within.is_relative_to(root):
            outside += wanted.values()
            continue
        try:
            with os.scandir(within) as listing:
                for file in listing:
                    if file.name not in wanted or not file.is_file():
                        continue
                    name = wanted.pop(file.name)
                    if file.is_symlink() and not Path(file).resolve().is_relative_to(root):
                        outside.append(name)
        except (FileNotFoundError, NotADirectoryError):
            pass  # every image in it is missing
        except OSError as error:
            raise UserError(f"{where}: {within} cannot be listed: {error.strerror}") from None
        missing.update(wanted.values())
    if outside:
        raise UserError(
            f"{where}: {len(outside)} images are links that leave {folder}, the first is "
            f"{min(outside)}; copy the files into it, or name the folder that they are in"
        )
    return missing
