"""torch's linear layer and RMS norm, where a CPU can compute the same numbers faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
            return super().forward(x)
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
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With n the normalised input, r its scale and g the gradient of n: ``r (g - n mean(g n))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed if weight is None else normed * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        product = gradient * normed
        if weight is None:
            of_weight, inner = None, gradient.clone()
            shared = product.mean(dim=-1, keepdim=True)
        else:
            of_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype)
            inner = gradient * weight
            shared = (product @ weight.to(product.dtype)).unsqueeze(-1) / product.shape[-1]
        of_x = inner.addcmul(normed, shared, value=-1).mul_(scale)
        return of_x.to(gradient.dtype), of_weight, None
