"""The callbacks: what they write, what they log, and when they stop a run."""

import json
import random
import re
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.moe import Experts, Routing
from sandbox.checkpoint import KEY, load_model
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.errors import UserError
from sandbox.train import callbacks, monitors
from sandbox.train.callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    NonFiniteGuard,
    RunRecord,
    restore_rng,
    rng_state,
)
from sandbox.train.monitors import (
    Progress,
    RoutingMonitor,
    SampleImages,
    Throughput,
    routing_sums,
)
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain

CONFIG = BackboneConfig(
    width=32, layers=2, heads=2, head_dim=16, expert_hidden=32, nope_every=2, experts=4
)


def module() -> Pretrain:
    lightning.seed_everything(0, verbose=False)
    return Pretrain(
        Patches(32, 16, 16),
        lambda *widths: EarlyFusion(*widths, shuffle=1),
        CONFIG,
        optimizer=OptimizerConfig(warmup=2),
    )


def fit(
    folder: Path,
    *callbacks: Callback,
    model: Pretrain | None = None,
    task: Charts | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train for a few steps of two samples."""
    task = task or Charts(size=32, questions_per_image=2)
    data = VQAData(task, batch_size=2, val_samples=2)
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(c, Progress) for c in callbacks),
        enable_checkpointing=any(isinstance(c, Checkpoints) for c in callbacks),
        log_every_n_steps=2,
        **defaults | options,
    )
    trainer.fit(model or module(), data, ckpt_path=ckpt_path)
    return trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- Checkpoints ----------------------------------------------------------------------------------


def test_checkpoint_describes_itself_without_pickled_classes(tmp_path):
    """Guards against a checkpoint that only the code and configuration of its day can load."""
    model = module()
    fit(tmp_path, Checkpoints(every=3), model=model)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 4  # the end of training is saved, whatever `every`
    assert content[KEY]["seed"] == 0
    assert content[KEY]["data"]["task"] == "sandbox.data.charts.Charts"
    loaded = weights(load_model(path))
    assert all(torch.equal(loaded[name], t) for name, t in model.model.state_dict().items())


def test_failed_write_keeps_the_checkpoint_before(tmp_path):
    """Guards against a full disk that destroys the only checkpoint of a run."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(3)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"last\.ckpt could not be written .* is intact"):
            AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_all_checkpoints_of_a_run_are_atomic(tmp_path):
    """Guards against a `best` checkpoint written in Lightning's way beside ours."""
    trainer = fit(tmp_path, Checkpoints(every=3))
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_random_states_come_back():
    """Guards against a resumed run that draws other random numbers, of any of the generators."""

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(), np.random.normal(), float(torch.rand(()))

    draw()
    saved = rng_state()
    expected = draw()
    trainer = SimpleNamespace(global_rank=0)
    restore_rng(trainer, [saved])
    assert draw() == expected
    restore_rng(trainer, [])  # a checkpoint of someone else's
    restore_rng(SimpleNamespace(global_rank=1), [saved])
    assert draw() != expected


# --- Guard ----------------------------------------------------------------------------------------


class Poison(Callback):
    """Spoils weights, or gradients after the backward pass, at the third step."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.good: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self.good = weights(pl_module.model)
            if self.what == "weight":
                with torch.no_grad():
                    pl_module.model.backbone.norm.weight[0] = torch.nan

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 2 and self.what == "gradient":
            pl_module.model.backbone.norm.weight.grad[0] = torch.inf


class Overflow(Pretrain):
    """A model whose loss becomes infinite at the third step, its weights being fine."""

    def training_step(self, batch, batch_idx):
        self.broken = self.trainer.global_step == 2
        return super().training_step(batch, batch_idx)

    def on_fit_start(self):
        forward = self.model.forward

        def spoiled(batch, **options):
            output = forward(batch, **options)
            if self.broken:
                output.parts["text"] = output.parts["text"] * torch.inf
                object.__setattr__(output, "loss", output.loss * torch.inf)
            return output

        self.model.forward = spoiled


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_guard_stops_before_the_bad_update(tmp_path, what):
    """Guards against a run that trains on as NaN, and a message that does not say where it began.

    The checkpoint resumes at the bad batch, so that the failure can be looked at again.
    """
    poison = Poison(what)
    model = module()
    if what == "loss":
        model.__class__ = Overflow
    messages = {
        "loss": r"step 2: the loss of train samples 4\.\.5 is inf \('text' is inf\)",
        "gradient": r"step 2: the gradient of model\.backbone\.norm\.weight is not finite after "
        r"train samples 4\.\.5",
    }
    with pytest.raises(UserError, match=messages[what]):
        fit(tmp_path, NonFiniteGuard(), poison, model=model)
    path = tmp_path / "checkpoints" / "nonfinite-step-2.ckpt"
    saved = load_model(path).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in poison.good.items())
    assert torch.load(path, weights_only=True)["VQAData"]["batches"] == 2


def test_guard_does_not_save_spoiled_weights(tmp_path):
    """Guards against a checkpoint called good whose weights are not."""
    with pytest.raises(UserError, match=r"backbone\.norm\.weight not finite before this update"):
        fit(tmp_path, NonFiniteGuard(), Poison("weight"))
    assert not list(tmp_path.rglob("*.ckpt"))


# --- Record ---------------------------------------------------------------------------------------


def test_run_record_keeps_every_session(tmp_path):
    """Guards against a resumed run that overwrites the record of the code it began with."""
    fit(tmp_path, RunRecord())
    fit(tmp_path, RunRecord())
    first, second = sessions(tmp_path)
    assert first["step"] == second["step"] == 0
    assert {"commit", "torch"} <= first["provenance"].keys()
    assert first["data"]["identity"] == second["data"]["identity"]
    model = module()
    experts = sum(
        e.numel() for m in model.modules() if isinstance(m, Experts) for e in m.parameters()
    )
    total = sum(p.numel() for p in model.parameters())
    assert first["parameters"] == {
        "total": total,
        "active": total - experts * 3 // 4,
        "trained": total,
    }


def sessions(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["sessions"]


class Watch(Callback):
    """Turns the clock: a training batch takes 2 s, validation 100 s. Counts tokens the slow way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: BaseException | None = None) -> None:
        self.now, self.tokens, self.stop = 50.0, 0, stop
        clock = SimpleNamespace(perf_counter=lambda: self.now, strftime=time.strftime)
        monkeypatch.setattr(callbacks, "time", clock)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.now += 2.0
        documents = batch.documents if batch.documents is not None else torch.zeros(1)
        self.tokens += int((documents.expand_as(batch.tokens) >= 0).sum())
        if self.stop and trainer.global_step == 3:
            raise self.stop

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.now += 100.0


