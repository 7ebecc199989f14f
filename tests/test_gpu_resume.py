"""A run that is killed on a GPU and resumed goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import KEY
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.train.callbacks import RNG, Checkpoints, NonFiniteGuard
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain

ROOT = Path(__file__).parents[1]
STEPS, EVERY, DIES_IN = 6, 3, 4  # updates; a checkpoint after 3; death before the fifth
PLACES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


class Watch(Callback):
    """Notes batches and losses, and may kill the process in the middle of an update."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies
        self.seen: list[tuple[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, place: int
    ) -> None:
        self.seen.append((batch.name, float(outputs["loss"])))

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if self.dies and trainer.global_step == DIES_IN:
            signal.raise_signal(signal.SIGKILL)


def train(
    folder: Path, device: str, precision: Any, *, dies: bool = False, resume: bool = False
) -> list[tuple[str, float]]:
    """Train for a few steps; names and losses of the batches."""
    lightning.seed_everything(99 if resume else 0, verbose=False)
    module = Pretrain(
        Patches(32, 16, 16),
        lambda *widths: EarlyFusion(*widths, shuffle=1),
        BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=32, nope_every=2),
        optimizer=OptimizerConfig(warmup=2),
    )
    watch = Watch(dies)
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        precision=precision,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Checkpoints(EVERY), NonFiniteGuard(), watch],
        max_steps=STEPS,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    checkpoint = folder / "checkpoints" / "last.ckpt" if resume else None
    data = VQAData(Charts(size=32, questions_per_image=2), 4, val_samples=4)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return watch.seen


def final(folder: Path) -> dict[str, Any]:
    """The run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_killed_run_resumes(precision: str, device: str, tmp_path: Path) -> None:
    """Guards against state of a device, its generator first, that a checkpoint lacks.

    On a CPU every bit is the same. On a GPU sums are taken in no fixed order, so there losses may
    differ by rounding, and what the generators draw may not.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "tests.test_gpu_resume", str(killed), device, precision]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    wanted = train(whole, device, precision)
    found = train(killed, device, precision, resume=True)
    assert [name for name, _ in found] == [name for name, _ in wanted[EVERY:]]
    losses = [loss for _, loss in wanted[EVERY:]]
    tolerance = 0.0 if device == "cpu" else 1e-3
    assert [loss for _, loss in found] == pytest.approx(losses, rel=tolerance, abs=0)
    ours, theirs = final(killed), final(whole)
    for name, weight in theirs["state_dict"].items():
        difference = (ours["state_dict"][name].double() - weight.double()).norm()
        assert difference <= tolerance * weight.double().norm(), name
    for mine, other in zip(ours[RNG], theirs[RNG], strict=True):
        assert mine["torch"].equal(other["torch"])
        assert mine["python"] == other["python"]
        assert device == "cpu" or mine["cuda"].equal(other["cuda"])
    assert ours[KEY]["model"] == theirs[KEY]["model"]


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3], dies=True)
