"""Images with captions: the contract of their sources, and their way into contrastive batches."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset

from sandbox.data.batch import moved
from sandbox.data.generated import fingerprint
from sandbox.data.stream import Draw, Stream, named
from sandbox.data.task import Split, Task
from sandbox.data.tiling import cut
from sandbox.data.words import words_of
from sandbox.errors import UserError
from sandbox.tokenizer import BEGIN, END, Tokenizer

CLIP = "clip"  # names CLIP's own tokenizer
ASPECT = 4 / 3  # the largest ratio of a random crop's sides, as in open_clip's training


@dataclass(frozen=True)
class Pair:
    """An image, what is said about it and, where that is known, the class it belongs to."""

    image: PILImage.Image
    caption: str
    label: str | None = None


class CaptionSource(ABC):
    """Where pairs come from. Every constructor argument is a plain value, so YAML can name it.

    ``pair`` is a pure function of the constructor arguments, split and index: any worker, any rank
    and any resumed run sees the same pair. ``train`` and ``val`` share no image.
    """

    @abstractmethod
    def size(self, split: Split) -> int | None:
        """How many pairs the split holds; None when it is generated without end."""

    @abstractmethod
    def pair(self, split: Split, index: int) -> Pair:
        """The pair at ``index`` (0-based) of ``split``.

        Raises:
            UserError: its image cannot be read, or it has no caption.
        """

    @abstractmethod
    def identity(self) -> str:
        """A short hash that changes when the data does; stored with every run."""


class TaskCaptions(CaptionSource):
    """The images of a task that tells in words what they show (``Sample.text``).

    Args:
        task: gives images, captions and splits. Of several images the first is taken.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def size(self, split: Split) -> int | None:
        """As many as the task has."""
        return self.task.size(split)

    def pair(self, split: Split, index: int) -> Pair:
        """First image and text of the task's sample.

        Raises:
            UserError: it has no text or no image.
        """
        sample = self.task.sample(split, index)
        if not sample.images:
            raise UserError(f"sample {sample.content} has no image: captions need a task with some")
        return Pair(sample.images[0], words_of(sample))

    def identity(self) -> str:
        """A short hash of the task's."""
        return fingerprint("TaskCaptions", self.task.identity())


# --- Batches --------------------------------------------------------------------------------------


