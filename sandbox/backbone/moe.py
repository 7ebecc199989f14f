"""Feed-forward layers: dense, and a mixture of one shared and E routed experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sandbox.backbone import backends
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.layers import Linear, compute_dtype, without_autocast


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``; gate and up share one matrix, gate first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        return self.down(backends.of(x).swiglu(self.gate_up(x)))


class Experts(nn.Module):
    """E SwiGLU experts in two stacked tensors, applied as ``x @ W``.

    ``gate_up [E, D, 2F]`` (gate first) and ``down [E, F, D]``, the layout of transformers'
    ``Llama4TextExperts``.
    """

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Apply expert e to rows ``ends[e - 1] .. ends[e]`` of ``x [M, D]``; ``ends`` int32 [E].

        Grouped products have no autocast rule: without a cast, experts would stay in fp32.
        """
        fast, dtype = backends.of(x), compute_dtype(x)
        x = fast.grouped_mm(x.to(dtype), self.gate_up.to(dtype), ends)
        return fast.grouped_mm(fast.swiglu(x), self.down.to(dtype), ends)

    def one(self, x: Tensor, expert: int) -> Tensor:
        """Apply a single expert to ``x [..., D]``.

        A view of its weights, not a copy; autograd would build a full zero gradient for each
        expert indexed this way, so it serves inference alone.
        """
        gate, up = (x @ self.gate_up[expert]).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down[expert]


@dataclass(frozen=True)
class Routing:
    """What the router of one layer did with M tokens; padding never reaches a router.

    Attributes:
        layer: number of the layer.
        logits: raw router logits ``[M, E]``, with gradient.
        experts: int64 ``[M, k]``, the experts each token visits.
        places: int64 ``[M]``, the place ``b * T + t`` of each token; None if they are all in order.
    """

    layer: int
    logits: Tensor
    experts: Tensor
    places: Tensor | None = None

    def load(self, weights: Tensor | None = None) -> Tensor:
        """Visits of each expert, fp32 ``[E]``; a token counts by its weight ``[M]``, or once."""
        E = self.logits.shape[-1]
        visits = torch.ones_like(self.experts, dtype=torch.float32)
        if weights is not None:
            visits = visits * weights[:, None]
        return visits.new_zeros(E).index_add(0, self.experts.flatten(), visits.flatten())


