"""Next-token training of a vision-language model: joint from token 0, or onward from a checkpoint.

Which tokens are targets, answers alone or all text, is the data's choice (``VQAData.loss``).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from encoders.base import VisionEncoder
from sandbox.allocator import keep_freed_memory
from sandbox.backbone.config import BackboneConfig, preset
from sandbox.checkpoint import check_weights, load_weights, model_tensors, read_checkpoint
from sandbox.data.batch import Batch
from sandbox.errors import UserError
from sandbox.model import FusionBuilder, Output, VisionLanguageModel
from sandbox.tokenizer import Tokenizer
from sandbox.train.callbacks import RNG, of_all_processes, restore_rng, run_state
from sandbox.train.optim import OptimizerConfig, build_optimizer


class Pretrain(lightning.LightningModule):
    """Trains encoder, fusion and backbone together.

    Args:
        encoder: pixels to patch features.
        fusion: class path and arguments of the fusion; the model supplies the widths.
        backbone: its configuration, or the name of a preset, made for the tokenizer's vocabulary.
        tokenizer: ``small``, or the path of a vocabulary.
        optimizer: how parameters move.
        init_from: checkpoint of the same architecture whose weights to start from.
        freeze: dotted names of model parts that stay as they are (``encoder``, ``backbone``,
            ``backbone.embed``, ...).

    Raises:
        UserError: a frozen part does not exist, nothing is left to train, or the checkpoint is of
            another configuration.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        fusion: FusionBuilder,
        backbone: BackboneConfig | str = "tiny",
        tokenizer: str = "small",
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen, so safe to share)
        init_from: str | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__()
        vocabulary = Tokenizer.load(tokenizer)
        if isinstance(backbone, str):
            backbone = preset(backbone, vocabulary.vocab_size)
        self.model = VisionLanguageModel(encoder, fusion, backbone, vocabulary)
        self.optimizer = optimizer
        if init_from is not None:
            _, tensors = read_checkpoint(init_from)
            load_weights(self.model, tensors, source=init_from)
        for name in freeze:
            self._freeze(name)
        if not any(p.requires_grad for p in self.parameters()):
            raise UserError(f"freeze={list(freeze)} leaves nothing to train")
        self._rng_states: Sequence[dict[str, Any]] = ()
        self._scores: defaultdict[str, list[float]] = defaultdict(list)  # of one evaluation
        self._load: dict[int, Tensor] = {}  # visits of each expert since the last update

    def _freeze(self, name: str) -> None:
        try:
            part = self.model.get_submodule(name)
        except AttributeError:
            parts = ", ".join(child for child, _ in self.model.named_children())
            raise UserError(f"freeze: the model has no part '{name}' (parts: {parts})") from None
        part.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One batch's loss, with the model's output (no gradient) for the callbacks."""
        output: Output = self.model(batch)
        with torch.no_grad():
            if self.model.backbone.config.balance == "bias":
                for layer in output.routing:
                    load = layer.load(batch.real_tokens)
                    self._load[layer.layer] = self._load.get(layer.layer, 0) + load
            answered = batch.answered(output.correct).float().mean()
        size = len(batch.tokens)
        self.log("train/loss", output.loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/accuracy", answered, prog_bar=True, batch_size=size)
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint describe itself, and hold the states of the random generators."""
        checkpoint.update(run_state(self.trainer, self.model))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another configuration, before anything is taken over.

        The random states wait until training starts: what happens before may draw too.

        Raises:
            UserError: weights are missing, unexpected or misshapen.
        """
        tensors = model_tensors(checkpoint["state_dict"])
        check_weights(self.model, tensors, source=str(self.trainer.ckpt_path))
        self._rng_states = checkpoint.get(RNG, [])

    def on_fit_start(self) -> None:
        """On a CPU, spare every step the faulting in of its memory."""
        if self.device.type == "cpu":
            keep_freed_memory()

    def on_train_start(self) -> None:
        """Draw on as the run would have that is resumed."""
        restore_rng(self.trainer, self._rng_states)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """MuonAdamW over what is not frozen, its schedule stepping with every update."""
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = build_optimizer(self.model, self.optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

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
