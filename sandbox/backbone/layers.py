"""A linear layer without bias, and torch's RMS norm in fewer passes over memory on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


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
