"""Cross-entropy over a large vocabulary, a chunk of tokens at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes gradients along with the loss, so that no logits outlive their chunk."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int):  # type: ignore[no-untyped-def]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros_like(labels, dtype=torch.bool)
        count = max(len(labels), 1)
        for start in range(0, len(labels), chunk):
            span = slice(start, start + chunk)
            x, y = hidden[span], labels[span]
            logits = F.linear(x, weight).float()
            correct[span] = logits.argmax(dim=-1) == y
            log_partition = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_partition.squeeze(-1) - logits.gather(-1, y[:, None]).squeeze(-1)).sum()
            if need_hidden or need_weight:
                error = logits.sub_(log_partition).exp_()
                error[torch.arange(len(y), device=y.device), y] -= 1
                error = error.div_(count).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[span] = error @ weight
                if grad_weight is not None:
                    grad_weight += error.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return total / count, correct

    @staticmethod
    def backward(ctx, gradient: Tensor, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * gradient.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * gradient).to(ctx.weight_dtype),
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``hidden [M, D] @ weight.T [D, V]`` against ``labels [M]``.

    Logits are made for ``chunk`` tokens at a time and turned into gradients at once, so memory
    grows with ``chunk * V``, not ``M * V``.

    Returns:
        The mean loss in fp32 (0 when there are no labels), and bool ``[M]``, whether the likeliest
        token was the label.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)
