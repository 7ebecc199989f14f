"""Batches of a task for training and evaluation: samples, and questions about them."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sandbox.data.batch import Batch, collate
from sandbox.data.curriculum import Curriculum, Mastery
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
        curriculum: an argument of the task that starts easy and changes once that is mastered, in
            training alone: val, test and heldout are always those of the task as it is configured.
        val_samples: validation samples of a task that has no end of them.
        test_samples: the same for the test and the held-out split.
        workers: processes that encode; 0 encodes in the main process.
        seed: order of a finite task, and the choice of questions.

    Raises:
        UserError: the curriculum does not fit the task, or the number of workers.
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
        curriculum: Curriculum | None = None,
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
        self.curriculum = curriculum
        self.tasks = curriculum.tasks(task) if curriculum else (task,)  # by stage
        self._mastery = Mastery(curriculum) if curriculum else None
        self.prefetch()  # refuses too many workers before anything is trained

    def identity(self) -> str:
        """A short hash of all that decides which tokens a model sees, but for the batch size."""
        return fingerprint(
            type(self.task).__qualname__,
            self.task.identity(),
            self.loss,
            self.questions_per_sample,
            sorted(self.starts.items()),
            self.seed,
            *([self.curriculum.identity()] if self.curriculum else []),
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
        if stage == "fit" and self.curriculum:
            self._mastery = Mastery(self.curriculum)
        driven: Any = self.trainer
        self.prompts = getattr(driven.lightning_module.model, "prompts", None)
        if self.prompts is None:
            raise UserError(
                "VQAData serves next-token training, and the model reads no prompts: for "
                "contrastive training, give sandbox.data.captions.CaptionData a source"
            )

    def stage_at(self, place: int) -> int:
        """The stage of the curriculum that a place in the training stream belongs to."""
        return self._mastery.stage_at(place) if self._mastery else 0

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Each stage so far: its value, and the training sample (of all passes) it begins at."""
        if self.curriculum is None or self._mastery is None:
            return []
        values = self.curriculum.values
        return [{"from": place, "value": values[n]} for place, n in self._mastery.switches]

    def prefetch(self) -> int | None:
        """Batches that each worker prepares in advance: no more than a curriculum can wait for.

        Raises:
            UserError: there are too many workers for that.
        """
        return self.curriculum.prefetch(self.workers) if self.curriculum else None

    def observe(self, kinds: Sequence[str], right: Tensor) -> None:
        """Let the curriculum see the answers to the batch in training, on every process alike.

        Args:
            kinds: the question type of each answer.
            right: bool ``[len(kinds)]``.
        """
        mastery, trainer = self._mastery, cast(Any, self.trainer)
        if mastery is None or trainer is None:
            return
        done = self._progress()
        if mastery.settle(done.batches):
            ahead = mastery.curriculum.ahead * self.batch_size * trainer.world_size
            if self._drawn > done.samples + ahead:
                raise RuntimeError("samples were drawn before the stage of their place was known")
            mastery.decide(*self._counts(mastery), place=done.samples + ahead)
        if mastery.watches(done.samples):
            mastery.note(done.batches, kinds, right)
        stage = float(mastery.stage_at(done.samples))
        trainer.lightning_module.log("curriculum/stage", stage, batch_size=self.batch_size)

    def _counts(self, mastery: Mastery) -> tuple[int, int]:
        """Right answers and all answers of the window, of all processes."""
        counts = mastery.counts()
        if self._place()[1] == 1:
            return counts
        strategy = cast(Any, self.trainer).strategy
        mine = torch.tensor(counts, device=strategy.root_device)
        right, answers = strategy.reduce(mine, reduce_op="sum").tolist()
        return right, answers

    def state_dict(self) -> dict[str, Any]:
        """Where training and the curriculum stand, for a checkpoint; called on every process."""
        state = super().state_dict()
        if self._mastery is None:
            return state
        self._mastery.settle(self._progress().batches)
        return {**state, "curriculum": self._mastery.state(*self._counts(self._mastery))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood; a curriculum that it lacks starts at its first stage."""
        super().load_state_dict(state_dict)
        if self._mastery and "curriculum" in state_dict:
            self._mastery.load(state_dict["curriculum"], first=self._place()[0] == 0)

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
        self.tasks = data.tasks
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
        if draw.split != "train":
            return self.task.sample(draw.split, draw.index)
        sample = self.tasks[draw.stage].sample(draw.split, draw.index)
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
