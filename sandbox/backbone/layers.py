"""A linear layer without bias, and torch's RMS norm in fewer passes over memory on a CPU."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.backbone import backends


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        return backends.of(x).linear(x, self.weight)


class RMSNorm(nn.RMSNorm):
    """RMS norm over the last axis, with fewer passes over memory on a CPU than torch composes."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        return rms_norm(x, self.weight, self.epsilon)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, times ``weight``; computed in fp32."""
    return backends.of(x).rms_norm(x, weight, eps)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of ``x`` are computed in: autocast's, or its own."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products of tensors like ``x`` keep their dtype."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()