def test_run_record_says_what_training_took(tmp_path, monkeypatch):
    """Guards against costs of the run instead of this session's, time of validation that passes
    for training, padding that passes for tokens, and kilobytes that pass for bytes.
    """
    last = tmp_path / "checkpoints" / "last.ckpt"
    for steps, resumed in ((5, None), (3, last)):
        watch = Watch(monkeypatch)
        fit(
            tmp_path,
            watch,
            RunRecord(),
            Checkpoints(),
            ckpt_path=resumed,
            max_steps=8 if resumed else 5,
            limit_val_batches=1,
            val_check_interval=2,
            num_sanity_val_steps=1,
        )
        trained = sessions(tmp_path)[-1]["trained"]
        assert 100e6 < trained.pop("peak_memory") < 100e9
        assert trained == {
            "steps": steps,
            "samples": 2 * steps,
            "tokens": watch.tokens,
            "seconds": 2.0 * steps,
            "tokens_per_s": watch.tokens / (2 * steps),
        }
        assert watch.now > 50 + 2 * steps + 100, "validation took time"
    assert all("trained" in session for session in sessions(tmp_path))


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), UserError("out of patience")])
def test_run_record_says_what_an_interrupted_run_took(tmp_path, monkeypatch, stop):
    """Guards against costs that only a run gets that went as planned."""
    watch = Watch(monkeypatch, stop)
    handler = signal.getsignal(signal.SIGINT)  # which Lightning silences
    with pytest.raises((SystemExit, UserError)):
        fit(tmp_path, RunRecord(), watch)
    signal.signal(signal.SIGINT, handler)
    (session,) = sessions(tmp_path)
    assert (session["trained"]["steps"], session["trained"]["seconds"]) == (3, 6.0)
    assert session["trained"]["tokens"] == watch.tokens > 0