class _Gather(torch.autograd.Function):
    """``x[index]`` where ``back`` undoes it: its gradient is a gather too, not a scatter-add.

    Rows of x in ``blank`` are read by none, so their gradient is 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, blank: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, blank)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, blank = ctx.saved_tensors
        of_x = gradient.index_select(0, back)
        return (of_x if blank is None else of_x.index_fill_(0, blank, 0)), None, None, None


class MoE(nn.Module):
    """A mixture layer as in Llama 4: one shared expert, and the top-k of E routed ones.

    Selection is by raw logits (plus the balancing bias, which never enters the gate). The gate
    multiplies each expert's input, unless configured otherwise; the shared expert is unscaled and
    nothing is renormalised. Source: Meta's reference code, ``models/llama4/moe.py``; unlike it,
    the gate keeps its gradient.
    """

    balance_bias: Tensor

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.router = Linear(config.width, config.experts)
        self.experts = Experts(config.experts, config.width, config.expert_hidden)
        self.shared = (
            FeedForward(config.width, config.expert_hidden) if config.shared_expert else None
        )
        if config.balance == "bias":
            self.register_buffer("balance_bias", torch.zeros(config.experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        """Move or convert the layer; the bias stays fp32: bf16 would swallow its small steps."""
        bias: Tensor | None = getattr(self, "balance_bias", None)
        super()._apply(fn, recurse)
        if bias is not None and self.balance_bias.dtype != bias.dtype:
            self.balance_bias = bias.to(self.balance_bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Mix experts for every token of ``x [..., D]``."""
        flat = x.flatten(0, -2)
        with without_autocast(x):  # a rounded logit may turn a choice
            logits = self.router(flat.to(self.router.weight.dtype))
        chosen, gate = self.select(logits)
        if len(flat) == 1 and not torch.is_grad_enabled() and x.device.type == "cpu":
            routed = self._direct(flat, chosen, gate)
        else:
            routed = self._grouped(flat.to(compute_dtype(flat)), chosen, gate)
        routed = routed.view_as(x)
        return routed if self.shared is None else routed + self.shared(x), Routing(
            self.layer, logits, chosen
        )

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their gates: ``[M, k]`` of logits ``[M, E]``."""
        scores = logits.detach()
        if self.config.balance == "bias":
            scores = scores + self.balance_bias  # in fp32
        chosen = scores.topk(self.config.top_k, dim=-1).indices
        if self.config.router_score == "sigmoid":
            gate = logits.gather(-1, chosen).float().sigmoid()
        else:
            gate = logits.float().softmax(dim=-1).gather(-1, chosen)
        return chosen, gate

    def _grouped(self, x: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
        """Sort visits by expert, one grouped matmul for all, and back: ``[M, D]``."""
        (M, D), k = x.shape, self.config.top_k
        visits_of = backends.of(x).visits_of
        order, rows, ends, blank = visits_of(chosen, self.config.experts, x.dtype)
        visits = x if k == 1 else x.repeat_interleave(k, dim=0)
        scale = gate.reshape(M * k, 1).to(x.dtype)
        on_input = self.config.router_placement == "input"
        if on_input:
            visits = visits * scale
        out = self.experts(_Gather.apply(visits, order, rows, None), ends)
        out = _Gather.apply(out, rows, order, blank)
        if not on_input:
            out = out * scale
        return out if k == 1 else out.view(M, k, D).sum(dim=1)

    def _direct(self, x: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
        """One token at inference: index its experts, nothing to sort."""
        on_input = self.config.router_placement == "input"
        out = torch.zeros_like(x)
        for expert, scale in zip(chosen[0].tolist(), gate[0].to(x.dtype), strict=True):
            y = self.experts.one(x * scale if on_input else x, expert)
            out += y if on_input else y * scale
        return out

    @torch.no_grad()
    def nudge(self, load: Tensor) -> None:
        """Move the selection bias one step towards even load (fp32 ``[E]``, visits of one step).

        The bias keeps a mean of zero: only differences choose, and the mean would drift where more
        experts are short of tokens than have too many.

        Source: auxiliary-loss-free balancing, arXiv 2408.15664, algorithm 1; the centring is
        torchtitan's (pull request 1506).
        """
        self.balance_bias += self.config.balance_rate * torch.sign(load.mean() - load)
        self.balance_bias -= self.balance_bias.mean()


def balance_loss(routing: Routing, load: Tensor | None = None) -> Tensor:
    """The auxiliary loss of Switch Transformers, arXiv 2101.03961, equation 4, times 1 / k.

    1 when load and probability are even. Probabilities are the softmax of the raw logits whatever
    the gate, so that the loss never sees a score squashed twice. ``load``, fp32 ``[E]``, replaces
    the visits of these tokens by those of a larger batch that they are a part of.
    """
    load = routing.load() if load is None else load
    probability = _mean(routing.logits.float().softmax(dim=-1))
    return len(load) * (load / load.sum().clamp(min=1) * probability).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean squared log-partition of the router, ST-MoE, arXiv 2202.08906, equation 5."""
    return _mean(routing.logits.float().logsumexp(dim=-1).square())


def _mean(x: Tensor) -> Tensor:
    """The mean over tokens ``[M, ...]``; 0 where there are none."""
    return x.sum(dim=0) / max(len(x), 1)


def max_violation(load: Tensor) -> float:
    """MaxVio of arXiv 2408.15664: (max - mean) / mean of the experts' load; 0 is even."""
    return float((load.max() - load.mean()) / load.mean().clamp(min=1e-9))
