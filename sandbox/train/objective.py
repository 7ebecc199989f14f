"""What the runs of all objectives share: self-describing checkpoints, and the optimizer."""

from collections.abc import Sequence
from shutil import which
from typing import Any

import lightning
import torch
import torch._dynamo
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from sandbox.allocator import keep_freed_memory
from sandbox.backbone.transformer import Block
from sandbox.checkpoint import check_weights, model_tensors
from sandbox.errors import UserError
from sandbox.train.callbacks import RNG, restore_rng, run_state
from sandbox.train.optim import OptimizerConfig, build_optimizer


class Objective(lightning.LightningModule):
    """Trains ``model``, which says of itself what it is.

    An objective sets up its model, names it here, and implements ``loss`` and the steps.

    Args:
        model: what is trained and saved; its ``describe()`` gives the plain values to make it of.
        optimizer: how parameters move.
        freeze: dotted names of parts of the model that stay as they are.
        compile: whether training runs decoder layers and encoder through ``torch.compile``. The
            first steps then take a minute or two on a CPU, less where a run before filled the cache
            (``TORCHINDUCTOR_CACHE_DIR``); it needs a C++ compiler.

    Raises:
        UserError: a frozen part does not exist, or nothing is left to train.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        freeze: Sequence[str] = (),
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.optimizer = optimizer
        for name in freeze:
            submodule(self.model, name, key="freeze").requires_grad_(False)
        if not any(p.requires_grad for p in self.parameters()):
            raise UserError(f"freeze={list(freeze)} leaves nothing to train")
        self.compiled = compile
        self._rng_states: Sequence[dict[str, Any]] = ()

    def loss(self, batch: Any) -> Tensor:
        """What a training step minimises on ``batch``: a scalar. Logs and keeps nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it minimises")

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
        """Compile what is to be compiled; on a CPU, spare every step the faulting in of its memory.

        Raises:
            UserError: there is no C++ compiler.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.compiled:
            if self.device.type == "cpu" and not (which("g++") or which("clang++")):
                raise UserError("compile: true needs a C++ compiler on a CPU: install g++")
            compile_parts(self.model)

    def on_train_start(self) -> None:
        """Draw on as the run would have that is resumed.

        On as many processes, training on a CPU goes on to the bit. On fewer or more, weights,
        momenta, schedule and the next sample of the stream are those of the checkpoint, while
        updates hold more or fewer samples, and processes without a saved random state keep theirs.
        """
        restore_rng(self.trainer, self._rng_states)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """MuonAdamW over what is not frozen, its schedule stepping with every update.

        Raises:
            UserError: gradients would be scaled, and Muon has part in it.
        """
        if self.optimizer.name == "muon" and self.trainer.precision == "16-mixed":
            raise UserError(
                "trainer.precision 16-mixed scales gradients, which Muon is not made for: set "
                "trainer.precision to bf16-mixed, or optimizer.name to adamw"
            )
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = build_optimizer(self, self.optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def compile_parts(model: nn.Module) -> None:
    """Run decoder layers and encoder through ``torch.compile`` from now on, in place.

    Names of weights stay as they are. Shapes are dynamic: batches differ in their tokens.
    """
    # One layer is compiled for training, evaluation, dense or mixture, local or global.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    encoder = getattr(model, "encoder", None)
    layers = [module for module in model.modules() if isinstance(module, Block)]
    for module in [*layers, *([] if encoder is None else [encoder])]:
        module.compile(dynamic=True)


def submodule(model: nn.Module, name: str, *, key: str) -> nn.Module:
    """The part of the model with a dotted name.

    Raises:
        UserError: there is none; the message names the configuration's key and the parts there are.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        parts = ", ".join(child for child, _ in model.named_children())
        raise UserError(f"{key}: the model has no part '{name}' (parts: {parts})") from None
