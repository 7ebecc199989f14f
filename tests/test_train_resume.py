"""A run that dies and is resumed must end in the very same state as one that never died."""

import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning import Callback, Trainer

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.data.batch import Batch
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.data.task import Sample, Split, Task
from sandbox.train.callbacks import Checkpoints
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain
from tests.checkpoints import differences, final

STEPS, EVERY, DIES_IN = 7, 3, 5  # updates; a checkpoint after 3; death in the middle of the sixth
BATCH = 4
POOL = 10  # samples of the finite task: a pass ends within the third batch


class Finite(Task):
    """The first few charts, over and over."""

    def __init__(self) -> None:
        self.charts = Charts(size=32, questions_per_image=2)

    def size(self, split: Split) -> int:
        return POOL

    def sample(self, split: Split, index: int) -> Sample:
        return self.charts.sample(split, index)

    def identity(self) -> str:
        return self.charts.identity()


class Noisy(Pretrain):
    """Lets every global random generator decide on the weights."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        result["loss"] = result["loss"] * (torch.rand(()) + random.random() + np.random.rand())
        return result


class Killed(BaseException):
    pass


class Watch(Callback):
    """Notes which batches are trained on, and ends the run in the middle of an update."""

    def __init__(self, dies: str | None) -> None:
        self.dies = dies
        self.names: list[str] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.names.append(batch.name)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == DIES_IN and self.dies == "raise":
            raise Killed
        if trainer.global_step == DIES_IN and self.dies == "kill":
            signal.raise_signal(signal.SIGKILL)


def train(
    folder: Path,
    task: Task,
    dies: str | None = None,
    checkpoint: Path | None = None,
    workers: int = 0,
    **options: Any,
) -> list[str]:
    """Train for a few steps and return the names of the batches."""
    lightning.seed_everything(0 if checkpoint is None else 99, verbose=False)
    torch.set_num_threads(1)
    module = Noisy(
        Patches(32, 16, 16),
        lambda *widths: EarlyFusion(*widths, shuffle=1),
        BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=32, nope_every=2),
        optimizer=OptimizerConfig(warmup=2),
    )
    data = VQAData(task, BATCH, val_samples=8, workers=workers)
    watch = Watch(dies)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Checkpoints(EVERY), watch],
        **{"max_steps": STEPS, "val_check_interval": 2, "num_sanity_val_steps": 1} | options,
    )
    with suppress(Killed):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return watch.names


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_killed_run_resumes_bit_identically(tmp_path):
    """Guards against a batch skipped or repeated, and against state that a checkpoint lacks."""
    process = subprocess.run([sys.executable, __file__, tmp_path / "killed"], check=False)
    assert process.returncode == -signal.SIGKILL
    whole = train(tmp_path / "whole", Finite())
    resumed = train(
        tmp_path / "killed", Finite(), checkpoint=tmp_path / "killed" / "checkpoints" / "last.ckpt"
    )
    assert resumed == whole[EVERY:]
    assert differences(final(tmp_path / "whole"), final(tmp_path / "killed")) == []


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {"val_check_interval": 3}),  # validation right after the checkpoint
        (1, {"accumulate_grad_batches": 2}),
        (0, {"limit_train_batches": 2, "val_check_interval": 1.0}),  # epochs of the Trainer
        (0, {"max_epochs": 1}),  # makes Lightning open the stream before it restores its progress
    ],
)
def test_resumes_exactly_in_the_stream(tmp_path, workers, options):
    """Guards against a stream position that holds for the plainest settings only."""
    folders = whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    task = Charts(size=32, questions_per_image=2)
    names = train(whole, task, workers=workers, **options)
    train(stopped, task, "raise", workers=workers, **options)
    last = stopped / "checkpoints" / "last.ckpt"
    resumed = train(stopped, task, checkpoint=last, workers=workers, **options)
    assert resumed == names[EVERY * options.get("accumulate_grad_batches", 1) :]
    assert differences(*map(final, folders)) == []


def test_finished_run_goes_on_with_the_next_batch(tmp_path):
    """Guards against a stream that starts anew when a finished run is given more steps."""
    task = Charts(size=32, questions_per_image=2)
    names = train(tmp_path, task, max_steps=4)
    last = tmp_path / "checkpoints" / "last.ckpt"
    names += train(tmp_path, task, checkpoint=last)
    assert names == [f"train samples {4 * i}..{4 * i + 3}" for i in range(STEPS)]


if __name__ == "__main__":
    train(Path(sys.argv[1]), Finite(), dies="kill")
