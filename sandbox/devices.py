"""One way to choose where a checkpoint runs and in which precision.

Precisions have Lightning's names. Light: torch is imported when a device is chosen. What a Trainer
runs is placed by its own keys, ``trainer.accelerator``, ``devices`` and ``precision``.
"""

import argparse
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sandbox.errors import UserError

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")

AUTO = "auto"
PRECISIONS = (AUTO, "32-true", "bf16-mixed", "bf16-true")
AMPERE = (8, 0)  # compute capability of the first CUDA devices that multiply in bf16
BF16_MACOS = (14, 0)  # the first macOS whose MPS has bf16


@dataclass(frozen=True)
class Placement:
    """A device and a precision, as chosen.

    Attributes:
        device: where the weights are.
        precision: ``auto`` (the dtype of the weights), ``32-true``, ``bf16-mixed`` (autocast over
            the dtype of the weights) or ``bf16-true``.
    """

    device: "torch.device"
    precision: str = AUTO

    def place(self, model: Model) -> Model:
        """Move ``model`` to the device, in place; ``*-true`` also casts its weights."""
        import torch

        dtypes = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
        return model.to(self.device, dtypes.get(self.precision))

    def context(self) -> AbstractContextManager[object]:
        """A context for every forward pass: autocast under ``bf16-mixed``."""
        if self.precision != "bf16-mixed":
            return nullcontext()
        import torch

        return torch.autocast(self.device.type, torch.bfloat16)


def choose(device: str = AUTO, precision: str = AUTO) -> Placement:
    """A device that exists, and a precision that it can compute in.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto``: CUDA if there is one, else the
            CPU. ``cuda`` is the current CUDA device.
        precision: one of ``PRECISIONS``; ``auto`` keeps the dtype of the checkpoint.

    Raises:
        UserError: there is no such device here, or it cannot compute in that precision.
    """
    import torch

    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: must be one of {', '.join(PRECISIONS)}")
    existing = available()
    if device == AUTO:
        device = "cuda" if "cuda:0" in existing else "cpu"
    named = "cuda:0" if device == "cuda" else device
    if named not in existing:
        here = ", ".join(existing)
        raise UserError(f"--device {device}: there is no such device; here are {here}")
    placement = Placement(torch.device(device), precision)
    if lack := _lacks_bf16(placement.device) if precision.startswith("bf16") else "":
        raise UserError(f"--precision {precision}: {device} {lack}; use 32-true or auto")
    return placement


def available() -> list[str]:
    """The names of the devices that torch can use here: ``cpu``, ``cuda:0``, ..., ``mps``."""
    import torch

    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def slow_bf16_mixed() -> bool:
    """Whether autocast to bf16 would slow training down here: an x86 CPU that has to emulate bf16.

    With AVX512-BF16 (AMD EPYC, one thread) a step of ``quickstart.yaml`` was 1.11 times as fast as
    in fp32, and one of the benchmark's mixture of 16 experts 1.50 times (experiments/LOG.md).
    """
    import torch

    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    asked = [getattr(torch.cpu, name, None) for name in names]  # private: they may go
    return all(ask is not None and not ask() for ask in asked)


def _lacks_bf16(device: "torch.device") -> str:
    """Why a device does not compute in bf16; empty if it does."""
    import torch

    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < AMPERE:
            return f"has compute capability {capability[0]}.{capability[1]}, and bf16 needs 8.0"
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(*BF16_MACOS):
        return f"needs macOS {BF16_MACOS[0]} for bf16"
    return ""


def add_placement(command: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--precision`` to a command; see ``choose``."""
    command.add_argument(
        "--device",
        default=AUTO,
        help="cpu, cuda, cuda:1 or mps (default: auto, CUDA if there is one, else the CPU)",
    )
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=AUTO,
        help="default: auto, the dtype of the checkpoint",
    )
