"""Rows cut into segments, for attention that never builds a mask over a whole row.

A segment is a run of queries that see a stretch of earlier keys completely (their *prefix*) and,
of their own run, what the visibility rule says. A branch is a segment whose prefix is its trunk; a
document or a trunk is a segment without one. On local layers, segments end where chunks do.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sandbox.backbone.visibility import Visibility

PIECE = 128  # queries of a blocked run that share a mask over their own keys
SLACK = 1 << 17  # scores that a group may waste on padding before it is split


class Flat(NamedTuple):
    """Coordinates of the real tokens of all rows, int64 arrays ``[M]`` in the order of the rows.

    Attributes:
        rows: the batch row of each token.
        positions, documents, branches, blocks: see ``visibility.Coordinates``.
    """

    rows: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    branches: np.ndarray
    blocks: np.ndarray


def flat_of(view: Visibility) -> Flat:
    """The coordinates of a pass on the host, kept for all of its layers."""
    if "flat" not in view.plans:
        if view.plain:  # known without the tensors, which may be without values
            B, T = view.shape
            rows, positions = (x.reshape(-1) for x in np.indices((B, T), dtype=np.int64))
            zeros = np.zeros_like(rows)
            view.plans["flat"] = Flat(rows, positions, rows, zeros, zeros)
        else:
            tensors = (view.row, *view.coordinates)
            view.plans["flat"] = Flat(*(x.cpu().numpy() for x in tensors))
    found = view.plans["flat"]
    assert isinstance(found, Flat)
    return found


class Segments(NamedTuple):
    """Segments as int64 arrays ``[S]``; places count real tokens.

    Attributes:
        start: place of the first query, which is the first of the segment's own keys, too.
        length: queries, and own keys.
        prefix: place of the first key of the prefix.
        prefixed: keys of the prefix.
    """

    start: np.ndarray
    length: np.ndarray
    prefix: np.ndarray
    prefixed: np.ndarray


def segments(tokens: Flat, chunk: int | None) -> Segments | None:
    """The segments of a batch, or None where coordinates have no such structure.

    They have it when each document of a row is one run of consecutive positions (its trunk) and
    each of its branches another run, which starts at or after the trunk's last position.

    A trunk of 3 tokens with two branches of 2 (``branches = 0 0 0 1 1 2 2``) gives, as (start,
    length, prefix, prefixed)::

        (0, 3, 0, 0)   (3, 2, 0, 3)   (5, 2, 0, 3)

    On a layer of chunks of 4, ``positions = 0 1 2 3 4 3 4``, each branch is cut once: its first
    token sees the trunk, and its second nothing but itself::

        (0, 3, 0, 0)   (3, 1, 0, 3)   (4, 1, 0, 0)   (5, 1, 0, 3)   (6, 1, 0, 0)
    """
    _, positions, documents, branches, blocks = tokens
    M = len(positions)
    if M == 0:
        return Segments(*np.zeros((4, 0), dtype=np.int64))
    edge = np.ones(M, dtype=bool)
    edge[1:] = (np.diff(documents) != 0) | (np.diff(branches) != 0)
    if (np.diff(positions)[~edge[1:]] != 1).any():
        return None
    start = np.flatnonzero(edge)
    length = np.diff(start, append=M)
    first, branch = positions[start], branches[start]
    text = np.unique(documents[start], return_inverse=True)[1]
    runs = text * (branches.max() + 1) + branch
    if len(np.unique(runs)) < len(runs):
        return None  # a document or a branch that is interrupted
    trunk = np.zeros((3, text.max() + 1), dtype=np.int64)  # start, length, first position
    on_trunk = branch == 0
    trunk[:, text[on_trunk]] = start[on_trunk], length[on_trunk], first[on_trunk]
    trunk_start, trunk_length, trunk_first = trunk[:, text]
    if ((first < trunk_first + trunk_length - 1) & ~on_trunk).any():
        return None

    last, low = first + length, trunk_first
    if chunk is not None:
        pieces = (last - 1) // chunk - first // chunk + 1
        run = np.repeat(np.arange(len(start)), pieces)
        number = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        low = (first[run] // chunk + number) * chunk
        begin, end = np.maximum(first[run], low), np.minimum(last[run], low + chunk)
        start, length = start[run] + begin - first[run], end - begin
        trunk_start, trunk_length, trunk_first = trunk[:, text[run]]
        on_trunk = on_trunk[run]
        low = np.maximum(low, trunk_first)
    prefixed = np.where(on_trunk, 0, np.maximum(trunk_first + trunk_length - low, 0))
    prefix = np.where(prefixed > 0, trunk_start + low - trunk_first, 0)
    found = Segments(start, length, prefix, prefixed)
    return _without_long_masks(found, blocks) if blocks.any() else found


def continued(tokens: Flat, lengths: np.ndarray, slots: int, chunk: int | None) -> Segments | None:
    """Segments of tokens that continue rows whose keys are held already.

    Keys are numbered row by row, ``slots`` a row, those of the tokens after them. A row holds all
    of its ``lengths [B]`` earlier tokens, or, on a layer of chunks, those of the chunk it is in.
    """
    found = segments(tokens._replace(blocks=np.zeros_like(tokens.blocks)), chunk)
    if found is None:
        return None
    row, first = tokens.rows[found.start], tokens.positions[found.start]
    low = 0 if chunk is None else first // chunk * chunk
    continues = first == lengths[row]
    prefixed = np.where(continues, np.maximum(lengths[row] - low, 0), 0)
    return Segments(found.start + len(lengths) * slots, found.length, row * slots, prefixed)


def _without_long_masks(found: Segments, blocks: np.ndarray) -> Segments:
    """Cut long runs that hold blocks between blocks: what comes before a cut becomes a prefix."""
    cut: list[tuple[int, int, int, int]] = []
    for start, length, prefix, prefixed in np.stack(found, axis=1).tolist():
        own = blocks[start : start + length]
        if length <= PIECE or prefixed or not own.any():
            cut.append((start, length, prefix, prefixed))
            continue
        inside = own[1:] * (own[1:] == own[:-1])
        free = np.flatnonzero(inside == 0) + 1  # a cut before these splits no run of a block
        # A block may be interrupted by separators: no cut between its first and its last token.
        for block in np.unique(own[own > 0]):
            places = np.flatnonzero(own == block)
            free = free[(free <= places[0]) | (free > places[-1])]
        done = 0
        while done < length:
            ends = free[free >= min(done + PIECE, length)]
            end = int(ends[0]) if len(ends) else length
            cut.append((start + done, end - done, start, done))
            done = end
    return Segments(*np.array(cut, dtype=np.int64).reshape(-1, 4).T)


class Group(NamedTuple):
    """Segments of similar size, padded to one shape: S segments, Q queries, P + L keys.

    Attributes:
        queries: int64 ``[S * H * Q]``, rows of q as ``[Mq * H, K]``; of a causal group ``[S * Q]``,
            rows of ``[Mq, H * K]``.
        keys: int64 ``[S * G * (P + L)]``, rows of k and v as ``[M * G, K]``: prefix, then own; of a
            causal group ``[S * L]``, rows of ``[M, G * K]``.
        sizes: (S, Q, P, L).
        causal: whether it is causal attention without a prefix.
        own: fp32 ``[S or 1, 1, Q, L]``, 0 where a query sees an own key, else -inf.
        prefix: fp32 ``[S, 1, 1, P]``, -inf on padding; None without padding.
        real: bool ``[S, 1, Q, 1]``, False on padded queries; None without padding.
        trunks: int64 ``[S]``, the prefix (0-based) of each segment.
        trunk_rows: int64 ``[n]``, rows of k that the prefixes consist of.
        trunk_slots: int64 ``[n]``, where these rows stand in ``[R * G * P]``.
        prefixes: R, different prefixes.
    """

    queries: Tensor
    keys: Tensor
    sizes: tuple[int, int, int, int]
    causal: bool
    own: Tensor | None
    prefix: Tensor | None
    real: Tensor | None
    trunks: Tensor
    trunk_rows: Tensor
    trunk_slots: Tensor
    prefixes: int


class Plan(NamedTuple):
    """How attention over a batch is computed.

    Attributes:
        groups: padded groups of segments.
        queries: int64 ``[Mq * H]``: where the groups' outputs, laid end to end, hold each query.
        keys: int64 ``[M * G]``: the same for the gradients of own keys; a row of zeros follows.
    """

    groups: tuple[Group, ...]
    queries: Tensor
    keys: Tensor

    @property
    def pairs(self) -> int:
        """Query-key pairs that are multiplied, for each head; causal halves count whole."""
        return sum(S * Q * (P + L) for S, Q, P, L in (group.sizes for group in self.groups))

    @property
    def mask_bytes(self) -> int:
        """Memory of all masks."""
        masks = [mask for group in self.groups for mask in (group.own, group.prefix)]
        return sum(mask.numel() * mask.element_size() for mask in masks if mask is not None)


def plan(
    found: Segments,
    tokens: Flat,
    heads: int,
    kv_heads: int,
    chosen: np.ndarray | None = None,
    held: int = 0,
) -> Plan:
    """Group segments and lay out their indices.

    Args:
        found: what ``segments`` or ``continued`` gave.
        tokens: the coordinates of the ``M - held`` tokens.
        heads: H.
        kv_heads: G.
        chosen: int64 ``[Mq]``, ascending: the only tokens that are queries; None means all.
        held: keys that precede those of the tokens.
    """
    M = len(tokens.positions)
    begin, count, length = found.start - held, found.length, found.length
    if chosen is not None:
        begin = np.searchsorted(chosen, found.start)
        count = np.searchsorted(chosen, found.start + found.length) - begin
        kept = count > 0
        found, begin, count = Segments(*(x[kept] for x in found)), begin[kept], count[kept]
        length = found.length
        if not tokens.blocks.any():
            length = chosen[begin + count - 1] + 1 - found.start + held  # the last one that is seen
        begin_of = chosen
    else:
        begin_of = np.arange(M)
    groups: list[Group] = []
    of_queries = np.zeros(len(begin_of) * heads, dtype=np.int64)
    of_keys = np.full((held + M) * kv_heads, -1, dtype=np.int64)
    query_rows = key_rows = 0
    for members in _similar(count, length, found.prefixed):
        part = Segments(*(x[members] for x in found))
        spans = begin[members], count[members], length[members]
        group = _group(part, spans, begin_of, tokens, held, (heads, kv_heads), chosen is None)
        _, Q, _, L = group.sizes
        query_rows += _locate(of_queries, query_rows, spans[0], spans[1], heads, Q, group.causal)
        key_rows += _locate(of_keys, key_rows, part.start, spans[2], kv_heads, L, group.causal)
        groups.append(group)
    of_keys[of_keys < 0] = key_rows  # seen by no query of its own segment: no gradient from there
    return Plan(tuple(groups), torch.from_numpy(of_queries), torch.from_numpy(of_keys))


def _locate(
    where: np.ndarray,
    offset: int,
    start: np.ndarray,
    count: np.ndarray,
    heads: int,
    longest: int,
    causal: bool,
) -> int:
    """Write where a group's padded rows, from ``offset`` on, hold each token and head.

    Returns the number of these rows. They stand as ``[S, heads, longest]``, or, where attention is
    causal, as ``[S, longest, heads]``.
    """
    S = len(start)
    real = np.arange(longest) < count[:, None]
    places = (start[:, None] + np.arange(longest))[real]
    segment, slot = np.nonzero(real)
    head = np.arange(heads)
    if causal:
        rows = (segment * longest + slot)[:, None] * heads + head
    else:
        rows = (segment[:, None] * heads + head) * longest + slot[:, None]
    where[places[:, None] * heads + head] = offset + rows
    return S * heads * longest


def _similar(count: np.ndarray, length: np.ndarray, prefixed: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of segments that are padded to one shape without much waste."""
    keys = length + prefixed
    for kind in (prefixed == 0, prefixed > 0):
        members = np.flatnonzero(kind)
        order = members[np.lexsort((count[members], keys[members]))]
        first = area = queries = own = before = 0
        for i, segment in enumerate(order.tolist()):
            size = int(count[segment]) * int(keys[segment])
            largest = (
                max(queries, int(count[segment])),
                max(own, int(length[segment])),
                max(before, int(prefixed[segment])),
            )
            padded = (i + 1 - first) * largest[0] * (largest[1] + largest[2])
            if padded > 1.5 * (area + size) + SLACK:
                yield order[first:i]
                first, area = i, 0
                largest = int(count[segment]), int(length[segment]), int(prefixed[segment])
            queries, own, before = largest
            area += size
        if first < len(order):
            yield order[first:]


