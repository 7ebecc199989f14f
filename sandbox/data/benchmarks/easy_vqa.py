"""easy-VQA, from its official folder."""

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image as PILImage

from sandbox.data.benchmarks.base import check_limit
from sandbox.data.benchmarks.records import read_bytes, read_list
from sandbox.data.media import load_image
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

SYMMETRIES = (None, *PILImage.Transpose)  # of a square: the identity, and what Pillow can do
VAL_ONE_IN = 20  # of the images in easy-VQA's train folder, one in so many is val


@dataclass(frozen=True)
class _Item:
    """An image file, what is asked about it, and the hash of its bytes."""

    image: Path
    questions: tuple[Question, ...]
    content: str

    @property
    def is_val(self) -> bool:
        return int(self.content, 16) % VAL_ONE_IN == 0


class EasyVQA(Task):
    """easy-VQA (Victor Zhou, 2019): one coloured shape on 64 x 64 pixels, 13 possible answers.

    Files: ``answers.txt``, and in ``train`` and ``test`` each ``questions.json`` (a list of
    [question, answer, image index]) and ``images/{index}.png``. A sample is an image with all its
    questions. Question types: ``color``, ``shape``, ``presence`` ("is there a red shape?") and
    ``absence`` ("is no circle present?").

    ``test`` is the test folder, ``val`` about one in twenty images of the train folder, chosen by
    content, ``train`` the others. A test image that occurs in the train folder too is dropped
    there, with a warning (the official files hold none).

    Args:
        root: the folder that holds ``answers.txt``, ``train`` and ``test``.
        symmetries: train also on turned and mirrored images, each of the eight symmetries of a
            square as a sample of its own. No question asks where or which way up anything is, so
            all answers stay true.
        limit: the first so many images of each split; None = all.

    Raises:
        UserError: a file is missing, cut short or malformed; the message names file and record.
    """

    def __init__(self, root: str, symmetries: bool = False, limit: int | None = None) -> None:
        check_limit(limit)
        folder = Path(root)
        self._train_views = SYMMETRIES if symmetries else SYMMETRIES[:1]
        answers = read_bytes(folder / "answers.txt").decode(errors="replace").split()
        official = _easy_vqa_items(folder / "train", answers)
        test = _easy_vqa_items(folder / "test", answers)
        tested = {item.content for item in test}
        kept = [item for item in official if item.content not in tested]
        if len(kept) < len(official):
            dropped = len(official) - len(kept)
            warnings.warn(
                f"easy-VQA: {dropped} train images dropped, test has them too", stacklevel=2
            )
        self._items: dict[Split, list[_Item]] = {
            "train": [item for item in kept if not item.is_val][:limit],
            "val": [item for item in kept if item.is_val][:limit],
            "test": test[:limit],
            "heldout": [],
        }

    def size(self, split: Split) -> int:
        """How many images the split holds; 0 for ``heldout``."""
        return len(self._items[split]) * len(self._views(split))

    def sample(self, split: Split, index: int) -> Sample:
        """The image at ``index`` of ``split``, in the order of the files, and its questions.

        With ``symmetries``, the whole train folder is gone through in one view after another.
        """
        item, turn = self._item(split, index)
        # Decoding takes 0.1 ms, so nothing is kept in memory.
        image = load_image(item.image)
        return Sample(
            (image if turn is None else image.transpose(turn),), item.questions, item.content
        )

    def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
        """The questions about the image at ``index`` of ``split``, which is not decoded."""
        return self._item(split, index)[0].questions

    def _item(self, split: Split, index: int) -> tuple[_Item, PILImage.Transpose | None]:
        """The image at ``index`` of ``split``, and how it is turned."""
        if not 0 <= index < self.size(split):
            raise IndexError(f"easy-VQA {split} holds {self.size(split)} images, not {index}")
        view, place = divmod(index, len(self._items[split]))
        return self._items[split][place], self._views(split)[view]

    def _views(self, split: Split) -> tuple[PILImage.Transpose | None, ...]:
        return self._train_views if split == "train" else SYMMETRIES[:1]

    def identity(self) -> str:
        """A short hash of all questions, answers, image contents and splits."""
        parts = {
            split: [(item.content, item.questions) for item in items]
            for split, items in self._items.items()
        }
        return _hash(repr((parts, len(self._train_views))).encode())


def _easy_vqa_items(folder: Path, answers: list[str]) -> list[_Item]:
    """The images of one of easy-VQA's folders in the order of their numbers."""
    path = folder / "questions.json"
    by_image = defaultdict[int, list[Question]](list)
    for number, record in enumerate(read_list(path)):
        match record:
            case [str(text), str(answer), int(image)]:
                pass
            case _:
                raise UserError(
                    f"{path}, record {number}: expected [question, answer, image index], "
                    f"got {record!r:.80}; fetch the official file again"
                )
        if answer not in answers:
            raise UserError(
                f"{path}, record {number}: the answer {answer!r} is not in answers.txt "
                f"({', '.join(answers)}); fetch both files from one release"
            )
        by_image[image].append(Question(text, answer, _easy_vqa_kind(text, answer)))
    items = []
    for image, questions in sorted(by_image.items()):
        file = folder / "images" / f"{image}.png"
        items.append(_Item(file, tuple(questions), _hash(read_bytes(file))))
    return items


def _easy_vqa_kind(text: str, answer: str) -> str:
    """The question type: yes/no by whether the wording negates, the others by what they ask for."""
    if answer in ("yes", "no"):
        return "absence" if re.search(r"\b(no|not)\b", text) else "presence"
    return "color" if "color" in text else "shape"


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