def test_run_record_hides_no_error(tmp_path, monkeypatch):
    """Guards against a full disk that is told as an error of the record, or a run that ended before
    it trained and looks for a record that it never wrote.
    """

    def full(*_: Any) -> None:
        raise OSError("no space left")

    class Late(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            monkeypatch.setattr(RunRecord, "_write", full)
            raise UserError("what went wrong first")

    class Early(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise UserError("what went wrong before")

    with pytest.raises(UserError, match="first"):
        fit(tmp_path, RunRecord(), Late())
    with pytest.raises(UserError, match="before"):
        fit(tmp_path / "early", RunRecord(), Early())


# --- Monitors -------------------------------------------------------------------------------------


def test_routing_sums_by_modality():
    """Guards against padding counted as text, and images mixed up with text."""
    patches = torch.tensor([[False, False, True], [True, False, False]])
    places = torch.tensor([0, 1, 2, 3])  # the other two are padding
    logits = torch.zeros(4, 3)
    logits[0] = torch.tensor([100.0, 0.0, 0.0])  # certain: no entropy
    sums = routing_sums(Routing(0, logits, torch.tensor([[0], [1], [1], [2]]), places), patches)
    uniform = torch.tensor(3.0).log()
    expected = torch.tensor([[1, 1, 0, uniform, 2], [0, 1, 1, 2 * uniform, 2]])
    torch.testing.assert_close(sums, expected)


def test_routing_monitor_logs_shares(tmp_path):
    """Guards against loads that do not add up."""
    fit(tmp_path, RoutingMonitor(), logger=CSVLogger(tmp_path, name="", version=""))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    logged = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    routed = [row for row in logged if row["routing/max_violation/layer0"]]
    assert [row["step"] for row in routed] == ["1", "3"]
    for name in ("text", "image"):
        shares = [float(routed[0][f"routing/load/layer0/{name}/expert{e}"]) for e in range(4)]
        assert sum(shares) == pytest.approx(1.0)
        assert 0 < float(routed[0][f"routing/entropy/layer0/{name}"]) <= 1.3863


def test_throughput_counts_a_real_step(tmp_path):
    """Guards against a utilization of nothing: uncounted attention, experts or backward pass."""
    throughput = Throughput()
    model = module()
    trainer = fit(tmp_path, throughput, model=model)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    experts = sum(
        e.numel() for m in model.modules() if isinstance(m, Experts) for e in m.parameters()
    )
    embedding = model.model.backbone.embed.weight.numel()
    head = model.model.backbone.head.weight.numel()  # sees labelled tokens only
    every_token = matrices - experts * 3 // 4 - embedding - head
    assert 0.5 * 6 * every_token < throughput._flops_per_token < 3 * 6 * every_token
    metrics = trainer.callback_metrics
    assert metrics["throughput/tokens_per_s"] > metrics["throughput/samples_per_s"] > 0
    assert 0 < metrics["throughput/utilization"] < 1


@pytest.mark.parametrize(("validate_after", "share"), [(None, 12 / 14), (3, 6 / 8)])
def test_waiting_for_data_is_told_from_training(tmp_path, monkeypatch, validate_after, share):
    """Guards against loading that passes for training, and validation that passes for loading.

    On a clock that this test turns: a batch of two samples takes 6 s, a step 1 s, and what other
    callbacks do after validation 100 s. The figure is of the last two steps.
    """
    now = [0.0]

    class SlowCharts(Charts):
        def sample(self, split, index):
            now[0] += 3.0
            return super().sample(split, index)

    class SlowStep(Pretrain):
        def training_step(self, batch, batch_idx):
            now[0] += 1.0
            return super().training_step(batch, batch_idx)

    class Drawing(Callback):
        def on_validation_end(self, trainer, pl_module):
            now[0] += 100.0

    monkeypatch.setattr(monitors, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(monitors, "matmul_peak", lambda device, dtype: 1e9)
    model = module()
    model.__class__ = SlowStep
    options = {"limit_val_batches": 1, "val_check_interval": validate_after}
    trainer = fit(
        tmp_path,
        Throughput(),
        Drawing(),
        model=model,
        task=SlowCharts(size=32, questions_per_image=2),
        **(options if validate_after else {}),
    )
    assert trainer.callback_metrics["throughput/data_wait"] == pytest.approx(share)
    seconds = 14 if validate_after is None else 8
    assert trainer.callback_metrics["throughput/samples_per_s"] == pytest.approx(4 / seconds)


def test_sample_images_reach_tensorboard(tmp_path):
    """Guards against pictures that are drawn but never shown."""
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, SampleImages(count=2), logger=logger, limit_val_batches=1, val_check_interval=4)
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("val/samples")
    assert (image.width, image.height, image.step) == (2 * 256, 332, 4)


def test_progress_without_a_terminal(tmp_path, capsys):
    """Guards against a log file of thousands of redrawn bars."""
    fit(tmp_path, Progress(seconds=1000), Throughput())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert len(lines) == 1
    assert re.match(r"step 4/4  loss \d+\.\d+  accuracy 0\.\d+ .* tokens/s .* left", lines[0])
