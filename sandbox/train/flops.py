"""Counting floating-point operations: what a step takes, and what a device achieves."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sandbox.backbone.backends import causal
from sandbox.train.objective import Objective

# --- Of a step ------------------------------------------------------------------------------------


def step_flops(objective: Objective, batch: Any) -> int:
    """FLOPs of the forward and backward pass of one training step on ``batch``.

    Counted are the matrix products and convolutions of all parts of the model, two FLOPs for each
    multiply-add; elementwise work is not. A frozen part costs no gradients of its weights and,
    where nothing that learns comes before it, no backward pass at all. The language model's head
    costs as many rows as the batch has labels, and padding costs like tokens: two batches of one
    task differ, so take the mean over a few.

    The optimizer is left out: its work depends on the weights and not on the batch, and how much it
    is (AdamW's none, Muon's Newton-Schulz products) is a choice that may itself be compared.

    The count is of what the mathematics needs, the same whichever kernel a device has (see
    ``flop_counter``), so that a budget in FLOPs is the same number of steps everywhere. The pass is
    really run, once, in training mode and without autocast. It leaves no trace: gradients, modes,
    buffers, random states and what Lightning logs are as before.

    Args:
        objective: with or without a trainer.
        batch: on the objective's device.
    """
    modes = [(module, module.training) for module in objective.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    trained = [p for p in objective.parameters() if p.requires_grad]
    cuda = sorted({p.device.index for p in trained if p.device.type == "cuda"})
    counter = flop_counter()
    try:
        with torch.random.fork_rng(cuda), torch.enable_grad(), _torch_attention(), counter:
            loss = objective.train().loss(batch)
            torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return counter.get_total_flops()


@contextmanager
def _torch_attention() -> Iterator[None]:
    """Attention by torch's kernels alone, whose FLOPs are known by formula."""
    shortest, causal.SHORTEST = causal.SHORTEST, sys.maxsize
    try:
        yield
    finally:
        causal.SHORTEST = shortest


def flop_counter() -> FlopCounterMode:
    """Torch's counter of FLOPs, to be entered, taught the products that it does not know.

    Those are experts (``torch._grouped_mm``), products added in place and, in torch 2.11, attention
    on a CPU. Attention is counted alike for all of torch's kernels: two products of queries and
    keys in the forward pass and four in the backward pass, over every pair of them, masked and
    causally hidden ones included, as is customary (PaLM, arXiv 2204.02311, appendix B). So the
    scores that fused kernels compute a second time in the backward pass do not count, nor are the
    pairs taken off that they skip. Local layers that are folded into chunks count the pairs within.

    The backward pass of ``backbone.causal``, for long rows on a CPU, is no kernel of torch's:
    counted is what it executes, which is five products over about half of all pairs.
    """
    aten = torch.ops.aten
    mapping: dict[Any, Any] = {aten._grouped_mm: grouped_mm_flops}
    mapping |= dict.fromkeys((aten.addmm_, aten.baddbmm_), added_product_flops)
    for kernel in ("flash", "efficient", "cudnn"):
        mapping |= _attention(f"{kernel}_attention")
    mapping |= _attention("flash_attention_for_cpu")
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _attention(kernel: str) -> dict[Any, Any]:
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")
    return {forward: attention_flops, backward: attention_backward_flops}


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of attention of ``q [B, H, Tq, K]`` over ``k, v [B, G, Tk, K]``: scores, and mixing."""
    B, H, T, K = q
    return 2 * B * H * T * k[-2] * (K + v[-1])


def attention_backward_flops(
    _: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *__: Any, **___: Any
) -> int:
    """FLOPs of the gradients of q, k, v and of the scores: two for each product of the forward."""
    return 2 * attention_flops(q, k, v)


def added_product_flops(_: torch.Size, a: torch.Size, b: torch.Size, *__: Any, **___: Any) -> int:
    """FLOPs of ``a [..., M, K] @ b [..., K, N]``, added to the first argument."""
    return 2 * math.prod(a) * b[-1]


def grouped_mm_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of ``torch._grouped_mm``.

    Groups split the rows of a (``[M, K] x [E, K, N]``, forward) or the contraction
    (``[K, M] x [M, N]``, the weights' gradient), so every row is multiplied once.
    """
    return 2 * a[-2] * a[-1] * b[-1]


# --- Of a device ----------------------------------------------------------------------------------


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of one large square matmul: the best of those that fit into ``seconds``."""
    n = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # leaves the global one alone
    a = torch.randn(n, n, device=device, generator=generator).to(dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best
