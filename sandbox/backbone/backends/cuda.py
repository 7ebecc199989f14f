"""Fast paths on a GPU: FlexAttention for rows with structure, SDPA's kernels for plain ones."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sandbox.backbone.backends.causal import plain_rows
from sandbox.backbone.backends.visits import Visits, sorted_visits
from sandbox.backbone.visibility import Coordinates, Visibility, cached_coordinates, sees, visible

LOGITS = 1 << 27  # numbers that a chunk of logits may hold: 512 MB
TRITON = find_spec("triton") is not None  # compiles FlexAttention
SMALLEST_HEAD = 16  # features of a head that FlexAttention takes


def attend(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, *, local: bool, chosen: Tensor | None = None
) -> Tensor:
    """See ``Backend.attend``. Block masks are built once a pass, from the rule itself."""
    chunk = view.chunk if local else None
    if view.plain and chosen is None:
        return plain_rows(q, k, v, view.shape, chunk)
    keys = view.coordinates
    queries = keys if chosen is None else keys.at(chosen)
    return _attend_by_rule(q, k, v, view, queries, keys, chunk, chosen is None)


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, lengths: Tensor, *, chunk: int | None
) -> Tensor:
    """See ``Backend.attend_cached``."""
    slots = (len(k) - len(q)) // len(lengths)
    keys = cached_coordinates(view.coordinates, lengths, slots, chunk)
    return _attend_by_rule(q, k, v, view, view.coordinates, keys, chunk, slots)


def _attend_by_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Visibility,
    queries: Coordinates,
    keys: Coordinates,
    chunk: int | None,
    kind: object,
) -> Tensor:
    """Attention of one long row of all tokens; layers of a ``kind`` and chunk share the mask."""
    key = (kind, chunk)
    if q.device.type == "cuda" and q.shape[-1] >= SMALLEST_HEAD and TRITON:
        if key not in view.plans:
            sizes = len(q), len(k)
            view.plans[key] = _compiled(create_block_mask)(
                rule(queries, keys, chunk), None, None, *sizes, device=q.device
            )
        blocks = view.plans[key]
        assert isinstance(blocks, BlockMask)
        return flex(q, k, v, blocks, compiled=True)
    if key not in view.plans:
        hidden = ~visible(queries, keys, chunk)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=hidden.device)
        view.plans[key] = mask.masked_fill_(hidden, -torch.inf)
    additive = view.plans[key]
    assert isinstance(additive, Tensor)
    return masked(q, k, v, additive)


def rule(queries: Coordinates, keys: Coordinates, chunk: int | None) -> Any:
    """The visibility rule as a ``mask_mod`` of FlexAttention."""

    def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(queries.at(query), keys.at(key), chunk)

    return mask


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, compiled: bool) -> Tensor:
    """FlexAttention of ``q [Mq, H, K]`` over ``k, v [M, G, K]``, as one row of all tokens."""
    kernel = _compiled(flex_attention) if compiled else flex_attention
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return kernel(*heads, block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)


@cache
def _compiled(function: Any) -> Any:
    # The number of tokens is another in each batch: compile once for all.
    return torch.compile(function, dynamic=True)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention under a mask ``[Mq, M]``; repeated heads keep the memory-efficient kernel."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ``layers.rms_norm``."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """See ``Backend.swiglu``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See ``Backend.linear``."""
    return F.linear(x, weight)


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """See ``Backend.grouped_mm``."""
    return F.grouped_mm(x, weights, offs=ends)


def scaled(gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """See ``Backend.scaled``. To ask whether the factor is 1 would make the host wait."""
    return [None if gradient is None else gradient * factor for gradient in gradients]


def tokens_multiple() -> int:
    """See ``Backend.tokens_multiple``: kernels of a GPU take any number."""
    return 1


def visits_of(chosen: Tensor, experts: int, dtype: torch.dtype) -> Visits:
    """See ``Backend.visits_of``: group sizes need no alignment in bf16 and fp32."""
    return sorted_visits(chosen, experts)
