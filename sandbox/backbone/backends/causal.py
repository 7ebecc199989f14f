"""Causal attention of plain rows; on a CPU, its backward pass is a few large products a block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST = 256  # tokens from which it beats what torch does
BLOCK = 64  # queries a head that are worked on at once
SCORES = 1 << 18  # scores held at once: a megabyte, the share of a core in the cache


def plain_rows(
    q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], chunk: int | None
) -> Tensor:
    """Causal attention of B rows of T tokens, end to end: ``q [B * T, H, K]`` over ``k, v``.

    On local layers, chunks become rows of the batch.
    """
    T = shape[1]
    rows = [x.unflatten(0, shape) for x in (q, k, v)]
    if chunk is not None and chunk < T:
        # Padding comes after every true token of the last chunk, where causality hides it.
        end = (0, 0, 0, 0, 0, -T % chunk)
        rows = [F.pad(x, end).reshape(-1, chunk, *x.shape[2:]) for x in rows]
    mixed = causal_attention(*rows)
    return mixed.reshape(shape[0], -1, *q.shape[1:])[:, :T].flatten(0, 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of ``q [B, T, H, K]`` over ``k, v [B, T, G, K]``."""
    T, trains = q.shape[1], torch.is_grad_enabled() and q.requires_grad
    if trains and T >= SHORTEST and q.device.type == "cpu" and q.dtype == torch.float32:
        return _CausalAttention.apply(q, k, v)
    return forward(q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's kernel: ``[B, T, H, K]``."""
    q_heads, k_heads, v_heads = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    return F.scaled_dot_product_attention(
        q_heads, k_heads, v_heads, is_causal=True, enable_gqa=gqa
    ).transpose(1, 2)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and its gradient ``[B, T, H, K]``.

    FlashAttention's backward pass (arXiv 2205.14135, B.4). No more than a block of scores exists at
    a time; they are computed again, from q and k. The heads that share keys stand below each other
    as one tall matrix, so that a product has enough rows: torch's own kernel multiplies each head
    by itself, and takes half as long again.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    heads = H // G

    def stacked(x: Tensor) -> Tensor:  # [B, T, H or G, K] -> [B * G, heads, T, K]
        return x.transpose(1, 2).reshape(B * G, -1, T, K)

    def unstacked(x: Tensor) -> Tensor:
        return x.view(B, -1, T, K).transpose(1, 2)

    # The mean of dP under P is known beforehand, from the output.
    mean = (gradient * out).sum(dim=-1).mT.reshape(B * G, heads, T, 1)
    q, gradient = stacked(q * K**-0.5), stacked(gradient)
    k, v = stacked(k).squeeze(1), stacked(v).squeeze(1)
    of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    future = torch.full((BLOCK, BLOCK), -torch.inf).triu(1)
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        size = end - start
        rows = max(1, SCORES // (heads * size * end))
        for first in range(0, B * G, rows):
            part = slice(first, first + rows)
            block_q, block_gradient, block_mean = (
                x[part, :, start:end].flatten(1, 2) for x in (q, gradient, mean)
            )
            past_k, past_v = k[part, :end], v[part, :end]
            scores = torch.bmm(block_q, past_k.mT)
            scores.unflatten(1, (heads, size))[..., start:] += future[:size, :size]
            weights = scores.softmax(dim=-1)
            of_v[part, :end].baddbmm_(weights.mT, block_gradient)
            of_scores = torch.baddbmm(block_mean, block_gradient, past_v.mT, beta=-1)
            of_scores *= weights
            of_q[part, :, start:end] = torch.bmm(of_scores, past_k).unflatten(1, (heads, size))
            of_k[part, :end].baddbmm_(of_scores.mT, block_q)
    return unstacked(of_q.mul_(K**-0.5)), unstacked(of_k), unstacked(of_v)


class _CausalAttention(torch.autograd.Function):
    """Torch's forward pass, and ``backward``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = forward(q, k, v)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        return backward(q, k, v, out, gradient)
