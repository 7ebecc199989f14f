"""What guards and records a run: checkpoints, non-finite numbers, provenance, random states."""

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from sandbox.checkpoint import KEY, provenance
from sandbox.data.batch import Batch
from sandbox.errors import UserError
from sandbox.params import parameter_counts

RNG = "rng"  # where the random states stand in a checkpoint
CHECKPOINTS = "checkpoints"  # the folder of a run directory that holds them

_provenance = cache(provenance)  # of the code that was loaded, whatever is edited meanwhile


# --- What a checkpoint says of its run ------------------------------------------------------------


class SelfDescribing(Protocol):
    """A model that can tell from which plain values its architecture is made again."""

    def describe(self) -> dict[str, object]:
        """Its parts by name: class paths and arguments."""


def run_state(trainer: Trainer, model: SelfDescribing) -> dict[str, Any]:
    """What a ``.ckpt`` holds beside Lightning's entries: its description and the random states.

    Plain values and tensors only, so that ``torch.load(..., weights_only=True)`` reads it. To be
    called on every process.
    """
    description = {"model": model.describe(), **facts(trainer)}
    return {KEY: description, RNG: of_all_processes(trainer, rng_state())}


def facts(trainer: Trainer) -> dict[str, Any]:
    """Commit and versions, what the data is, and the seed (None if none was set)."""
    data: Any = getattr(trainer, "datamodule", None)
    seed = os.environ.get("PL_GLOBAL_SEED")  # left there by seed_everything
    return {
        "provenance": _provenance(),
        "data": data
        and {"task": _class_path(getattr(data, "task", data)), "identity": data.identity()},
        "seed": None if seed is None else int(seed),
    }


def rng_state() -> dict[str, Any]:
    """The states of the global generators of Python, numpy and torch."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_rng(trainer: Trainer, states: Sequence[dict[str, Any]]) -> None:
    """Set this process's generators to where a checkpoint's ``RNG`` entry has them.

    To be called when training starts: what happens before may draw random numbers too. Processes
    that the checkpoint does not know keep the states they have.
    """
    if trainer.global_rank >= len(states):
        return
    state = states[trainer.global_rank]
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def of_all_processes(trainer: Trainer, value: Any) -> list[Any]:
    """What every process holds, in the order of their ranks."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _class_path(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


