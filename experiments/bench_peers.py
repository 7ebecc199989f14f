"""Peers beside transformers: a sparse mixture layer that loops over its experts.

transformers' Llama 4 layer computes every expert for every token, so any ratio against it grows
with the number of experts by construction. The loop here is the fairer peer: it computes what was
routed and nothing else. It follows what torchtune's Llama 4 layer does on devices without its
grouped kernel (pytorch/torchtune at bd2a0fc, ``torchtune/modules/moe``), and is written anew:

- the router takes the sigmoid in fp32 and chooses the top k by it;
- visits are sorted by expert, and each input is multiplied by its gate;
- the counts go to the host, and a Python loop applies gate, up and down projection of each expert
  (three separate matrices) to its slice;
- the results are joined, and added onto the output of the shared expert.

There the loop indexes the stacked weights, ``weight[e]``, so that autograd writes one gradient of
the full ``[E, D, F]`` for each expert and adds them up: the backward pass grows with E squared.
``unbound`` takes the stack apart once instead, which is exact and spares that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandbox.backbone.moe import MoE


class ExpertLoop(nn.Module):
    """A sparse mixture layer on copies of the weights of ours.

    Args:
        ours: the layer to copy: gated on the input by a sigmoid, with a shared expert, unbiased.
        unbound: take the stacked weights apart once, not once an expert.
    """

    def __init__(self, ours: MoE, *, unbound: bool = False) -> None:
        super().__init__()
        config = ours.config
        assert config.router_score == "sigmoid" and config.router_placement == "input"
        assert ours.shared is not None and config.balance != "bias"
        self.top_k, self.experts, self.unbound = config.top_k, config.experts, unbound
        stacked_gate, stacked_up = ours.experts.gate_up.detach().chunk(2, dim=-1)
        shared_gate, shared_up = ours.shared.gate_up.weight.detach().chunk(2)
        self.router = _copy(ours.router.weight)
        self.gate, self.up, self.down = map(_copy, (stacked_gate, stacked_up, ours.experts.down))
        self.shared = nn.ParameterList(
            map(_copy, (shared_gate, shared_up, ours.shared.down.weight))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Mix experts for every token of ``x [B, T, D]``; as a pair, like the layers compared."""
        flat = x.flatten(0, 1)
        scores = (flat @ self.router.T).float().sigmoid().to(x.dtype)
        gates, chosen = scores.topk(self.top_k, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        visits = chosen.flatten().bincount(minlength=self.experts).tolist()
        tokens = (order // self.top_k)[:, None].expand(-1, x.shape[-1])
        routed = flat.gather(0, tokens) * gates.flatten()[order][:, None]
        mixed = self._loop(routed.split(visits))
        gate, up, down = self.shared
        shared = (F.silu(flat @ gate.T) * (flat @ up.T)) @ down.T
        return shared.scatter_add(0, tokens, mixed).view_as(x), None

    def _loop(self, slices: tuple[Tensor, ...]) -> Tensor:
        stacks = (self.gate, self.up, self.down)
        parts = zip(*(stack.unbind() for stack in stacks), strict=True) if self.unbound else None
        results = []
        for expert, visits in enumerate(slices):
            gate, up, down = next(parts) if parts else (stack[expert] for stack in stacks)
            results.append((F.silu(visits @ gate) * (visits @ up)) @ down)
        return torch.cat(results)


def _copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
