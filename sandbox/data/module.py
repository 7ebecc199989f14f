"""Batches of a task for training and evaluation; a resumed run goes on at the next sample."""

import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sandbox.data.batch import Batch, collate
from sandbox.data.generated import fingerprint, pick_questions
from sandbox.data.prompt import Loss, PromptEncoder
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer


class VQAData(lightning.LightningDataModule):
    """Serves a task's samples as batches, each sample's questions as branches behind its images.

    Training reads one endless stream: a task without end in the order of its indices, a finite one
    in a new permutation for each pass, the last batch of a pass running on into the next. What a
    batch holds depends on its place in the stream alone, not on workers or on earlier batches, so
    a resumed run gets the batches that the stopped one never used.

    Args:
        task: where samples come from.
        batch_size: samples a step and process.
        loss: which tokens are targets: those of answers, or all text.
        questions_per_sample: train on at most so many questions of a sample, drawn anew in each
            pass, question types taking turns (so that a type which is seldom asked is learned
            too); None = all. Evaluation asks all.
        starts: the training sample (counted through all passes) from which on a question type is
            asked; types not named are asked from the first. What is easily seen can hide what is
            not (experiments/LOG.md), so the harder type may need a start of its own. Samples
            without a question so far are passed over.
        val_samples: validation samples of a task that has no end of them.
        test_samples: the same for the test and the held-out split.
        workers: processes that encode; 0 encodes in the main process.
        seed: order of a finite task, and the choice of questions.
    """

    prompts: PromptEncoder | None = None
    """How to encode. A Trainer's model supplies it; without a Trainer, set it yourself."""

    def __init__(
        self,
        task: Task,
        batch_size: int = 16,
        loss: Loss = "answer",
        questions_per_sample: int | None = None,
        starts: dict[str, int] | None = None,
        val_samples: int = 256,
        test_samples: int = 1024,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task = task
        self.batch_size = batch_size
        self.loss: Loss = loss
        self.questions_per_sample = questions_per_sample
        self.starts = starts or {}
        self.limits: dict[Split, int] = {
            "val": val_samples,
            "test": test_samples,
            "heldout": test_samples,
        }
        self.workers = workers
        self.seed = seed
        self._resumed = _Progress(batches=0, samples=0)

    def identity(self) -> str:
        """A short hash of all that decides which tokens a model sees, but for the batch size."""
        return fingerprint(
            type(self.task).__qualname__,
            self.task.identity(),
            self.loss,
            self.questions_per_sample,
            sorted(self.starts.items()),
            self.seed,
        )

    def setup(self, stage: str) -> None:
        """Take the prompt encoder of the model that the Trainer drives.

        Raises:
            UserError: nothing would end the training.
        """
        assert self.trainer is not None  # only a Trainer calls this
        driven: Any = self.trainer.lightning_module
        self.prompts = driven.model.prompts
        limited = isinstance(self.trainer.limit_train_batches, int)
        if stage == "fit" and self.trainer.max_steps == -1 and not limited:
            raise UserError("the training stream has no end: set trainer.max_steps")

    def teardown(self, stage: str) -> None:
        """Forget where a resumed run started, so that the next Trainer starts anew."""
        self._resumed = _Progress(batches=0, samples=0)

    def train_dataloader(self) -> "_Batches":
        """The stream from where training stands, without end."""
        return _Batches(lambda: self._loader(self._train_draws()))

    def val_dataloader(self) -> "Sequence[_SizedBatches]":
        """The validation split; an empty list where the task has none."""
        return [self._evaluation("val")] if self.size("val") else []

    @property
    def test_splits(self) -> tuple[Split, ...]:
        """The splits that ``test_dataloader`` serves, in its order.

        Raises:
            UserError: the task has no test split.
        """
        if not self.size("test"):
            raise UserError(f"{type(self.task).__name__} has no test split")
        return ("test", "heldout") if self.size("heldout") else ("test",)

    def test_dataloader(self) -> "Sequence[_SizedBatches]":
        """The test split and, second, the held-out one where the task offers it."""
        return [self._evaluation(split) for split in self.test_splits]

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for a checkpoint."""
        progress = self._progress()
        return {**progress._asdict(), "identity": self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood; batch size and number of processes may have changed."""
        if state_dict["identity"] != self.identity():
            warnings.warn(
                f"the checkpoint was trained on other data ({state_dict['identity']}, "
                f"now {self.identity()}): this is no exact continuation",
                stacklevel=2,
            )
        # Lightning restores this before it asks for the dataloaders, but its own progress later.
        self._resumed = _Progress(state_dict["batches"], state_dict["samples"])

    def _progress(self) -> "_Progress":
        """What training has used up.

        Batches that the Trainer fetched ahead do not count, so the Trainer is asked, not a loader.
        """
        batches, samples = self._resumed
        if self.trainer is None:
            return self._resumed
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        new = max(0, total.processed - batches)
        return _Progress(batches + new, samples + new * self.batch_size * self.trainer.world_size)

    def _train_draws(self) -> "Iterator[list[_Draw]]":
        """The draws of each of this process's batches, from where training stands."""
        rank, processes = self._place()
        start = self._progress().samples + rank * self.batch_size
        size = self.task.size("train")
        for first in count(start, processes * self.batch_size):
            places = range(first, first + self.batch_size)
            if size is None:
                yield [_Draw("train", place, place) for place in places]
            else:
                yield [_Draw("train", self._nth(place, size), place) for place in places]

    def _nth(self, place: int, size: int) -> int:
        """The index of the sample at a place in the stream of a finite task."""
        epoch, offset = divmod(place, size)
        return int(_permutation(self.seed, epoch, size)[offset])

    def _evaluation(self, split: Split) -> "_SizedBatches":
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
        draws = [[_Draw(split, int(index), 0) for index in indices] for indices in mine]
        return _SizedBatches(lambda: self._loader(draws), len(draws))

    def size(self, split: Split) -> int:
        """How many samples of an evaluated split are used: all there are, or the limit."""
        size = self.task.size(split)
        return self.limits[split] if size is None else size

    def _place(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _loader(self, draws: "Iterator[list[_Draw]] | list[list[_Draw]]") -> DataLoader[Batch]:
        if self.prompts is None:
            raise UserError("VQAData without a Trainer needs `data.prompts = model.prompts`")
        encoded = _Encoded(self, self.prompts)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            encoded,
            batch_size=None,  # the sampler names whole batches
            sampler=draws,
            num_workers=self.workers,
            pin_memory=on_gpu,
            # Otherwise each new iterator would advance the global generator of torch.
            generator=torch.Generator(),
        )


class _Progress(NamedTuple):
    """What training has used up: batches of one process, samples of all of them."""

    batches: int
    samples: int


@dataclass(frozen=True)
class _Draw:
    """One sample, and the place in the training stream that it is drawn at."""

    split: Split
    index: int
    place: int


class _Encoded(Dataset[Batch]):
    """Makes a batch of a list of draws: all that a worker process needs."""

    def __init__(self, data: VQAData, prompts: PromptEncoder) -> None:
        self.task = data.task
        self.prompts = replace(prompts, tokenizer=_Memo(prompts.tokenizer))
        self.loss = data.loss
        self.questions_per_sample = data.questions_per_sample
        self.starts = data.starts
        self.seed = data.seed

    def __getitem__(self, draws: Sequence[_Draw]) -> Batch:
        indices = [draw.index for draw in draws]
        name = f"{draws[0].split} samples {_listed(indices)}"
        samples = [sample for draw in draws if (sample := self._sample(draw)).questions]
        if not samples:
            raise UserError(f"{name}: no question is asked so early; let one type start at 0")
        examples = [self.prompts.encode_sample(sample, loss=self.loss) for sample in samples]
        return collate(examples, name=name)

    def _sample(self, draw: _Draw) -> Sample:
        """The sample, with the questions that training asks of it at this place."""
        sample = self.task.sample(draw.split, draw.index)
        if draw.split != "train":
            return sample
        by_kind = defaultdict[str, list[Question]](list)
        for question in sample.questions:
            if self.starts.get(question.kind, 0) <= draw.place:
                by_kind[question.kind].append(question)
        questions = [question for kind in by_kind.values() for question in kind]
        most = self.questions_per_sample
        if most is None or len(questions) <= most:
            return replace(sample, questions=tuple(questions)) if self.starts else sample
        rng = random.Random(f"{self.seed} {draw.place} {draw.index}")
        kinds = rng.sample(list(by_kind.values()), len(by_kind))
        return replace(sample, questions=pick_questions(kinds, most, rng))


class _Memo(Tokenizer):
    """A tokenizer that remembers: tasks put the same few questions over and over."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vars(self).update(vars(tokenizer))
        self._tokenizer = tokenizer
        self._known = lru_cache(maxsize=65_536)(tokenizer.encode)

    def encode(self, text: str) -> list[int]:
        return list(self._known(text))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Memo, (self._tokenizer,)


class _Batches:
    """Opens a new loader for every pass.

    Lightning sees an iterable rather than a DataLoader, so it puts no sampler of its own in place
    of ours, and asking for an iterator starts no worker before the first batch is needed.
    """

    def __init__(self, open_loader: Callable[[], DataLoader[Batch]]) -> None:
        self._open = open_loader

    def __iter__(self) -> Iterator[Batch]:
        yield from self._open()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: VQAData keeps the place. Without this, Lightning warns that nobody does."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _SizedBatches(_Batches):
    """Batches of known number."""

    def __init__(self, open_loader: Callable[[], DataLoader[Batch]], size: int) -> None:
        super().__init__(open_loader)
        self._size = size

    def __len__(self) -> int:
        return self._size


@lru_cache(maxsize=2)  # a batch can reach from one pass into the next
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _listed(indices: Sequence[int]) -> str:
    """Sample numbers for a message.

    >>> _listed([4, 5, 6]), _listed([4, 6, 5])
    ('4..6', '4, 6, 5')
    """
    if list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}..{indices[-1]}"
    return ", ".join(map(str, indices))
