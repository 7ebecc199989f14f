"""The training module: what it freezes, starts from, counts and refuses."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import save_model
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.errors import UserError
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain


def module(**options: Any) -> Pretrain:
    """A small model to train."""
    torch.manual_seed(0)
    config = BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=16)
    encoder = Patches(tile_size=32, patch_size=8, width=24)
    return Pretrain(encoder, EarlyFusion, config, optimizer=OptimizerConfig(warmup=0), **options)


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


def test_the_bias_counts_every_batch_of_an_update(tmp_path: Path):
    """Guards against balancing on the last of several accumulated batches alone."""
    seen: list[float] = []

    class Watched(Pretrain):
        def training_step(self, batch, batch_idx):
            result = super().training_step(batch, batch_idx)
            seen.append(float(self._load[0].sum()))
            return result

    pretrain = module()
    pretrain.__class__ = Watched
    fit(pretrain, tmp_path, steps=2, accumulate_grad_batches=2)
    assert seen[1] > seen[0]
    assert seen[2] < seen[1]  # cleared by the update
    assert seen[3] > seen[2]


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
