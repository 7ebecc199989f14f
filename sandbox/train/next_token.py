"""The steps of next-token training: the loss, its scores by question type, and balanced experts.

An update is that of one process that reads all of its batches at once, however many processes and
micro-batches share them: its loss is the mean over all labelled tokens. The routers' auxiliary
losses are those of a micro-batch on all processes (``VisionLanguageModel``), and the mean over
micro-batches weighs them by labelled tokens, too. So with accumulated gradients ``balance: loss``
evens the load of each micro-batch, while ``balance: bias`` evens that of the update.

Which tokens are targets, answers alone or all text, is the data's choice (``VQAData.loss``).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from sandbox.backbone.moe import MoE
from sandbox.data.batch import Batch
from sandbox.data.module import VQAData
from sandbox.model import Output, VisionLanguageModel
from sandbox.train.callbacks import of_all_processes
from sandbox.train.objective import Objective
from sandbox.train.optim import OptimizerConfig
from sandbox.train.update import Sums, over_processes, reaching


class NextToken(Objective):
    """Trains a vision-language model by the next-token loss of whatever of it is not frozen.

    Args:
        model: what is trained.
        optimizer: how parameters move.
        freeze, compile: see ``Objective``.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        optimizer: OptimizerConfig,
        freeze: Sequence[str] = (),
        compile: bool = False,
    ) -> None:
        super().__init__(model, optimizer, freeze, compile)
        self._scores: defaultdict[str, list[float]] = defaultdict(list)  # of one evaluation
        self._sums = Sums()  # since the last update
        self._tiles = 0  # of this process, since the last update
        self._load: Tensor | None = None  # visits of each expert [L, E], of a finished update

    def forward(self, batch: Batch) -> Output:
        """The model's output, whose loss is minimised."""
        return self.model(batch, labelled_only=True)

    def loss(self, batch: Batch) -> Tensor:
        """What a training step minimises: the loss of the model's output."""
        return self(batch).loss

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One batch's loss, with the model's output (no gradient) for the callbacks.

        Of several processes or micro-batches, it is the loss times the labelled tokens.
        """
        output: Output = self(batch)
        with torch.no_grad():
            if self._balanced:
                loads = {layer.layer: layer.load() for layer in output.routing}
                self._sums.add({"load": torch.stack([loads[number] for number in self._balanced])})
            answered = batch.answered(output.correct)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, VQAData):
            data.observe(batch.kinds, answered)
        answered = answered.float()
        if self.trainer.world_size * self.trainer.accumulate_grad_batches > 1:
            return {"loss": self._weighted(batch, output, answered), "output": output}
        accuracy = answered.sum() / max(len(answered), 1)
        self._log_training(output.loss, accuracy, output.parts, len(batch.tokens))
        return {"loss": output.loss, "output": output}

    def _weighted(self, batch: Batch, output: Output, answered: Tensor) -> Tensor:
        """The loss times labelled tokens; what the update is scaled by and logs is added up."""
        labelled = batch.places.labelled
        tokens = labelled.new_full((), len(labelled), dtype=torch.float32)
        text, further = output.parts["text"], output.loss - output.parts["text"]
        sums = {
            "tokens": tokens,
            "tiles": tokens.new_full((), len(batch.tiles)),
            "right": answered.sum(),
            "answers": tokens.new_full((), len(answered)),
            "part/text": tokens * text.detach(),
        }
        loss = tokens * text
        if len(output.parts) > 1:
            # Of all processes, which the processes' losses share; so their tokens are needed now.
            share = over_processes(self.trainer, {"tokens": tokens})["tokens"]
            share = share / self.trainer.world_size
            loss = loss + share * further
            for name, part in output.parts.items():
                if name != "text":
                    sums[f"part/{name}"] = share * part.detach()
        self._sums.add(sums | {"loss": loss.detach()})
        self._tiles += len(batch.tiles)
        if self.trainer.world_size > 1 and not len(batch.tiles):
            loss = reaching(loss, self._of_images)
        return loss

    def on_after_backward(self) -> None:
        """Scale the gradients of a finished update by its labelled tokens, and log its loss."""
        if self.trainer.fit_loop._should_accumulate():
            return
        sums = over_processes(self.trainer, self._sums.take())
        tiles, self._tiles = self._tiles, 0
        self._load = sums.pop("load", None)
        if not sums:
            return
        tokens = sums["tokens"].clamp(min=1)
        parts = {n.removeprefix("part/"): s / tokens for n, s in sums.items() if "part/" in n}
        self._log_training(
            sums["loss"] / tokens, sums["right"] / sums["answers"].clamp(min=1), parts, 1
        )
        copies = self.trainer.world_size * self.trainer.accumulate_grad_batches
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, copies / tokens)
        unmet = self._of_images if self.trainer.world_size > 1 and not tiles else []
        if unmet and not sums["tiles"]:  # waits for the device; who has seen images need not ask
            for parameter in unmet:
                parameter.grad = None  # as in one process: what no image has met does not move

    def _log_training(
        self, loss: Tensor, accuracy: Tensor, parts: Mapping[str, Tensor], size: int
    ) -> None:
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/accuracy", accuracy, prog_bar=True, batch_size=size)
        for name, part in parts.items():
            self.log(f"train/loss/{name}", part.detach(), batch_size=size)

    @property
    def _balanced(self) -> dict[int, MoE]:
        """By layer, the mixtures whose bias follows the load; those with a frozen router do not."""
        if self.model.backbone.config.balance != "bias":
            return {}
        mixtures: dict[int, MoE] = self.model.backbone.mixtures()
        return {n: m for n, m in mixtures.items() if m.router.weight.requires_grad}

    @property
    def _of_images(self) -> list[Tensor]:
        """The trained parameters that a batch without images does not meet."""
        parts = [part for part in (self.model.encoder, self.model.fusion) if part is not None]
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def on_train_start(self) -> None:
        """Forget what an interrupted update has added up."""
        super().on_train_start()
        self._sums.take()
        self._tiles = 0

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
        if self._load is not None:
            for mixture, load in zip(self._balanced.values(), self._load, strict=True):
                mixture.nudge(load)
        self._load = None
