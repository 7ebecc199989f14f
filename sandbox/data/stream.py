"""One endless stream of training samples, and evaluated splits, served as batches to a Trainer."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sandbox.data.task import Split
from sandbox.errors import UserError


class Progress(NamedTuple):
    """What training has used up: batches of one process, samples of all of them."""

    batches: int
    samples: int


@dataclass(frozen=True)
class Draw:
    """One sample, the place in the training stream that it is drawn at, and the stage there."""

    split: Split
    index: int
    place: int
    stage: int = 0


class Stream(lightning.LightningDataModule, ABC):
    """Serves samples that are found by their split and index.

    Training reads one endless stream: a source without end in the order of its indices, a finite
    one in a new permutation for each pass, the last batch of a pass running on into the next. What
    a batch holds depends on its place in the stream alone, not on workers or on earlier batches, so
    a resumed run gets the batches that the stopped one never used.

    Args:
        batch_size: samples a step and process.
        workers: processes that encode; 0 encodes in the main process.
        seed: order of a finite source, and whatever else is drawn.
        limits: samples of an evaluated split that has no end of them.
    """

    def __init__(
        self, *, batch_size: int, workers: int, seed: int, limits: dict[Split, int]
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.limits = limits
        self._resumed = Progress(batches=0, samples=0)
        self._drawn = 0  # the first place that no batch of this process has been drawn from

    @abstractmethod
    def identity(self) -> str:
        """A short hash of all that decides what a model sees, but for the batch size."""

    @abstractmethod
    def available(self, split: Split) -> int | None:
        """How many samples the split holds; None when it has no end."""

    @abstractmethod
    def encoded(self) -> Dataset[Any]:
        """What makes a batch of a list of draws: all that a worker process needs."""

    def stage_at(self, place: int) -> int:
        """The stage of a curriculum that a place in the training stream belongs to."""
        return 0

    def prefetch(self) -> int | None:
        """Batches that each worker prepares in advance; None leaves that to the loader."""
        return None

    def size(self, split: Split) -> int:
        """How many samples of an evaluated split are used: all there are, or the limit."""
        size = self.available(split)
        return self.limits[split] if size is None else size

    def setup(self, stage: str) -> None:
        """Refuse a training that nothing ends.

        Raises:
            UserError: neither steps nor batches are limited.
        """
        assert self.trainer is not None  # only a Trainer calls this
        limited = isinstance(self.trainer.limit_train_batches, int)
        if stage == "fit" and self.trainer.max_steps == -1 and not limited:
            raise UserError("the training stream has no end: set trainer.max_steps")

    def teardown(self, stage: str) -> None:
        """Forget where a resumed run started, so that the next Trainer starts anew."""
        self._resumed = Progress(batches=0, samples=0)

    def train_dataloader(self) -> "Batches":
        """The stream from where training stands, without end."""
        return Batches(lambda: self._loader(self._train_draws()))

    def val_dataloader(self) -> "Sequence[SizedBatches]":
        """The validation split; an empty list where there is none."""
        return [self.evaluation("val")] if self.size("val") else []

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for a checkpoint."""
        return {**self._progress()._asdict(), "identity": self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood; batch size and number of processes may have changed."""
        if state_dict["identity"] != self.identity():
            warnings.warn(
                f"the checkpoint was trained on other data ({state_dict['identity']}, "
                f"now {self.identity()}): this is no exact continuation",
                stacklevel=2,
            )
        # Lightning restores this before it asks for the dataloaders, but its own progress later.
        self._resumed = Progress(state_dict["batches"], state_dict["samples"])

    def _progress(self) -> Progress:
        """What training has used up.

        Batches that the Trainer fetched ahead do not count, so the Trainer is asked, not a loader.
        """
        batches, samples = self._resumed
        if self.trainer is None:
            return self._resumed
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        new = max(0, total.processed - batches)
        return Progress(batches + new, samples + new * self.batch_size * self.trainer.world_size)

    def _train_draws(self) -> Iterator[list[Draw]]:
        """The draws of each of this process's batches, from where training stands.

        Raises:
            UserError: there is nothing to train on.
        """
        rank, processes = self._place()
        start = self._progress().samples + rank * self.batch_size
        size = self.available("train")
        if size == 0:
            raise UserError(f"{type(self).__name__} has no sample to train on")
        for first in count(start, processes * self.batch_size):
            self._drawn = first + self.batch_size
            places = range(first, self._drawn)
            indices = [self._nth(place, size) for place in places]
            yield [
                Draw("train", index, place, self.stage_at(place))
                for index, place in zip(indices, places, strict=True)
            ]

    def _nth(self, place: int, size: int | None) -> int:
        """The index of the sample at a place in the stream of a source of this size."""
        if size is None:
            return place
        epoch, offset = divmod(place, size)
        return int(_permutation(self.seed, epoch, size)[offset])

    def evaluation(self, split: Split) -> "SizedBatches":
        """A split in batches of nearly equal size, as many for every process.

        Raises:
            UserError: the split has fewer samples than there are processes.
        """
        size = self.size(split)
        rank, processes = self._place()
        if size < processes:
            raise UserError(f"{split} has {size} samples, too few for {processes} processes")
        # Processes meet in every batch, so one must not have more batches than another.
        batches = -(-size // (self.batch_size * processes)) * processes
        mine = np.array_split(np.arange(size), batches)[rank::processes]
        draws = [[Draw(split, int(index), 0) for index in indices] for indices in mine]
        return SizedBatches(lambda: self._loader(draws), len(draws))

    def _place(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _loader(self, draws: Iterator[list[Draw]] | list[list[Draw]]) -> DataLoader[Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            self.encoded(),
            batch_size=None,  # the sampler names whole batches
            sampler=draws,
            num_workers=self.workers,
            prefetch_factor=self.prefetch(),
            pin_memory=on_gpu,
            # Otherwise each new iterator would advance the global generator of torch.
            generator=torch.Generator(),
        )


class Batches:
    """Opens a new loader for every pass.

    Lightning sees an iterable rather than a DataLoader, so it puts no sampler of its own in place
    of ours, and asking for an iterator starts no worker before the first batch is needed.
    """

    def __init__(self, open_loader: Callable[[], DataLoader[Any]]) -> None:
        self._open = open_loader

    def __iter__(self) -> Iterator[Any]:
        yield from self._open()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the stream keeps the place. Without this, Lightning warns that nobody does."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class SizedBatches(Batches):
    """Batches of known number."""

    def __init__(self, open_loader: Callable[[], DataLoader[Any]], size: int) -> None:
        super().__init__(open_loader)
        self._size = size

    def __len__(self) -> int:
        return self._size


@lru_cache(maxsize=2)  # a batch can reach from one pass into the next
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def named(draws: Sequence[Draw]) -> str:
    """What to call a batch in a message.

    >>> named([Draw("val", 4, 0), Draw("val", 5, 1)]), named([Draw("val", 5, 0), Draw("val", 4, 1)])
    ('val samples 4..5', 'val samples 5, 4')
    """
    indices = [draw.index for draw in draws]
    run = indices == list(range(indices[0], indices[-1] + 1))
    listed = f"{indices[0]}..{indices[-1]}" if run else ", ".join(map(str, indices))
    return f"{draws[0].split} samples {listed}"