# --- Checkpoints ----------------------------------------------------------------------------------


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: no failure ever damages the checkpoint before.

    Lightning writes to the system's temporary folder and moves from there; between two file
    systems that is a copy onto the old checkpoint, which a full disk cuts short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            UserError: it could not be written; what was at ``path`` is untouched.
        """
        if "://" in str(path):  # an object store, which replaces objects whole
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"checkpoint {path} could not be written ({error}); "
                f"{'the one before it is intact' if path.exists() else 'there is none before it'}"
            ) from error


class Checkpoints(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run directory, to resume from.

    To keep the best weights too, add Lightning's ``ModelCheckpoint`` with ``monitor``; it then
    writes as safely.

    Args:
        every: updates between two checkpoints; the end of training is saved in any case.
    """

    def __init__(self, every: int = 500) -> None:
        super().__init__(filename="last", every_n_train_steps=every, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and make all of the run's checkpoints safe against a full disk."""
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / CHECKPOINTS)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        with warnings.catch_warnings():
            # A resumed run is meant to write where it wrote before.
            warnings.filterwarnings("ignore", ".* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the paths of this machine are not part of a run's state."""
        return {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the steps since the last checkpoint."""
        if not self._should_skip_saving_checkpoint(trainer):
            trainer.save_checkpoint(self.format_checkpoint_name({}), weights_only=False)


# --- Guard ----------------------------------------------------------------------------------------


class NonFiniteGuard(Callback):
    """Stops a run when a loss or a gradient is not finite, before the weights take harm.

    The weights before the bad update are saved, as a checkpoint that resumes at the bad batch. The
    norm of the gradient, which the check needs, is logged as ``train/grad_norm``. Costs one wait
    for the device per update.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._window: list[tuple[Batch, Tensor]] = []  # since the last update, with their losses

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch: the hooks below are not told."""
        self._batch = batch

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember its loss, unread: reading would make the host wait for the device."""
        assert self._batch is not None
        self._window.append((self._batch, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check losses and gradients, which are complete but not yet applied.

        Raises:
            UserError: one is not finite; the message names step, batch, and part or weight.
        """
        window, self._window = self._window, []
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        # A gradient scaler expects overflows, skips their updates and lowers its scale.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        numbers = [loss for _, loss in window] + ([] if scaled else [norm])
        finite = bool(torch.stack(numbers).isfinite().all())
        if not trainer.strategy.reduce_boolean_decision(finite):
            self._stop(trainer, pl_module, window)
        pl_module.log("train/grad_norm", norm)

    def _stop(
        self, trainer: Trainer, pl_module: LightningModule, window: list[tuple[Batch, Tensor]]
    ) -> None:
        step = trainer.global_step
        broken = [n for n, p in pl_module.named_parameters() if not p.isfinite().all()]
        if broken:
            raise UserError(
                f"step {step}: {_some(broken)} not finite before this update, so the one before "
                "it did harm; resume from an earlier checkpoint with a lower learning rate"
            )
        path = Path(trainer.default_root_dir) / CHECKPOINTS / f"nonfinite-step-{step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        raise UserError(
            f"step {step}: {self._cause(trainer, pl_module, window)}; the weights before this "
            f"update are in {path}"
        )

    def _cause(
        self, trainer: Trainer, pl_module: LightningModule, window: list[tuple[Batch, Tensor]]
    ) -> str:
        for batch, loss in window:
            if not loss.isfinite():
                driven: Any = pl_module
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    parts = driven.model(batch).parts
                bad = [f"'{name}' is {float(p)}" for name, p in parts.items() if not p.isfinite()]
                return f"the loss of {batch.name} is {float(loss)} ({', '.join(bad) or 'no part'})"
        names = [
            name
            for name, p in pl_module.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        batches = ", ".join(batch.name for batch, _ in window)
        return f"the gradient of {_some(names) or 'another process'} is not finite after {batches}"


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}" if names else ""


# --- Record ---------------------------------------------------------------------------------------


class RunRecord(Callback):
    """Writes ``run.json`` into the run directory.

    Its ``sessions`` grow by one entry each time the run is started or resumed: when and at which
    step, code and versions, data, seed, devices, parameters, command. When training ends, be it by
    an error or an interruption, the entry says under ``trained`` what it took:

    - ``steps`` (updates), ``samples`` (rows) and ``tokens`` (without padding), of all processes,
      each taken to have read as much as the first;
    - ``seconds``, loading and checkpoints included and validation not, and ``tokens_per_s`` of it;
    - ``peak_memory`` in bytes: allocated on a CUDA device in training, else the most that the first
      process ever had resident;
    - ``stages`` of a curriculum: their values, and the samples that they began at.

    A killed run lacks it.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # None where no training is going on
        self._paused: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append this session, and start the clock."""
        self._steps, self._samples = trainer.global_step, 0
        self._tokens: Tensor | int = 0
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        if trainer.is_global_zero:
            path = _record_path(trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            sessions = json.loads(path.read_text())["sessions"] if path.exists() else []
            self._write(trainer, [*sessions, self._session(trainer, pl_module)])
        self._since, self._paused = time.perf_counter(), None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Add this batch; its tokens stay on the device, which reading them would wait for."""
        self._tokens = self._tokens + batch.real_tokens
        self._samples += len(batch.tokens)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on, as if it were still when validation began."""
        if self._since is not None and self._paused is not None:
            self._since += time.perf_counter() - self._paused
        self._paused = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what it took."""
        self._finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say what it took until here, unless that fails too: the first error is the one to see."""
        with suppress(OSError, RuntimeError):
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        since, self._since = self._since, None
        if since is None or not trainer.is_global_zero:
            return
        tokens = trainer.world_size * int(self._tokens)  # waits for the device: then the clock
        seconds = (self._paused or time.perf_counter()) - since
        *before, session = json.loads(_record_path(trainer).read_text())["sessions"]
        stages = getattr(getattr(trainer, "datamodule", None), "stages", None)
        session["trained"] = {
            "steps": trainer.global_step - self._steps,
            "samples": trainer.world_size * self._samples,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "peak_memory": peak_memory(trainer.strategy.root_device),
            **({"stages": stages} if stages else {}),
        }
        self._write(trainer, [*before, session])

    def _write(self, trainer: Trainer, sessions: Sequence[dict[str, Any]]) -> None:
        path = _record_path(trainer)
        partial = path.with_name(".run.json.partial")
        partial.write_text(json.dumps({"sessions": sessions}, indent=2) + "\n")
        partial.replace(path)

    def _session(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        driven: Any = pl_module
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "step": trainer.global_step,
            "resumed_from": trainer.ckpt_path and str(trainer.ckpt_path),
            "command": sys.argv,
            **facts(trainer),
            "device": _device_name(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "threads": torch.get_num_threads(),
            "precision": trainer.precision,
            "parameters": parameter_counts(driven.model),
        }


def _record_path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "run.json"


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that torch had allocated on a CUDA device, or this process had resident.

    The former since its statistics were reset, the latter ever; None on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, else kilobytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
