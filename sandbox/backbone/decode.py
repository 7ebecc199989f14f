"""The decoding step: one token a row through the cache, for a CPU in fp32, in few operations.

With few rows a step waits for its weights and for the dispatch of operations, not for arithmetic.
``Decoder`` therefore prepares the weights once, before the first step:

- query, key and value are one matrix; shared gate, up and router another;
- matrices lie ``[in, out]``, which ``product`` streams from memory at full speed;
- the weight of a norm is folded into the matrix after it, so that a norm is a division:
  ``norm(x) @ W.T = x / size @ (sqrt(D) * weight * W).T``, ``size = hypot(|x|, sqrt(D * eps))``.

What is prepared is a copy of every matrix but the embedding and the routed experts; those lie
``[E, in, out]`` already and are read in place. A backbone whose copies would exceed ``MOST_COPIED``
bytes decodes by the ordinary forward pass, as does one on another device or in another dtype.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandbox.backbone import rope
from sandbox.backbone.cache import KVCache
from sandbox.backbone.moe import Experts, MoE
from sandbox.backbone.transformer import Backbone, Block
from sandbox.backbone.visibility import tempered

MOST_COPIED = 1 << 30  # bytes
FEW_ROWS = 8  # up to here a product waits for its weights, not for its arithmetic
LARGE = 1 << 15  # weights from which one matrix is read faster by `bags`

Step = Callable[[Tensor, KVCache, Mapping[int, nn.Module] | None, Any], Tensor]
"""Logits ``[B, V]`` of what follows ``tokens``, int64 ``[B]``, which join the cache. The other
arguments are adapters and their context, as ``Backbone.forward`` takes them."""


def decoding(backbone: Backbone) -> Step:
    """The fastest decoding step of ``backbone``, good while its weights stay as they are."""
    return Decoder(backbone) if suits(backbone) else _Ordinary(backbone)


def suits(backbone: Backbone) -> bool:
    """Whether ``Decoder`` serves this backbone: fp32 on a CPU, without gradients and hooks."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in backbone.parameters())
        and copied_bytes(backbone) <= MOST_COPIED
        and not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.layers.modules())
    )


def copied_bytes(backbone: Backbone) -> int:
    """Bytes that ``Decoder`` copies: the matrices, without embedding and routed experts."""
    matrices = [w for layer in backbone.layers for w in layer.parameters() if w.ndim == 2]
    return sum(w.numel() * w.element_size() for w in (*matrices, backbone.head.weight))


class _Ordinary:
    """The decoding step by the forward pass of the backbone, on any device and in any dtype."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __call__(
        self,
        tokens: Tensor,
        cache: KVCache,
        adapters: Mapping[int, nn.Module] | None = None,
        context: Any = None,
    ) -> Tensor:
        more = {"cache": cache, "adapters": adapters, "context": context}
        with torch.compiler.set_stance("force_eager"):  # a single token is another shape
            decoded = self.backbone(tokens[:, None], **more)
        return self.backbone.unembed(decoded.hidden[:, 0])


class Decoder:
    """The decoding step of an fp32 backbone on a CPU, with weights prepared once.

    Its logits equal those of the forward pass up to rounding.

    Args:
        backbone: its weights must not change while the decoder is in use.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.config = config = backbone.config
        self.embed = backbone.embed
        self.frequency = backbone.frequency
        self.layers = [_Layer(block) for block in backbone.layers if isinstance(block, Block)]
        self.head = _after_norm(backbone.norm, backbone.head.weight)
        self.floor = torch.tensor((config.width * config.norm_eps) ** 0.5)
        self.head_floor = torch.tensor((config.head_dim * config.norm_eps) ** 0.5)

    def __call__(
        self,
        tokens: Tensor,
        cache: KVCache,
        adapters: Mapping[int, nn.Module] | None = None,
        context: Any = None,
    ) -> Tensor:
        """Logits ``[B, V]`` of what follows ``tokens``, int64 ``[B]``, which join the cache.

        Raises:
            UserError: the rows would outgrow the cache.
        """
        slots = {kind: cache.slots(local=kind) for kind in set(cache.local)}
        turn = rope.rotation(cache.lengths[:, None], self.frequency)[:, 0]
        if self.config.qk_norm:
            turn = turn * self.config.head_dim**0.5  # the rest of the norm is a division
        temperature = tempered(self.config, cache.lengths)
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            if adapters and i in adapters:
                x = adapters[i](x[:, None], context)[:, 0]
            q, k, v = self._project(layer, x, turn, temperature)
            mixed = cache.decode(i, q, k, v, slots[cache.local[i]])
            x = x + product(mixed.flatten(1), layer.output)
            x = self._feed_forward(layer, x)
        cache.lengths += 1
        cache.longest += 1
        return product(self._normed(x), self.head)

    def _normed(self, x: Tensor) -> Tensor:
        """The RMS norm of ``x [B, D]``, up to what is folded into the next matrix."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)

    def _project(
        self, layer: "_Layer", x: Tensor, turn: Tensor, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H, K]``, keys and values ``[B, G, K]`` of ``x [B, D]``."""
        H, G, K = self.config.heads, self.config.kv_heads, self.config.head_dim
        heads = product(self._normed(x), layer.qkv).view(x.shape[0], -1, K)
        both, v = heads.split_with_sizes((H + G, G), dim=1)
        if layer.rope:
            if self.config.qk_norm:  # before the rotation, which keeps norms
                size = torch.linalg.vector_norm(both, dim=-1, keepdim=True)
                both = both / torch.hypot(size, self.head_floor)
            pairs = torch.view_as_complex(both.view(x.shape[0], H + G, -1, 2))
            both = torch.view_as_real(pairs * turn).flatten(-2)
        q, k = both.split_with_sizes((H, G), dim=1)
        if temperature is not None and not layer.rope:
            q = q * temperature
        return q, k, v

    def _feed_forward(self, layer: "_Layer", x: Tensor) -> Tensor:
        """The residual stream ``[B, D]`` after a layer's feed-forward."""
        normed = self._normed(x)
        y = product(normed, layer.first)
        if layer.moe is None:
            return x + product(_swiglu(y), layer.down)
        E, k = self.config.experts, self.config.top_k
        hidden, logits = y.split_with_sizes((y.shape[1] - E, E), dim=1)
        if layer.shared:
            x = x + product(_swiglu(hidden), layer.down)
        chosen, gate = layer.moe.select(logits)
        visits = normed * layer.norm
        if k > 1:
            visits = visits.repeat_interleave(k, dim=0)
        scale = gate.view(-1, 1)
        if self.config.router_placement == "input":
            routed = _routed(layer.moe.experts, visits * scale, chosen.flatten())
        else:
            routed = _routed(layer.moe.experts, visits, chosen.flatten()) * scale
        return x + (routed if k == 1 else routed.view(x.shape[0], k, -1).sum(dim=1))


