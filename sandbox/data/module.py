"""Batches of a task for training and evaluation: samples, and questions about them."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch.utils.data import Dataset

from sandbox.data.batch import Batch, collate
from sandbox.data.generated import fingerprint, pick_questions
from sandbox.data.prompt import Loss, PromptEncoder
from sandbox.data.stream import Draw, SizedBatches, Stream, named
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer


class VQAData(Stream):
    """Serves a task's samples as batches, each sample's questions as branches behind its images.

    See ``Stream`` for their order.

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
        limits: dict[Split, int] = {
            "val": val_samples,
            "test": test_samples,
            "heldout": test_samples,
        }
        super().__init__(batch_size=batch_size, workers=workers, seed=seed, limits=limits)
        self.task = task
        self.loss: Loss = loss
        self.questions_per_sample = questions_per_sample
        self.starts = starts or {}

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

    def available(self, split: Split) -> int | None:
        """How many samples the task's split holds; None when it has no end."""
        return self.task.size(split)

    def setup(self, stage: str) -> None:
        """Take the prompt encoder of the model that the Trainer drives.

        Raises:
            UserError: the model reads no prompts.
        """
        super().setup(stage)
        driven: Any = self.trainer
        self.prompts = getattr(driven.lightning_module.model, "prompts", None)
        if self.prompts is None:
            raise UserError(
                "VQAData serves next-token training, and the model reads no prompts: for "
                "contrastive training, give sandbox.data.captions.CaptionData a source"
            )

    @property
    def test_splits(self) -> tuple[Split, ...]:
        """The splits that ``test_dataloader`` serves, in its order.

        Raises:
            UserError: the task has no test split.
        """
        if not self.size("test"):
            raise UserError(f"{type(self.task).__name__} has no test split")
        return ("test", "heldout") if self.size("heldout") else ("test",)

    def test_dataloader(self) -> Sequence[SizedBatches]:
        """The test split and, second, the held-out one where the task offers it."""
        return [self.evaluation(split) for split in self.test_splits]

    def encoded(self) -> "_Encoded":
        """What makes a batch of a list of draws.

        Raises:
            UserError: nobody said how to encode.
        """
        if self.prompts is None:
            raise UserError("VQAData without a Trainer needs `data.prompts = model.prompts`")
        return _Encoded(self, self.prompts)


class _Encoded(Dataset[Batch]):
    """Makes a batch of a list of draws: all that a worker process needs."""

    def __init__(self, data: VQAData, prompts: PromptEncoder) -> None:
        self.task = data.task
        self.prompts = replace(prompts, tokenizer=_Memo(prompts.tokenizer))
        self.loss = data.loss
        self.questions_per_sample = data.questions_per_sample
        self.starts = data.starts
        self.seed = data.seed

    def __getitem__(self, draws: Sequence[Draw]) -> Batch:
        name = named(draws)
        samples = [sample for draw in draws if (sample := self._sample(draw)).questions]
        if not samples:
            raise UserError(f"{name}: no question is asked so early; let one type start at 0")
        examples = [self.prompts.encode_sample(sample, loss=self.loss) for sample in samples]
        return collate(examples, name=name)

    def _sample(self, draw: Draw) -> Sample:
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
