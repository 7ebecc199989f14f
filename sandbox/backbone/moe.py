"""Feed-forward layers: dense, and a mixture of one shared and E routed experts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.layers import Linear


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``; gate and up share one matrix, gate first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


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
        """Apply expert e to rows ``ends[e - 1] .. ends[e]`` of ``x [M, D]``; ``ends`` int32 [E]."""
        gate, up = F.grouped_mm(x, self.gate_up, offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)

    def one(self, x: Tensor, expert: int) -> Tensor:
        """Apply a single expert to ``x [..., D]``.

        A view of its weights, not a copy; autograd would build a full zero gradient for each
        expert indexed this way, so it serves inference alone.
        """
        gate, up = (x @ self.gate_up[expert]).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down[expert]


@dataclass(frozen=True)
class Routing:
    """What the router of one layer did with ``M = B * T`` tokens.

    Attributes:
        layer: number of the layer.
        logits: raw router logits ``[M, E]``, with gradient.
        experts: int64 ``[M, k]``, the experts each token visits.
    """

    layer: int
    logits: Tensor
    experts: Tensor

    def load(self, chosen: Tensor | None = None) -> Tensor:
        """Visits of each expert, fp32 ``[E]``, counting only tokens in the bool mask ``[M]``."""
        experts = self.experts if chosen is None else self.experts[chosen]
        ones = torch.ones_like(experts, dtype=torch.float32).flatten()
        zeros = ones.new_zeros(self.logits.shape[-1])
        return zeros.index_add(0, experts.flatten(), ones)


class _Permute(torch.autograd.Function):
    """``x[order]`` for a permutation: its gradient is a gather too, not a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        order, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, order), None, None


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
        """Mix experts for every token of ``x [B, T, D]``."""
        flat = x.flatten(0, -2)
        logits = self.router(flat)
        chosen, gate = self._select(logits)
        if len(flat) == 1 and not torch.is_grad_enabled() and x.device.type == "cpu":
            routed = self._direct(flat, chosen, gate)
        else:
            routed = self._grouped(flat, chosen, gate)
        routed = routed.view_as(x)
        return routed if self.shared is None else routed + self.shared(x), Routing(
            self.layer, logits, chosen
        )

    def _select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their gates: ``[M, k]`` of logits ``[M, E]``."""
        scores = logits.detach()
        if self.config.balance == "bias":
            scores = scores + self.balance_bias
        chosen = scores.topk(self.config.top_k, dim=-1).indices
        if self.config.router_score == "sigmoid":
            gate = logits.gather(-1, chosen).float().sigmoid()
        else:
            gate = logits.float().softmax(dim=-1).gather(-1, chosen)
        return chosen, gate.to(logits.dtype)

    def _grouped(self, x: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
        """Sort visits by expert, one grouped matmul for all, and back: ``[M, D]``."""
        (M, D), k = x.shape, self.config.top_k
        ids, order = chosen.flatten().sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(M * k, device=x.device)
        every = torch.arange(self.config.experts, device=x.device)
        ends = torch.searchsorted(ids, every, right=True).to(torch.int32)
        visits = x if k == 1 else x.repeat_interleave(k, dim=0)
        scale = gate.reshape(M * k, 1)
        on_input = self.config.router_placement == "input"
        if on_input:
            visits = visits * scale
        out = self.experts(_Permute.apply(visits, order, inverse), ends)
        out = _Permute.apply(out, inverse, order)
        if not on_input:
            out = out * scale
        return out if k == 1 else out.view(M, k, D).sum(dim=1)

    def _direct(self, x: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
        """One token at inference: index its experts, nothing to sort."""
        on_input = self.config.router_placement == "input"
        out = torch.zeros_like(x)
        for expert, scale in zip(chosen[0].tolist(), gate[0], strict=True):
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


def balance_loss(
    routing: Routing, chosen: Tensor | None = None, load: Tensor | None = None
) -> Tensor:
    """The auxiliary loss of Switch Transformers, arXiv 2101.03961, equation 4, times 1 / k.

    1 when load and probability are even. Probabilities are the softmax of the raw logits whatever
    the gate, so that the loss never sees a score squashed twice. ``chosen`` is a bool mask ``[M]``
    of the tokens that count; ``load``, fp32 ``[E]``, replaces their visits by those of a larger
    batch that they are a part of.
    """
    logits = routing.logits if chosen is None else routing.logits[chosen]
    load = routing.load(chosen) if load is None else load
    probability = logits.float().softmax(dim=-1).mean(dim=0)
    return len(load) * (load / load.sum() * probability).sum()


def router_z_loss(routing: Routing, chosen: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router, ST-MoE, arXiv 2202.08906, equation 5."""
    logits = routing.logits if chosen is None else routing.logits[chosen]
    return logits.float().logsumexp(dim=-1).square().mean()


def max_violation(load: Tensor) -> float:
    """MaxVio of arXiv 2408.15664: (max - mean) / mean of the experts' load; 0 is even."""
    return float((load.max() - load.mean()) / load.mean().clamp(min=1e-9))