class _Layer:
    """The prepared weights of one layer, ``[in, out]`` each."""

    def __init__(self, block: Block) -> None:
        attention, ffn = block.attention, block.ffn
        self.rope = attention.rope
        qkv = (attention.query.weight, attention.key.weight, attention.value.weight)
        self.qkv = _after_norm(block.attention_norm, *qkv)
        self.output = attention.output.weight.t().contiguous()
        self.moe = ffn if isinstance(ffn, MoE) else None
        dense = ffn.shared if isinstance(ffn, MoE) else ffn
        self.shared = dense is not None
        first = [] if dense is None else [dense.gate_up.weight]
        if isinstance(ffn, MoE):
            first.append(ffn.router.weight)
            self.norm = block.ffn_norm.weight * block.ffn_norm.weight.numel() ** 0.5
        self.first = _after_norm(block.ffn_norm, *first)
        self.down = torch.empty(0) if dense is None else dense.down.weight.t().contiguous()


def _after_norm(norm: nn.RMSNorm, *matrices: Tensor) -> Tensor:
    """Matrices ``[out, D]`` as one, ``[D, outs]``, with the weight of the norm before them."""
    scale = norm.weight * norm.weight.numel() ** 0.5
    return (torch.cat(matrices) * scale).t().contiguous()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight`` of ``x [B, in]`` and ``weight [in, out]``, for few rows by ``bags``.

    On several threads a matrix product shares its columns between them, and bags would not.
    """
    few = x.shape[0] <= FEW_ROWS  # `len` of a tensor takes as long as an operation
    if not few or weight.numel() < LARGE or torch.get_num_threads() > 1:
        return torch.mm(x, weight)
    rows, starts = _places(*x.shape)
    return torch.embedding_bag(weight, rows, starts, False, 0, False, x.flatten())[0]


def bags(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """``x[m] @ weights[ids[m]]`` of ``x [M, in]``, ``weights [E, in, out]``, ids int64 ``[M]``.

    ``embedding_bag`` sums rows of a table with given factors, which is what a row times a matrix
    is. Its kernel fetches ahead, and so reads a matrix that is not in the cache at the speed of
    memory.
    """
    M, inputs = x.shape
    rows = ids[:, None] * inputs + _places(1, inputs)[0]
    starts = torch.arange(0, M * inputs, inputs)
    table = weights.flatten(0, 1)
    return torch.embedding_bag(table, rows.flatten(), starts, False, 0, False, x.flatten())[0]


@lru_cache(maxsize=64)
def _places(rows: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Every row of one matrix once a bag, and where the bags begin: int64 both."""
    return torch.arange(inputs).repeat(rows), torch.arange(0, rows * inputs, inputs)


def _routed(experts: Experts, x: Tensor, ids: Tensor) -> Tensor:
    """Each row of ``x [M, D]`` through the expert that ``ids``, int64 ``[M]``, gives it."""
    E = experts.gate_up.shape[0]
    if ids.shape[0] == 1:
        expert = int(ids)
        acts = _swiglu(product(x, experts.gate_up[expert]))
        return product(acts, experts.down[expert])
    if ids.shape[0] <= FEW_ROWS * E and experts.gate_up[0].numel() >= LARGE:
        return bags(_swiglu(bags(x, experts.gate_up, ids)), experts.down, ids)
    ids, order = ids.sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(E), right=True, out_int32=True)
    out = torch.empty_like(x)
    out[order] = experts(x[order], ends)
    return out


def _swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of both side by side, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
