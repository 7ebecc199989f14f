"""Counting floating-point operations: what a device achieves, and what torch does not count."""

import time
from typing import Any

import torch


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


def grouped_mm_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of ``torch._grouped_mm``, which torch's own counter does not know.

    Groups split the rows of a (``[M, K] x [E, K, N]``, forward) or the contraction
    (``[K, M] x [M, N]``, the weights' gradient), so every row is multiplied once.
    """
    return 2 * a[-2] * a[-1] * b[-1]
