"""Matrix products on a CPU by the library that is faster there.

Torch multiplies fp32 matrices by Intel's MKL, which takes its AVX2 path on processors of other
vendors. oneDNN, which torch ships too, uses AVX-512 wherever it is: on an AMD EPYC with AVX-512 its
products took 0.4 to 0.6 of the time (experiments/LOG.md). But oneDNN compiles a kernel for every
new shape, which takes longer than most products: so tokens, and the visits of an expert, are padded
to multiples of ``ROWS``. The choice depends on the processor and on shapes alone, never on a
measurement, so that a resumed run computes the same bits.
"""

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sandbox.backbone.backends.visits import Visits, padded_visits, sorted_visits

ROWS = 64  # tokens and visits are padded to a multiple of this
SHAPES = 16  # oneDNN multiplies only numbers of rows that are multiples of this
SMALLEST = 1 << 20  # multiply-adds from which oneDNN's cost per call is repaid


def onednn_is_faster() -> bool:
    """Whether fp32 products run on oneDNN: AVX-512 on a processor that is not Intel's."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() != "GenuineIntel"


def _vendor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return "GenuineIntel" if "GenuineIntel" in platform.processor() else "other"
    lines = (line.split(":") for line in info.read_text().splitlines() if "vendor_id" in line)
    return next((value.strip() for _, value in lines), "other")


ONEDNN = onednn_is_faster()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a [m, k] @ b.T`` for ``b [n, k]``; both may be transposed views. No gradient."""
    if ONEDNN and a.dtype == torch.float32 and len(a) * b.numel() >= SMALLEST:
        return torch.ops.sandbox.product(a, b) if torch.compiler.is_compiling() else _onednn(a, b)
    return a @ b.T


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


# torch.compile would have the weight be a constant of its graph, were the product not its own name.
torch.library.define("sandbox::product", "(Tensor a, Tensor b) -> Tensor")
torch.library.impl("sandbox::product", "cpu", _onednn)


@torch.library.register_fake("sandbox::product")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(len(a), len(b))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x [..., k] @ weight.T`` for ``weight [n, k]``, with gradients."""
    rows = x.numel() // x.shape[-1]
    fits = rows % SHAPES == 0 and rows * weight.numel() >= SMALLEST
    fits = fits and x.dtype == weight.dtype == torch.float32
    if not (ONEDNN and fits) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight)
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = product(gradient, weight.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = product(gradient.T, x.flatten(0, -2).T)
        return of_x, of_weight


def tokens_multiple() -> int:
    """The number that real tokens are padded to a multiple of; 1 for no padding."""
    return ROWS if ONEDNN else 1


@torch.compiler.disable
def visits_of(chosen: Tensor, experts: int, dtype: torch.dtype) -> Visits:
    """See ``Backend.visits_of``."""
    multiple = visits_multiple(dtype, chosen.numel(), experts)
    return (
        sorted_visits(chosen, experts)
        if multiple == 1
        else padded_visits(chosen, experts, multiple)
    )


def visits_multiple(dtype: torch.dtype, visits: int, experts: int) -> int:
    """The number that an expert's rows are padded to a multiple of; 1 where that would add much."""
    compiled = ONEDNN if dtype == torch.float32 else dtype == torch.bfloat16
    fitting = (rows for rows in (ROWS, SHAPES) if compiled and visits >= 2 * rows * experts)
    return next(fitting, 1)


@torch.compiler.disable
def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows ``ends[e - 1] .. ends[e]`` of ``x [M, k]`` times ``weights[e] [k, n]``: ``[M, n]``."""
    padded = visits_multiple(x.dtype, len(x), len(weights)) > 1
    if ONEDNN and x.dtype == weights.dtype == torch.float32 and padded:
        return _Grouped.apply(x, weights, ends)
    return F.grouped_mm(x, weights, offs=ends)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        ctx.save_for_backward(x, weights)
        ctx.sizes = sizes
        groups = zip(x.split(sizes), weights, strict=True)
        return torch.cat([product(rows, weight.T) for rows, weight in groups])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        of_x = of_weights = None
        parts = gradient.split(ctx.sizes)
        if ctx.needs_input_grad[0]:
            groups = zip(parts, weights, strict=True)
            of_x = torch.cat([product(part, weight) for part, weight in groups])
        if ctx.needs_input_grad[1]:
            groups = zip(x.split(ctx.sizes), parts, strict=True)
            of_weights = torch.stack([product(rows.T, part.T) for rows, part in groups])
        return of_x, of_weights, None
