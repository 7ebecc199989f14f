"""Attention over segments on a CPU: gathers, a few batched products, and one scatter."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sandbox.backbone.backends import causal
from sandbox.backbone.backends.segments import Group, Plan

SCORES = 1 << 20  # scores held at once: 4 MB


class SegmentAttention(torch.autograd.Function):
    """Softmax attention of ``q [Mq, H, K]`` over ``k, v [M, G, K]``, as a ``Plan`` says; in fp32.

    The backward pass is that of FlashAttention (arXiv 2205.14135, B.4): scores are computed again
    from q and k, so that q, k, v and the output are all that is kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """Attend: ``[Mq, H, K]``."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        H, K = q.shape[1:]
        outputs = []
        for group in plan.groups:
            if group.causal:
                mixed = causal.forward(*_sequences(group, q, k, v))
                outputs.append(mixed.reshape(-1, K))
                continue
            mixed = q.new_empty(group.queries.numel(), K)
            for part in _parts(group, H):
                queries, keys, values = _gathered(group, part, q, k, v)
                weights = _weights(group, part, queries, keys, H)
                rows = _rows(group, part, H)
                torch.bmm(weights, values, out=mixed[rows].view(*queries.shape))
            outputs.append(mixed)
        if not outputs:  # no query
            outputs.append(q)
        out = _end_to_end(outputs).index_select(0, plan.queries).view(q.shape)
        ctx.save_for_backward(q, k, v, out)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v."""
        q, k, v, out = ctx.saved_tensors
        plan: Plan = ctx.plan
        (_, H, K), G = q.shape, k.shape[1]
        gradient = gradient.contiguous()
        mean = (gradient * out).sum(dim=-1, keepdim=True)  # of dP under P, FlashAttention's D
        of_q: list[Tensor] = []
        of_k: list[Tensor] = []
        of_v: list[Tensor] = []
        of_prefixes: list[tuple[Tensor, Tensor, Tensor]] = []
        for group in plan.groups:
            if group.causal:
                padded = _sequences(group, q, k, v, out, gradient)
                if group.real is not None:
                    padded[-1].mul_(group.real.transpose(1, 2))
                for found, into in zip(causal.backward(*padded), (of_q, of_k, of_v), strict=True):
                    into.append(found.reshape(-1, K))
                continue
            S, _, P, L = group.sizes
            into_q = q.new_empty(group.queries.numel(), K)
            into_k, into_v = (q.new_empty(S * G, P + L, K) for _ in range(2))
            for part in _parts(group, H):
                queries, keys, values = _gathered(group, part, q, k, v)
                rows = _rows(group, part, H)
                index = group.queries[rows]
                of_out = gradient.view(-1, K).index_select(0, index).view_as(queries)
                means = mean.view(-1, 1).index_select(0, index).view(*queries.shape[:2], 1)
                if group.real is not None:
                    for x in (of_out, means):
                        x.view(-1, H, group.sizes[1], x.shape[-1]).mul_(group.real[part])
                weights = _weights(group, part, queries, keys, H)
                span = slice(part.start * G, part.stop * G)
                torch.bmm(weights.mT, of_out, out=into_v[span])
                of_scores = torch.baddbmm(means, of_out, values.mT, beta=-1).mul_(weights)
                torch.bmm(of_scores, keys, out=into_q[rows].view(*queries.shape))
                torch.bmm(of_scores.mT, queries, out=into_k[span])
            of_q.append(into_q.mul_(K**-0.5))
            of_k.append(into_k[:, P:].reshape(-1, K))
            of_v.append(into_v[:, P:].reshape(-1, K))
            if P:
                of_prefixes.append(
                    (group.trunk_rows, _of_trunks(group, into_k, G), _of_trunks(group, into_v, G))
                )
        if not of_q:
            of_q.append(q)
        to_q = _end_to_end(of_q).index_select(0, plan.queries)
        nothing = q.new_zeros(1, K)
        to_k, to_v = (
            _end_to_end([*parts, nothing]).index_select(0, plan.keys) for parts in (of_k, of_v)
        )
        for index, of_trunk_k, of_trunk_v in of_prefixes:
            to_k.index_add_(0, index, of_trunk_k)
            to_v.index_add_(0, index, of_trunk_v)
        return to_q.view(q.shape), to_k.view(k.shape), to_v.view(v.shape), None


def _end_to_end(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sequences(group: Group, q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor) -> list[Tensor]:
    """The tensors of a causal group as sequences ``[S, Q, heads, K]``."""
    S, Q, _, _ = group.sizes
    index = {True: group.queries, False: group.keys}
    return [
        x.flatten(1).index_select(0, index[x is not k and x is not v]).view(S, Q, *x.shape[1:])
        for x in (q, k, v, *like_q)
    ]


def _parts(group: Group, H: int) -> list[slice]:
    """Ranges of segments whose scores are held at once."""
    S, Q, P, L = group.sizes
    rows = max(1, SCORES // (H * Q * (P + L)))
    return [slice(first, min(first + rows, S)) for first in range(0, S, rows)]


def _rows(group: Group, part: slice, heads: int) -> slice:
    """The rows of a group's queries that belong to the segments in ``part``."""
    Q = group.sizes[1]
    return slice(part.start * heads * Q, part.stop * heads * Q)


def _gathered(
    group: Group, part: slice, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries ``[S * G, H / G * Q, K]``, keys and values ``[S * G, P + L, K]`` of a part.

    The heads that share keys stand below each other as one tall matrix.
    """
    _, Q, P, L = group.sizes
    (_, H, K), G = q.shape, k.shape[1]
    index = group.keys[part.start * G * (P + L) : part.stop * G * (P + L)]
    queries = q.view(-1, K).index_select(0, group.queries[_rows(group, part, H)])
    keys, values = (x.view(-1, K).index_select(0, index).view(-1, P + L, K) for x in (k, v))
    return queries.mul_(K**-0.5).view(-1, H // G * Q, K), keys, values


def _weights(group: Group, part: slice, queries: Tensor, keys: Tensor, H: int) -> Tensor:
    """Softmax of the scores under the group's masks: ``[S * G, H / G * Q, P + L]``."""
    _, Q, P, L = group.sizes
    scores = torch.bmm(queries, keys.mT)
    by_head = scores.view(-1, H, Q, P + L)
    if group.own is not None:
        by_head[..., P:] += group.own[part] if len(group.own) > 1 else group.own
    if group.prefix is not None:
        by_head[..., :P] += group.prefix[part]
    return scores.softmax(dim=-1)


def _of_trunks(group: Group, gradient: Tensor, G: int) -> Tensor:
    """Gradients of the prefixes' keys, summed over the segments that share one: ``[n, K]``."""
    S, _, P, _ = group.sizes
    K = gradient.shape[-1]
    summed = gradient.new_zeros(group.prefixes, G * P * K)
    summed.index_add_(0, group.trunks, gradient[:, :P].reshape(S, G * P * K))
    rows = summed.view(-1, K)
    return rows if len(group.trunk_slots) == len(rows) else rows.index_select(0, group.trunk_slots)
