"""Shapes alone, on the meta device: what a step would cost, counted without running it.

Coordinates of tokens are real there, and decide how many pairs of queries and keys attention
multiplies, whichever kernel a device has.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from sandbox.backbone.backends.cuda import LOGITS as LOGITS
from sandbox.backbone.backends.cuda import attend_cached as attend_cached
from sandbox.backbone.backends.cuda import linear as linear
from sandbox.backbone.backends.cuda import rms_norm as rms_norm
from sandbox.backbone.backends.cuda import scaled as scaled
from sandbox.backbone.backends.cuda import swiglu as swiglu
from sandbox.backbone.backends.cuda import tokens_multiple as tokens_multiple
from sandbox.backbone.backends.cuda import visits_of as visits_of
from sandbox.backbone.backends.segments import flat_of, segments
from sandbox.backbone.visibility import Visibility


def attend(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, *, local: bool, chosen: Tensor | None = None
) -> Tensor:
    """Attention of a shape that multiplies as many pairs as the segments of the batch have."""
    # Without blocks, whose runs are cut into pieces: the hidden half of their pairs counts, too.
    tokens = flat_of(view)
    tokens = tokens._replace(blocks=np.zeros_like(tokens.blocks))
    found = segments(tokens, view.chunk if local else None)
    if found is None:
        pairs = len(q) * len(k)
    else:
        keys = found.length + found.prefixed
        queries = found.length
        if chosen is not None:
            places = chosen.numpy()
            first = np.searchsorted(places, found.start)
            queries = np.searchsorted(places, found.start + found.length) - first
        pairs = int((queries * keys).sum())
    one = (x.sum(0, keepdim=True).transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, 1, K]
    queries_of, keys_of, values_of = one
    mixed = F.scaled_dot_product_attention(
        queries_of.expand(-1, -1, pairs, -1),
        keys_of,
        values_of,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return mixed[0].transpose(0, 1).sum(0, keepdim=True).expand_as(q)


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """As many products as ``Backend.grouped_mm``, which torch 2.11 infers in bf16 alone."""
    return x @ weights.sum(0)
