"""The steps of next-token training: the loss, its scores by question type, and balanced experts.

Which tokens are targets, answers alone or all text, is the data's choice (``VQAData.loss``).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from sandbox.data.batch import Batch
from sandbox.data.module import VQAData
from sandbox.model import Output, VisionLanguageModel
from sandbox.train.callbacks import of_all_processes
from sandbox.train.objective import Objective
from sandbox.train.optim import OptimizerConfig


class NextToken(Objective):
    """Trains a vision-language model by the next-token loss of whatever of it is not frozen.

    Args:
        model: what is trained.
        optimizer: how parameters move.
        freeze: see ``Objective``.
    """

    def __init__(
        self, model: VisionLanguageModel, optimizer: OptimizerConfig, freeze: Sequence[str] = ()
    ) -> None:
        super().__init__(model, optimizer, freeze)
        self._scores: defaultdict[str, list[float]] = defaultdict(list)  # of one evaluation
        self._load: dict[int, Tensor] = {}  # visits of each expert since the last update

    def forward(self, batch: Batch) -> Output:
        """The model's output, whose loss is minimised."""
        return self.model(batch)

    def loss(self, batch: Batch) -> Tensor:
        """What a training step minimises: the loss of the model's output."""
        return self(batch).loss

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One batch's loss, with the model's output (no gradient) for the callbacks."""
        output: Output = self(batch)
        with torch.no_grad():
            if self.model.backbone.config.balance == "bias":
                for layer in output.routing:
                    load = layer.load(batch.real_tokens)
                    self._load[layer.layer] = self._load.get(layer.layer, 0) + load
            answered = batch.answered(output.correct)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, VQAData):
            data.observe(batch.kinds, answered)
        size = len(batch.tokens)
        self.log("train/loss", output.loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/accuracy", answered.float().mean(), prog_bar=True, batch_size=size)
        for name, part in output.parts.items():
            self.log(f"train/loss/{name}", part.detach(), batch_size=size)
        return {"loss": output.loss, "output": output}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of the validation split."""
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of the test split or, second, of held-out combinations."""
        self._score(batch, ("test", "heldout")[dataloader_idx])

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracies, overall and by question type."""
        self._log_scores()

    def on_test_epoch_end(self) -> None:
        """Log loss and accuracies of every split, overall and by question type."""
        self._log_scores()

    def _score(self, batch: Batch, stage: str) -> None:
        output: Output = self.model(batch)
        answered = batch.answered(output.correct).tolist()
        self._scores[f"{stage}/loss"] += [float(output.loss)] * len(answered)
        for kind, right in zip(batch.kinds, answered, strict=True):
            self._scores[f"{stage}/accuracy"].append(right)
            self._scores[f"{stage}/accuracy/{kind}"].append(right)

    def _log_scores(self) -> None:
        # Processes may have met different question types, so each tells all it has.
        pooled: defaultdict[str, list[float]] = defaultdict(list)
        for scores in of_all_processes(self.trainer, dict(self._scores)):
            for name, values in scores.items():
                pooled[name] += values
        self._scores.clear()
        self.log_dict({name: fmean(values) for name, values in sorted(pooled.items())})

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """An update, after which the balancing biases move towards even expert load."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.model.backbone.config.balance == "bias":
            for number, mixture in self.model.backbone.mixtures().items():
                if not mixture.router.weight.requires_grad:
                    continue  # frozen: its choices stay as they are
                load = self._load[number]
                if self.trainer.world_size > 1:
                    load = self.trainer.strategy.reduce(load, reduce_op="sum")
                mixture.nudge(load)
        self._load.clear()
