"""The training module: what it freezes, starts from, counts and refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.moe import MoE
from sandbox.checkpoint import save_model
from sandbox.data.batch import IGNORE
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.errors import UserError
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain

SMALL = {"width": 32, "layers": 2, "heads": 2, "head_dim": 16, "expert_hidden": 16}


def module(config: BackboneConfig | None = None, **options: Any) -> Pretrain:
    """A small model to train."""
    torch.manual_seed(0)
    encoder = Patches(tile_size=32, patch_size=8, width=24)
    options = {"optimizer": OptimizerConfig(warmup=0)} | options
    return Pretrain(encoder, EarlyFusion, config or BackboneConfig(**SMALL), **options)


def fit(pretrain: Pretrain, folder: Path, steps: int = 3, **options: Any) -> lightning.Trainer:
    """Train for some steps."""
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(pretrain, VQAData(Charts(size=32), batch_size=4))
    return trainer


def state(pretrain: Pretrain) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in pretrain.model.state_dict().items()}


def test_frozen_parts_keep_every_bit(tmp_path: Path):
    """Guards against decay, or a balancing bias, that moves a part said to be frozen."""
    pretrain = module(freeze=["backbone"])
    before = state(pretrain)
    fit(pretrain, tmp_path)
    moved = {name for name, tensor in state(pretrain).items() if not tensor.equal(before[name])}
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)


def test_everything_else_moves(tmp_path: Path):
    """Guards against a parameter that no optimizer group holds, and a bias that is never nudged."""
    pretrain = module()
    before = state(pretrain)
    fit(pretrain, tmp_path)
    still = {name for name, tensor in state(pretrain).items() if tensor.equal(before[name])}
    assert not still


def test_the_bias_counts_every_batch_of_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against balancing on the last of several accumulated batches alone."""
    counted: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    class Watched(Pretrain):
        def training_step(self, batch, batch_idx):
            result = super().training_step(batch, batch_idx)
            routing = result["output"].routing
            seen.append(torch.stack([layer.load() for layer in routing]))
            return result

    monkeypatch.setattr(MoE, "nudge", lambda layer, load: counted.append(load))
    pretrain = module()
    pretrain.__class__ = Watched
    fit(pretrain, tmp_path, steps=2, accumulate_grad_batches=2)
    expected = [seen[0] + seen[1], seen[2] + seen[3]]
    assert torch.cat(expected).equal(torch.stack(counted))


class Gradients(lightning.Callback):
    """Keeps the gradients of every update, and the loss that is logged for it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("batches", [2, 1])
def test_accumulated_batches_count_by_their_labelled_tokens(tmp_path: Path, batches: int):
    """Guards against a mean of means, auxiliary losses scaled as the text's, and a window that the
    end of an epoch cuts short and Lightning divides as if it were whole.
    """
    config = BackboneConfig(**SMALL, balance="loss", balance_rate=0.3)
    watch = Gradients()
    limits = {"limit_train_batches": batches, "max_epochs": 1, "callbacks": [watch]}
    fit(module(config), tmp_path, steps=-1, accumulate_grad_batches=2, **limits)
    pretrain = module(config)
    data = VQAData(Charts(size=32), batch_size=4)
    data.prompts = pretrain.model.prompts
    read = [batch for batch, _ in zip(data.train_dataloader(), range(batches), strict=False)]
    counts = [int((batch.labels != IGNORE).sum()) for batch in read]
    outputs = [pretrain(batch) for batch in read]
    assert len(set(counts)) == batches, "unequal"
    assert set(outputs[0].parts) == {"text", "balance"}
    loss = sum(n * out.loss for n, out in zip(counts, outputs, strict=True)) / sum(counts)
    loss.backward()
    assert watch.losses == [pytest.approx(loss.item(), rel=1e-6)]
    for name, parameter in pretrain.named_parameters():
        torch.testing.assert_close(watch.gradients[0][name], parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_and_mixed_precision_go_together(tmp_path: Path, precision: str):
    """Guards against an optimizer that takes part in AMP's scaling: Lightning refuses to clip."""
    watch = Gradients()
    fit(module(), tmp_path, precision=precision, gradient_clip_val=1e-3, callbacks=[watch])
    assert len(watch.losses) == 3


def test_muon_refuses_scaled_gradients(monkeypatch: pytest.MonkeyPatch):
    """Guards against fp16 with Muon, and against refusing it to AdamW, which it suits."""
    scaled = SimpleNamespace(precision="16-mixed", estimated_stepping_batches=3)
    muon, adamw = module(), module(optimizer=OptimizerConfig(name="adamw"))
    monkeypatch.setattr(Pretrain, "trainer", scaled)  # on a CPU Lightning would turn to bf16
    with pytest.raises(UserError, match=r"trainer\.precision .* bf16-mixed"):
        muon.configure_optimizers()
    optimizer = adamw.configure_optimizers()["optimizer"]
    assert not optimizer._step_supports_amp_scaling, "so Lightning unscales and may clip"


def test_training_starts_from_a_checkpoint(tmp_path: Path):
    """Guards against a second stage that silently starts from random weights."""
    first = module()
    fit(first, tmp_path)
    path = tmp_path / "first.safetensors"
    save_model(first.model, path)
    second = module(init_from=str(path))
    assert all(t.equal(state(first)[name]) for name, t in state(second).items())


def test_impossible_wishes_are_refused(tmp_path: Path):
    """Guards against a freeze that misses its part, or leaves nothing to train."""
    with pytest.raises(UserError, match=r"no part 'encodr' \(parts: encoder, fusion, backbone\)"):
        module(freeze=["encodr"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        module(freeze=["encoder", "fusion", "backbone"])
    with pytest.raises(UserError, match="no such checkpoint"):
        module(init_from=str(tmp_path / "none.ckpt"))