def _group(
    found: Segments,
    spans: tuple[np.ndarray, np.ndarray, np.ndarray],
    places: np.ndarray,
    tokens: Flat,
    held: int,
    heads: tuple[int, int],
    every: bool,
) -> Group:
    begin, count, length = spans
    S, Q, P, L = len(begin), int(count.max()), int(found.prefixed.max()), int(length.max())
    H, G = heads
    offset = np.arange(Q)
    real = offset < count[:, None]
    queries = np.where(real, begin[:, None] + offset, begin[:, None])
    own_real = np.arange(L) < length[:, None]
    own = np.where(own_real, found.start[:, None] + np.arange(L), found.start[:, None])
    seen = np.arange(P) < found.prefixed[:, None]
    prefix = np.where(seen, found.prefix[:, None] + np.arange(P), 0)
    keys = np.concatenate((prefix, own), axis=1)

    blocked = bool(tokens.blocks.any())
    causal = every and P == 0 and not blocked
    mask = None
    if not causal and every and not blocked:
        mask = torch.full((1, 1, Q, L), -torch.inf).triu(1)
    elif not causal:
        at, of = places[queries][..., None], own[:, None] - held
        sees = tokens.positions[of] <= tokens.positions[at]
        block = tokens.blocks[at]
        sees |= (tokens.blocks[of] == block) & (block > 0)
        sees &= own_real[:, None]
        mask = torch.zeros(S, 1, Q, L).masked_fill_(torch.from_numpy(~sees)[:, None], -torch.inf)

    starts, trunks = np.unique(
        np.stack((found.prefix, found.prefixed)), axis=1, return_inverse=True
    )
    R = starts.shape[1]
    slots = np.broadcast_to((np.arange(P) < starts[1][:, None])[:, None], (R, G, P))
    trunk_rows = (starts[0][:, None, None] + np.arange(P)) * G + np.arange(G)[:, None]
    if not causal:
        queries = queries[:, None] * H + np.arange(H)[:, None]
        keys = keys[:, None] * G + np.arange(G)[:, None]
    as_tensor = torch.from_numpy
    return Group(
        queries=as_tensor(queries.reshape(-1)),
        keys=as_tensor(keys.reshape(-1)),
        sizes=(S, Q, P, L),
        causal=causal,
        own=mask,
        prefix=None
        if seen.all()
        else torch.zeros(S, 1, 1, P).masked_fill_(as_tensor(~seen)[:, None, None], -torch.inf),
        real=None if real.all() else as_tensor(real)[:, None, :, None],
        trunks=as_tensor(trunks.reshape(-1)),
        trunk_rows=as_tensor(np.ascontiguousarray(trunk_rows[slots])),
        trunk_slots=as_tensor(np.flatnonzero(slots)),
        prefixes=R,
    )
