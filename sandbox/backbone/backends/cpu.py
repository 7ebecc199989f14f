"""Fast paths on a CPU. Attention, norms and activations are computed in fp32."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sandbox.backbone.backends.causal import plain_rows
from sandbox.backbone.backends.products import (
    grouped_mm,
    linear,
    tokens_multiple,
    visits_of,
)
from sandbox.backbone.backends.segment_attention import SegmentAttention
from sandbox.backbone.backends.segments import Plan, continued, flat_of, plan, segments
from sandbox.backbone.visibility import Visibility, cached_coordinates, visible

LOGITS = 1 << 23  # numbers that a chunk of logits may hold: 32 MB

__all__ = [
    "LOGITS",
    "attend",
    "attend_cached",
    "grouped_mm",
    "linear",
    "rms_norm",
    "scaled",
    "swiglu",
    "tokens_multiple",
    "visits_of",
]


# --- Attention ------------------------------------------------------------------------------------


@torch.compiler.disable
def attend(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, *, local: bool, chosen: Tensor | None = None
) -> Tensor:
    """See ``Backend.attend``. Rows with structure never build a mask over a whole row."""
    chunk = view.chunk if local else None
    if view.plain and chosen is None:
        return _in_fp32(partial(plain_rows, shape=view.shape, chunk=chunk), q, k, v)
    if (found := plan_of(view, chunk, q.shape[1], k.shape[1], chosen)) is not None:
        return _in_fp32(partial(_planned, found=found), q, k, v)
    keys = view.coordinates
    queries = keys if chosen is None else keys.at(chosen)
    return _in_fp32(partial(_masked, mask=visible(queries, keys, chunk)), q, k, v)


@torch.compiler.disable
def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, lengths: Tensor, *, chunk: int | None
) -> Tensor:
    """See ``Backend.attend_cached``."""
    tokens, held = flat_of(view), len(k) - len(q)
    slots = held // len(lengths)
    key = ("cached", chunk, slots)
    if key not in view.plans:
        found = continued(tokens, lengths.numpy(), slots, chunk)
        view.plans[key] = found and plan(found, tokens, q.shape[1], k.shape[1], held=held)
    made = view.plans[key]
    assert made is None or isinstance(made, Plan)
    if made is not None:
        return _in_fp32(partial(_planned, found=made), q, k, v)
    keys = cached_coordinates(view.coordinates, lengths, slots, chunk)
    return _in_fp32(partial(_masked, mask=visible(view.coordinates, keys, chunk)), q, k, v)


def _in_fp32(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in fp32 (or fp64) and back: in bf16, torch's CPU kernel is several times slower."""
    dtype = q.dtype
    with torch.autocast("cpu", enabled=False):
        if dtype.itemsize < 4:
            q, k, v = q.float(), k.float(), v.float()
        return attention(q, k, v).to(dtype)


def _planned(q: Tensor, k: Tensor, v: Tensor, found: Plan) -> Tensor:
    return SegmentAttention.apply(q, k, v, found)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention under a mask of all tokens, where coordinates have no structure."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return mixed[0].transpose(0, 1)


def plan_of(
    view: Visibility, chunk: int | None, heads: int, kv_heads: int, chosen: Tensor | None
) -> Plan | None:
    """The plan that all layers of a kind share, or None where coordinates have no structure."""
    tokens = flat_of(view)
    if chunk is not None and (not len(tokens.positions) or tokens.positions.max() < chunk):
        chunk = None  # no row reaches the edge of a chunk
    key = ("plan", chunk, chosen is None, heads, kv_heads)
    if key not in view.plans:
        found = segments(tokens, chunk)
        array: np.ndarray | None = None if chosen is None else chosen.numpy()
        view.plans[key] = found and plan(found, tokens, heads, kv_heads, array)
    made = view.plans[key]
    assert made is None or isinstance(made, Plan)
    return made


# --- Norms and activations ------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ``layers.rms_norm``; fewer passes over memory than torch composes."""
    if torch.compiler.is_compiling():
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


def swiglu(gate_up: Tensor) -> Tensor:
    """See ``Backend.swiglu``."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and gate_up.requires_grad):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Writes both gradients into one tensor, where autograd would join two.

    With s the sigmoid of the gate g, the derivative of ``g s`` is ``s (1 + g (1 - s))``.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        of_gate, of_up = both.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return both


# --- Loss -----------------------------------------------------------------------------------------


def scaled(gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """See ``Backend.scaled``.

    The head's gradient may be the largest tensor of a step: its copy is spared where the loss is
    what is minimised.
    """
    if factor == 1:
        return list(gradients)
    return [None if gradient is None else gradient * factor for gradient in gradients]