@dataclass  # not frozen: Lightning converts precision field by field
class Pairs:
    """Pairs stacked for the model.

    Attributes:
        tiles: uint8 ``[B, 3, S, S]``.
        tokens: int64 ``[B, L]``, captions at the model's context length: begin, text, end, zeros.
        labels: int64 ``[B]``, the place of each pair's class in ``classes``, -1 where it has none.
        classes: the classes met in this batch, sorted.
        name: where the batch comes from (split and sample numbers), for error messages.
    """

    tiles: Tensor
    tokens: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()
    name: str = ""

    @property
    def real_tokens(self) -> Tensor:
        """The number of tokens without the zeros after each caption's end, int64 ``[]``."""
        return (self.tokens.flip(1).cumsum(1).flip(1) > 0).sum()

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Pairs":
        """The same batch with every tensor on ``device``.

        ``non_blocking`` lets the host go on meanwhile. By default it does so for tensors in
        page-locked memory: Lightning asks for it where it copies bare tensors, and not here.
        """
        return self._each(partial(moved, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "Pairs":
        """The same batch in page-locked memory, so that copies to a GPU can overlap."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Pairs":
        old = {f.name: getattr(self, f.name) for f in fields(self)}
        new: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in old.items()}
        return Pairs(**new)


class CaptionTokens:
    """Captions as rows of ids in CLIP's form: begin, text, end, zeros. What is too long is cut.

    Args:
        tokenizer: ``small`` or the path of a vocabulary, see ``Tokenizer.load``; or ``clip`` for
            CLIP's own, which MetaCLIP shares and which lowers the case of all text.
        context_length: L, ids a row.

    Raises:
        UserError: there is no such vocabulary, or no room between begin and end.
    """

    def __init__(self, tokenizer: str, context_length: int) -> None:
        if context_length < 3:
            raise UserError(f"context_length is {context_length}: begin, text and end need 3")
        self.context_length = context_length
        self.name = tokenizer
        self._ours: Tokenizer | None = None
        if tokenizer == CLIP:
            from open_clip.tokenizer import SimpleTokenizer

            theirs = SimpleTokenizer()
            self._encode: Callable[[str], list[int]] = theirs.encode
            self.vocab_size: int = theirs.vocab_size
            self.begin, self.end = theirs.all_special_ids[:2]
        else:
            self._ours = Tokenizer.load(tokenizer)
            self._encode = self._ours.encode
            self.vocab_size = self._ours.vocab_size
            self.begin, self.end = self._ours.special(BEGIN), self._ours.special(END)

    def rows(self, captions: Sequence[str]) -> Tensor:
        """The captions as int64 ``[n, L]``."""
        rows = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            text = self._encode(caption)[: self.context_length - 2]
            row[: len(text) + 2] = torch.tensor([self.begin, *text, self.end])
        return rows

    def describe(self) -> str:
        """The vocabulary as JSON, or ``clip``."""
        return CLIP if self._ours is None else self._ours.to_json()


@dataclass(frozen=True)
class PairEncoder:
    """Turns pairs into what a contrastive model reads."""

    tile_size: int
    tokens: CaptionTokens

    def __call__(self, pairs: Sequence[Pair], name: str = "") -> Pairs:
        """The batch of these pairs; an image is one tile, in which it keeps its shape."""
        tiles = [cut(pair.image, self.tile_size, max_tiles=1).pixels for pair in pairs]
        classes = sorted({pair.label for pair in pairs if pair.label is not None})
        places = {label: place for place, label in enumerate(classes)}
        return Pairs(
            tiles=torch.from_numpy(np.concatenate(tiles)),
            tokens=self.tokens.rows([pair.caption for pair in pairs]),
            labels=torch.tensor([-1 if p.label is None else places[p.label] for p in pairs]),
            classes=tuple(classes),
            name=name,
        )


class CaptionData(Stream):
    """Serves a source's pairs as batches for contrastive training; see ``Stream`` for their order.

    Args:
        source: where pairs come from.
        batch_size: pairs a step and process; each is contrasted with all others of the step.
        crop: train on random crops of an area between these two shares of the image and an aspect
            ratio between 3:4 and 4:3 (CLIP: 0.9 and 1). None = whole images: a chart without its
            axis cannot be read.
        val_samples: validation pairs of a source that has no end of them.
        workers: processes that decode and encode; 0 does so in the main process.
        seed: order of a finite source, and the crops.

    Raises:
        UserError: ``crop`` is no range within 0..1.
    """

    pairs: PairEncoder | None = None
    """How to encode. A Trainer's model supplies it; without a Trainer, set it yourself."""

    def __init__(
        self,
        source: CaptionSource,
        batch_size: int = 128,
        crop: tuple[float, float] | None = None,
        val_samples: int = 512,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        limits: dict[Split, int] = {"val": val_samples}
        super().__init__(batch_size=batch_size, workers=workers, seed=seed, limits=limits)
        if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
            raise UserError(
                f"crop is {list(crop)}: give two shares of the area, 0 < low <= high <= 1"
            )
        self.source = source
        self.crop = crop

    def identity(self) -> str:
        """A short hash of all that decides which pairs a model sees, but for the batch size."""
        return fingerprint(self.source.identity(), self.crop, self.seed)

    def available(self, split: Split) -> int | None:
        """How many pairs the source's split holds; None when it has no end."""
        return self.source.size(split)

    def setup(self, stage: str) -> None:
        """Take the pair encoder of the model that the Trainer drives.

        Raises:
            UserError: the model reads no pairs.
        """
        super().setup(stage)
        driven: Any = self.trainer
        self.pairs = getattr(driven.lightning_module.model, "pairs", None)
        if self.pairs is None:
            raise UserError(
                "CaptionData serves contrastive training; for next-token training on captions, "
                "give VQAData the task sandbox.data.words.Described"
            )

    def encoded(self) -> "_Encoded":
        """What makes a batch of a list of draws.

        Raises:
            UserError: nobody said how to encode.
        """
        if self.pairs is None:
            raise UserError("CaptionData without a Trainer needs `data.pairs = model.pairs`")
        return _Encoded(self.source, self.pairs, self.crop, self.seed)


class _Encoded(Dataset[Pairs]):
    """Makes a batch of a list of draws: all that a worker process needs."""

    def __init__(
        self,
        source: CaptionSource,
        encoder: PairEncoder,
        crop: tuple[float, float] | None,
        seed: int,
    ) -> None:
        self.source = source
        self.encoder = encoder
        self.crop = crop
        self.seed = seed

    def __getitem__(self, draws: Sequence[Draw]) -> Pairs:
        return self.encoder([self._pair(draw) for draw in draws], name=named(draws))

    def _pair(self, draw: Draw) -> Pair:
        pair = self.source.pair(draw.split, draw.index)
        if draw.split != "train" or self.crop is None:
            return pair
        rng = random.Random(f"{self.seed} {draw.place} {draw.index}")
        return Pair(random_crop(pair.image, self.crop, rng), pair.caption, pair.label)


def random_crop(
    image: PILImage.Image, scale: tuple[float, float], rng: random.Random
) -> PILImage.Image:
    """A random part of the image, as ``torchvision.transforms.RandomResizedCrop`` chooses it.

    Its area, as a share of the image's, is uniform in ``scale``, and its aspect ratio log-uniform.
    After ten tries that do not fit it is the largest central part of an allowed ratio.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return image.crop((left, top, left + w, top + h))
    w, h = min(width, round(height * ASPECT)), min(height, round(width * ASPECT))
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))
