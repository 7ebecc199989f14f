"""What every generated task shares: seeds, splits by content, fair choice, and a look at it."""

import random
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from itertools import zip_longest
from typing import TypeVar, get_args

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

Answer = TypeVar("Answer")
SHEET = (225, 225, 225)  # what a contact sheet is made of


def fingerprint(*parts: object) -> str:
    """A short hex hash (64 bits) of plain values, the same in every process and on every machine.

    >>> fingerprint("bar", 64) == fingerprint("bar", 64)
    True
    """
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def stream(seed: int, split: Split, index: int) -> random.Random:
    """The random numbers that belong to one sample, independent of every other sample's.

    Raises:
        IndexError: index is negative.
        UserError: split is not one of the four.
    """
    check_names("split", [split], get_args(Split))
    if index < 0:
        raise IndexError(f"a sample's index is 0 or more, got {index}")
    return random.Random(int(fingerprint(seed, split, index), 16))


def split_of(content: str) -> Split:
    """The split that owns a content hash: 1 in 10 test, 1 in 10 val, the rest train.

    Only content decides, so no seed, index or process can carry a scene into another split.
    Held-out combinations are not hashed: they occur in no other split anyway.
    """
    tenth = int(content, 16) % 10
    return "test" if tenth == 0 else "val" if tenth == 1 else "train"


def check_names(what: str, names: Iterable[str], valid: Sequence[str]) -> None:
    """Refuse an empty list and unknown names.

    Raises:
        UserError: no name is given, or one is not valid; the nearest valid one is named.
    """
    names = list(names)
    if not names:
        raise UserError(f"name at least one {what} of {', '.join(valid)}")
    for name in names:
        if name not in valid:
            near = get_close_matches(name, valid, n=1, cutoff=0.0)[0]
            raise UserError(
                f"unknown {what} {name!r}: did you mean {near!r}? (valid: {', '.join(valid)})"
            )


def thin(chances: Mapping[Answer, float]) -> dict[Answer, float]:
    """The chance to keep a question with each answer that makes kept answers equally frequent.

    ``chances`` are the answers' frequencies before, up to a common factor.

    >>> thin({"Yes": 30, "No": 10})
    {'Yes': 0.3333333333333333, 'No': 1.0}
    """
    least = min(chances.values())
    return {answer: least / chance for answer, chance in chances.items()}


def pick_questions(
    by_kind: Iterable[list[Question]], count: int, rng: random.Random
) -> tuple[Question, ...]:
    """At most ``count`` of the questions, the kinds taking turns so that none crowds out another.

    >>> a, b = Question("a?", "1", "a"), Question("b?", "1", "b")
    >>> sorted(q.kind for q in pick_questions([[a], [b, b, b]], 3, random.Random(0)))
    ['a', 'b', 'b']
    """
    shuffled = [rng.sample(questions, len(questions)) for questions in by_kind]
    rng.shuffle(shuffled)  # with more kinds than turns, the last ones would never have theirs
    turns = [question for turn in zip_longest(*shuffled) for question in turn if question]
    return tuple(turns[:count])


def contact_sheet(task: Task, split: Split, count: int, columns: int = 4) -> PILImage.Image:
    """The first ``count`` samples of a split with their questions and answers, as one picture.

    Small images are enlarged by a whole factor, so that what the model sees can be judged.
    Images of a sample stand side by side, under their labels or times.
    """
    samples = [task.sample(split, index) for index in range(count)]
    font = ImageFont.load_default(size=12)
    line = 15
    captions = [[f"{q.text} {q.answer}" for q in sample.questions] for sample in samples]
    pictures = [_strip(sample, font, line) for sample in samples]
    longest = max((font.getlength(text) for texts in captions for text in texts), default=0)
    cell_width = int(max(longest, *(picture.width for picture in pictures))) + 16
    cell_height = max(
        picture.height + line * len(texts)
        for picture, texts in zip(pictures, captions, strict=True)
    )
    cell_height += 16
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = PILImage.new("RGB", (cell_width * columns, cell_height * rows), SHEET)
    pen = ImageDraw.Draw(sheet)
    for place, (picture, texts) in enumerate(zip(pictures, captions, strict=True)):
        left, top = place % columns * cell_width + 8, place // columns * cell_height + 8
        sheet.paste(picture, (left, top))
        for row, text in enumerate(texts):
            pen.text((left, top + picture.height + row * line), text, fill="black", font=font)
    return sheet


def _strip(
    sample: Sample, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, line: int
) -> PILImage.Image:
    """A sample's images in a row, enlarged, with what is written over each."""
    width, height = sample.images[0].size
    zoom = max(1, 192 // width if len(sample.images) == 1 else 96 // width)
    step, gap = width * zoom, 4
    names: Sequence[str] = sample.labels or [f"{time:.1f}s" for time in sample.times or ()]
    head = line if names else 0
    whole = len(sample.images) * (step + gap) - gap
    strip = PILImage.new("RGB", (whole, head + height * zoom), SHEET)
    pen = ImageDraw.Draw(strip)
    for place, image in enumerate(sample.images):
        large = image.resize((step, height * zoom), PILImage.Resampling.NEAREST)
        strip.paste(large, (place * (step + gap), head))
    for place, name in enumerate(names):
        pen.text((place * (step + gap), 0), name, fill="black", font=font)
    return strip
