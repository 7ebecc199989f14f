"""What shows how a run is doing: routing by modality, throughput, sample pictures, progress."""

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from torch import Tensor

from sandbox.backbone.moe import Routing, max_violation
from sandbox.data.batch import Batch
from sandbox.data.module import VQAData
from sandbox.data.prompt import Prompt
from sandbox.data.task import Question
from sandbox.errors import UserError
from sandbox.train.flops import matmul_peak, step_flops
from sandbox.train.objective import Objective

# --- Routing --------------------------------------------------------------------------------------


class RoutingMonitor(Callback):
    """Logs where routers send the text and image tokens of the steps at which the Trainer logs.

    For each mixture layer: ``routing/load`` (share of a modality's visits that an expert gets),
    ``routing/entropy`` (mean, in nats, of the softmax of the logits) and ``routing/max_violation``
    (0 is even), by modality; for the load of all tokens, ``routing/max_violation/layer{i}``.
    Padding does not count; where at most half of the tokens have labels, the last layer routes
    these alone.

    Args:
        experts: log the load of every single expert, which is many curves in a large model.
    """

    modalities = ("text", "image")

    def __init__(self, experts: bool = True) -> None:
        self.experts = experts

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Log when it is time; other steps cost nothing."""
        routing = outputs["output"].routing
        if not routing or not _is_due(trainer):
            return
        sums = torch.stack([routing_sums(layer, batch.patches) for layer in routing])
        total = trainer.strategy.reduce(sums, reduce_op="sum").cpu()
        layers = [layer.layer for layer in routing]
        for logger in trainer.loggers:
            logger.log_metrics(self._metrics(total, layers), step=trainer.global_step - 1)

    def _metrics(self, sums: Tensor, layers: list[int]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for layer, by_modality in zip(layers, sums, strict=True):
            load = by_modality[:, :-2]
            metrics[f"routing/max_violation/layer{layer}"] = max_violation(load.sum(0))
            for name, row in zip(self.modalities, by_modality, strict=True):
                tokens, entropy, load = float(row[-1]), float(row[-2]), row[:-2]
                if not tokens:
                    continue  # a step without images says nothing of them
                where = f"layer{layer}/{name}"
                metrics[f"routing/entropy/{where}"] = entropy / tokens
                metrics[f"routing/max_violation/{where}"] = max_violation(load)
                if self.experts:
                    shares = (load / load.sum()).tolist()
                    for expert, share in enumerate(shares):
                        metrics[f"routing/load/{where}/expert{expert}"] = share
        return metrics


def routing_sums(routing: Routing, patches: Tensor) -> Tensor:
    """Sums over the tokens of a layer by modality, text and image: fp32 ``[2, E + 2]``.

    The last axis holds the visits of each expert, the summed entropy, and the tokens.

    Args:
        routing: what the layer's router did.
        patches: bool ``[B, T]``, True on image tokens.
    """
    E = routing.logits.shape[-1]
    image = patches.flatten().long()
    if routing.places is not None:
        image = image[routing.places]
    # Histograms: a tensor of tokens by experts would take hundreds of megabytes in a large model.
    visits = torch.bincount((image[:, None] * E + routing.experts).flatten(), minlength=2 * E)
    log_p = routing.logits.detach().float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return torch.cat(
        (
            visits.view(2, E).float(),
            torch.bincount(image, weights=entropy, minlength=2).float()[:, None],
            torch.bincount(image, minlength=2).float()[:, None],
        ),
        dim=1,
    )


# --- Throughput -----------------------------------------------------------------------------------


class Throughput(Callback):
    """Logs tokens and samples per second, and how much of the device's matmul speed training uses.

    ``throughput/utilization`` divides the FLOPs of forward and backward (see ``step_flops``) by
    what one large matmul of the same precision achieved on this device when training started. They
    are counted on shapes alone for the first batch, and scaled by tokens; optimizer, data loading
    and logging take time but count as no FLOPs. ``throughput/data_wait`` is the share of time
    between batches: loading, or waiting for workers that do (and callbacks listed after this one; a
    GPU may go on meanwhile). Tokens do not include padding; time from validation to the next batch
    is left out.
    """

    def __init__(self) -> None:
        self._flops_per_token: float | None = None
        self._peak = 0.0
        self._clear()

    def _clear(self) -> None:
        self._since: float | None = None
        self._stopped: float | None = None
        self._samples = 0
        self._waited = self._ended = 0.0
        self._tokens: Tensor | int = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the matmul that stands for full speed."""
        self._clear()
        with trainer.precision_plugin.forward_context():
            weight = next(pl_module.parameters()).detach().flatten()[:1, None]
            dtype = (weight @ weight).dtype  # autocast decides
        self._peak = matmul_peak(pl_module.device, dtype)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Count the FLOPs of the first batch, and the time since the last one."""
        if self._flops_per_token is None:
            if not isinstance(pl_module, Objective):
                raise UserError("Throughput counts the FLOPs of an Objective's loss: leave it out")
            flops = step_flops(pl_module, batch.to("cpu", non_blocking=False))
            self._flops_per_token = flops / int(batch.real_tokens)
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        elif self._stopped is None:
            self._waited += now - self._ended
        else:
            self._since += now - self._stopped
        self._stopped = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Add this batch; log when it is time."""
        assert self._flops_per_token is not None
        self._tokens = self._tokens + batch.real_tokens
        self._samples += len(batch.tokens)
        if not _is_due(trainer):
            self._ended = time.perf_counter()
            return
        tokens = int(self._tokens)
        flops = tokens * self._flops_per_token
        if pl_module.device.type != "cpu":
            torch.accelerator.synchronize(pl_module.device)  # so that the time below is complete
        assert self._since is not None
        seconds = time.perf_counter() - self._since
        pl_module.log_dict(
            {
                "throughput/tokens_per_s": trainer.world_size * tokens / seconds,
                "throughput/samples_per_s": trainer.world_size * self._samples / seconds,
                "throughput/utilization": flops / seconds / self._peak,
                "throughput/data_wait": self._waited / seconds,
            },
            prog_bar=True,
            batch_size=1,
        )
        self._clear()
        self._since = self._ended = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next batch: other callbacks may still draw or save."""
        self._stopped = time.perf_counter()


# --- Pictures -------------------------------------------------------------------------------------


class SampleImages(Callback):
    """Shows validation pictures with question, prediction and truth in TensorBoard.

    Args:
        count: how many: the first samples of the validation split, one question each.
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the model, and draw."""
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        data: Any = getattr(trainer, "datamodule", None)
        shown = boards and isinstance(data, VQAData) and trainer.is_global_zero
        if trainer.sanity_checking or not shown:
            return
        samples = [data.task.sample("val", index) for index in range(self.count)]
        asked = [(s.images, s.questions[i % len(s.questions)]) for i, s in enumerate(samples)]
        prompts = [Prompt.ask(question.text, images) for images, question in asked]
        driven: Any = pl_module
        with trainer.precision_plugin.forward_context():
            replies = driven.model.generate(prompts, max_tokens=16)
        pictures = [
            np.asarray(captioned(images, question, reply))
            for (images, question), reply in zip(asked, replies, strict=True)
        ]
        for board in boards:
            board.experiment.add_images(
                "val/samples", np.stack(pictures), trainer.global_step, dataformats="NHWC"
            )


def captioned(images: Sequence[PILImage.Image], question: Question, reply: str) -> PILImage.Image:
    """The images in a row and, below them, question, reply and truth: always 256 x 332 pixels.

    The reply is green where it is right and red where it is wrong.
    """
    picture = PILImage.new("RGB", (256, 332), "white")
    width = 256 // len(images)
    for place, image in enumerate(images):
        # A box filter keeps the pixels of small images apart and averages those of large ones.
        fitted = ImageOps.pad(image.convert("RGB"), (width, 256), PILImage.Resampling.BOX)
        picture.paste(fitted, (place * width, 0))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    color = "green" if reply.casefold() == question.answer.casefold() else "red"
    lines = [(line, "black") for line in textwrap.wrap(question.text, 40, max_lines=3)]
    lines += [(f"says {reply}", color), (f"truth {question.answer}", "gray")]
    for row, (line, ink) in enumerate(lines):
        pen.text((2, 256 + 15 * row), line, fill=ink, font=font)
    return picture


# --- Progress -------------------------------------------------------------------------------------


class Progress(ProgressBar):
    """A progress bar with loss, accuracy, speed and remaining time, on the standard error.

    Where that is no terminal (a file, a batch system), a line of the same now and then.

    Args:
        seconds: between two such lines.
    """

    figures: Mapping[str, str] = {
        "train/loss": "loss {:.3f}",
        "train/accuracy": "accuracy {:.3f}",
        "val/accuracy": "val {:.3f}",
        "throughput/tokens_per_s": "{:,.0f} tokens/s",
        "throughput/utilization": "{:.0%} of peak",
    }

    def __init__(self, seconds: float = 15.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._bar: RichProgress | None = None
        self._told = 0.0

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._told = time.monotonic()
        self._start = self._told, trainer.global_step
        console = Console(stderr=True)
        if self._enabled and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = RichProgress(
                *columns, TextColumn("{task.description}"), console=console, refresh_per_second=2
            )
            total = None if trainer.max_steps == -1 else trainer.max_steps
            self._bar.add_task("", total=total, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Show the step, and now and then the figures: reading them waits for the device."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step)
        if now - self._told > (self.seconds if self._bar is None else 0.5):
            self._told = now
            self._tell(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new figures with the next step."""
        self._told = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last state."""
        self._tell(trainer)
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _tell(self, trainer: Trainer) -> None:
        known: dict[str, Any] = {**trainer.callback_metrics, **trainer.progress_bar_metrics}
        shown = [f.format(float(known[key])) for key, f in self.figures.items() if key in known]
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description="  ".join(shown))
        elif self._enabled:
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            print(step, *shown, self._left(trainer), sep="  ", file=sys.stderr, flush=True)

    def _left(self, trainer: Trainer) -> str:
        began, first = self._start
        pace = (time.monotonic() - began) / max(1, trainer.global_step - first)
        left = pace * (trainer.max_steps - trainer.global_step)
        return f"{left // 60:.0f} min {left % 60:02.0f} s left"


def _is_due(trainer: Any) -> bool:
    """Whether this batch ends a step after which the Trainer logs."""
    updated = not trainer.fit_loop._should_accumulate()
    return updated and trainer.global_step % trainer.log_every_n_steps == 0
