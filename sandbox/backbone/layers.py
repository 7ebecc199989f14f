"""torch's linear layer and RMS norm, where a CPU can compute the same numbers faster."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.backbone import backends

FEW_ROWS = 8  # up to here a matrix product waits for its weights, not for its arithmetic
LARGE = 1 << 15  # weights from which one row is worth doubling


class Linear(nn.Linear):
    """A linear layer without bias, quick for the few rows of a decoding step on a CPU.

    With few rows the weights are read once and hardly used, and the BLAS that torch ships with
    reads them at half speed or less in the shape ``x @ W.T`` (``make bench``, section decode).
    ``W @ x.T`` is the same product in a shape that streams them, from two rows on.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        rows = x.numel() // self.in_features
        if torch.is_grad_enabled() or not 0 < rows <= FEW_ROWS or x.device.type != "cpu":
            return backends.of(x).linear(x, self.weight)
        if rows == 1 and self.weight.numel() < LARGE:
            return super().forward(x)
        flat = x.reshape(rows, -1)
        if rows == 1:
            flat = flat.expand(2, -1).contiguous()
        product = torch.mm(self.weight, flat.T).T[:rows]
        return product.reshape(*x.shape[:-1], self.out_features)


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
