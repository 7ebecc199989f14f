"""Counting floating-point operations: what a step takes, and what a device achieves."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from sandbox.train.objective import Objective

_ATEN = torch.ops.aten
INDEXED = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)

# --- Of a step ------------------------------------------------------------------------------------


def step_flops(objective: Objective, batch: Any) -> int:
    """FLOPs of the forward and backward pass of one training step on ``batch``.

    Counted are the matrix products and convolutions of all parts of the model, two FLOPs for each
    multiply-add; elementwise work is not. A frozen part costs no gradients of its weights and,
    where nothing that learns comes before it, no backward pass at all. The language model's head
    costs as many rows as the batch has labels, as do the last layer's queries and feed-forward
    where few tokens have one. Padding costs nothing: two batches of one task differ, so take the
    mean over a few.

    The optimizer is left out: its work depends on the weights and not on the batch, and how much it
    is (AdamW's none, Muon's Newton-Schulz products) is a choice that may itself be compared.

    The count is of what the mathematics needs, the same whichever kernel a device has (see
    ``flop_counter``), so that a budget in FLOPs is the same number of steps everywhere. The pass
    runs on shapes alone (see ``_Shapes``), in training mode and without autocast: no memory for
    weights and activations, and no time for arithmetic. It leaves no trace: gradients, modes,
    buffers, random states and what Lightning logs are as before.

    Args:
        objective: with or without a trainer; its weights may be on the meta device.
        batch: on the CPU.

    Raises:
        RuntimeError: the objective reads a number on the host that depends on weights.
    """
    modes = [(module, module.training) for module in objective.modules()]
    tensors = {
        f"objective.{name}": tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in (*objective.named_parameters(), *objective.named_buffers())
    }
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    counter = flop_counter()
    try:
        # The counter comes last: it sees each operation first, and passes it on.
        eager = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng([]), torch.enable_grad(), eager, _Shapes(), counter:
            loss = functional_call(_Loss(objective.train()), tensors, (batch,))
            torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
    return counter.get_total_flops()


class _Loss(nn.Module):
    """The loss of an objective as a module's forward pass."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Any) -> Tensor:
        """The loss on ``batch``: a scalar."""
        return self.objective.loss(batch)


class _Shapes(TorchDispatchMode):
    """Computes shapes where a tensor on the meta device takes part, and all else for real.

    Weights are on the meta device, so all that depends on them is shapes, on the meta device too.
    The batch is real: its tokens, masks and indices have values, and operations on these alone give
    values, so that shapes may depend on them (``hidden[labelled]``, ``mask.nonzero()``,
    ``int(rows.max())``). What a router chooses has none; no number of FLOPs hangs on it.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(tensor.is_meta for tensor in given):
            return func(*args, **kwargs)
        if func.overloadpacket in INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        args, kwargs = tree_map(_shape, (args, kwargs))
        return func(*args, **kwargs)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices without bool masks: what a real one picks is known, and its places stand for it."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or index.is_meta:
            found.append(index)
        else:
            found += index.nonzero(as_tuple=True)
    return found


def _shape(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def flop_counter() -> FlopCounterMode:
    """Torch's counter of FLOPs, to be entered, taught the products that it does not know.

    Those are experts (``torch._grouped_mm``), products added in place and, in torch 2.11, attention
    on a CPU. Attention is counted alike for all of torch's kernels: two products of queries and
    keys in the forward pass and four in the backward pass, over every pair of them, causally hidden
    ones included, as is customary (PaLM, arXiv 2204.02311, appendix B). So the scores that fused
    kernels compute a second time in the backward pass do not count, nor are the pairs taken off
    that they skip. In the decoder, pairs are those of a document's or branch's tokens with each
    other and of a branch with its trunk; on local layers, of those within a chunk.
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
