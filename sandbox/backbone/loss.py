"""Cross-entropy over a large vocabulary, a chunk of tokens at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sandbox.backbone import backends
from sandbox.backbone.layers import compute_dtype, without_autocast

LONGEST_CHUNK = 1024  # tokens; more would not make the matrix products faster


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes gradients along with the loss, so that no logits outlive their chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Any:
        ctx.dtypes = hidden.dtype, weight.dtype
        # Cast once, not in every chunk; the gradient of the head would not be cast at all.
        dtype = compute_dtype(hidden)
        hidden, head = hidden.to(dtype), weight.to(dtype)
        with without_autocast(hidden):
            return _ChunkedCrossEntropy._forward(ctx, hidden, head, labels, chunk)

    @staticmethod
    def _forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Any:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # Before a gradient scaler multiplies it, it may be too small for fp16.
        wide = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        grad_weight = torch.zeros_like(head, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros_like(labels, dtype=torch.bool)
        for start in range(0, len(labels), chunk):
            span = slice(start, start + chunk)
            x, y = hidden[span], labels[span]
            logits = (x @ head.T).float()
            label = logits.gather(-1, y[:, None])
            largest = logits.max(dim=-1, keepdim=True)
            correct[span] = largest.indices.squeeze(-1) == y
            error = logits.sub_(largest.values).exp_()  # in place: one buffer a chunk
            mass = error.sum(dim=-1, keepdim=True)
            total += (largest.values + mass.log() - label).sum()
            if need_hidden or need_weight:
                error /= mass
                error.scatter_add_(1, y[:, None], error.new_full((len(y), 1), -1.0))
                error = error.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[span] = error @ head
                if grad_weight is not None and grad_weight.dtype == error.dtype == x.dtype:
                    grad_weight.addmm_(error.T, x)
                elif grad_weight is not None:  # summed in fp32 over the chunks
                    grad_weight += error.T @ x
            del logits, error  # or they would live on beside those of the next chunk
        count = max(len(labels), 1)
        grads = [None if grad is None else grad.div_(count) for grad in (grad_hidden, grad_weight)]
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct)
        return total / count, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        grads = backends.of(gradient).scaled(ctx.saved_tensors, gradient)
        return (
            *(
                None if grad is None else grad.to(dtype)
                for grad, dtype in zip(grads, ctx.dtypes, strict=True)
            ),
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``hidden [M, D] @ weight.T [D, V]`` against ``labels [M]``.

    Logits are made for ``chunk`` tokens at a time and turned into gradients at once, so memory
    grows with ``chunk * V``, not ``M * V``. Without a ``chunk``, as many tokens as keep the logits
    in tens of megabytes (on a GPU, hundreds).

    Returns:
        The mean loss in fp32 (0 when there are no labels), and bool ``[M]``, whether the likeliest
        token was the label.
    """
    if chunk is None:
        chunk = min(max(backends.of(hidden).LOGITS // len(weight), 1), LONGEST_CHUNK)
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)
