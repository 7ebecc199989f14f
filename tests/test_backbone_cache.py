"""Cached decoding is the full forward pass, whatever the split and the rows' lengths."""

import pytest
import torch

from sandbox.backbone.cache import KVCache, close_up
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.errors import UserError

VOCABULARY, T = 61, 29
TOLERANCE = {"atol": 2e-5, "rtol": 0}


def backbone(chunk: int | None) -> Backbone:
    """Every feature on, weights large enough that a misplaced key shows."""
    torch.manual_seed(0)
    config = BackboneConfig(
        vocab_size=VOCABULARY,
        width=48,
        layers=5,
        heads=4,
        kv_heads=2,
        head_dim=12,
        expert_hidden=32,
        dense_hidden=40,
        moe_every=2,
        chunk=chunk,
        temperature_floor=4,
        init_std=0.2,
    )
    return Backbone(config).eval()


def logits(model: Backbone, *args, **kwargs):
    """Logits of one call, without gradient."""
    with torch.no_grad():
        return model.unembed(model(*args, **kwargs).hidden)


@pytest.mark.parametrize("chunk", [4, 8, None])
@pytest.mark.parametrize(
    "split", [[T], [1] * T, [5, 6, 1, 1, 9, 7], [8, 8, 13], [20, *[1] * 9]], ids=str
)
def test_cached_equals_full_across_chunk_boundaries(chunk, split):
    """Guards against a mask forgotten for one token, and a chunk that keeps or loses a key."""
    model = backbone(chunk)
    tokens = torch.randint(0, VOCABULARY, (2, T))
    cache = KVCache(model.config, rows=2, capacity=T, like=torch.zeros(()))
    pieces = [logits(model, piece, cache=cache) for piece in tokens.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(model, tokens), **TOLERANCE)


@pytest.mark.parametrize("chunk", [4, 8, None])
def test_ragged_rows_decode_as_if_alone(chunk):
    """Guards against padding that shifts positions or is attended to."""
    model = backbone(chunk)
    prompt, reply = (torch.randint(0, VOCABULARY, (2, n)) for n in (T, 12))
    short = 14  # in another place of its chunk than the long row
    documents = torch.zeros_like(prompt)
    documents[1, short:] = -1
    cache = KVCache(model.config, rows=2, capacity=T + 12, like=torch.zeros(()))
    model(prompt, documents=documents, cache=cache)
    decoded = torch.cat([logits(model, t, cache=cache) for t in reply.split(1, dim=1)], dim=1)
    for row, length in ((0, T), (1, short)):
        alone = torch.cat((prompt[row, :length], reply[row]))[None]
        torch.testing.assert_close(decoded[row], logits(model, alone)[0, length:], **TOLERANCE)


@pytest.mark.parametrize("chunk", [4, 8, None])
@pytest.mark.parametrize("split", [[20, *[1] * 9], [20, 9], [9, 11, *[1] * 9]], ids=str)
def test_images_are_read_in_both_directions_before_decoding(chunk, split):
    """Guards against a prompt read causally where training was not; images cross chunk borders."""
    model = backbone(chunk)
    tokens, blocks = torch.randint(0, VOCABULARY, (2, T)), torch.zeros(2, T, dtype=torch.int64)
    blocks[0, 2:9] = 3
    blocks[:, 10:19] = 11
    cache = KVCache(model.config, rows=2, capacity=T, like=torch.zeros(()))
    pieces = [
        logits(model, piece, blocks=block if block.any() else None, cache=cache)
        for piece, block in zip(tokens.split(split, 1), blocks.split(split, 1), strict=True)
    ]
    full = logits(model, tokens, blocks=blocks)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, **TOLERANCE)
    assert not torch.allclose(full[:, 10:], logits(model, tokens)[:, 10:], atol=1e-2)


def test_rows_can_leave():
    """Guards against rows mixed up when a finished reply leaves the batch."""
    model = backbone(8)
    tokens = torch.randint(0, VOCABULARY, (3, 11))
    cache = KVCache(model.config, rows=3, capacity=20, like=torch.zeros(()))
    model(tokens[:, :10], cache=cache)
    cache.select(torch.tensor([2, 0]))
    kept = tokens[[2, 0]]
    expected = logits(model, kept)[:, 10:]
    torch.testing.assert_close(logits(model, kept[:, 10:], cache=cache), expected, **TOLERANCE)


@pytest.mark.parametrize("even", [True, False])
def test_rows_that_close_up_are_the_rows_that_stay(even):
    """Guards against a row that is overwritten before it has moved, and against memory that is
    copied whole whenever a reply ends.
    """
    model = backbone(8)
    rows = 7
    tokens = torch.randint(0, VOCABULARY, (rows, 11))
    documents = torch.zeros_like(tokens)
    for row in range(0 if even else rows):
        documents[row, 4 + row :] = -1
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        cache = KVCache(model.config, rows, capacity=12, like=torch.zeros(()))
        model(tokens, documents=None if even else documents, cache=cache)
        before = [x.clone() for x in (*cache.keys, *cache.values, cache.lengths)]
        places = [x.data_ptr() for x in cache.keys]
        count = int(torch.randint(1, rows + 1, (), generator=generator))
        stay = torch.randperm(rows, generator=generator)[:count]
        kept = close_up(sorted(stay.tolist()))
        assert sorted(kept) == sorted(stay.tolist())
        cache.select(torch.tensor(kept))
        assert [x.data_ptr() for x in cache.keys] == places
        for x, y in zip((*cache.keys, *cache.values, cache.lengths), before, strict=True):
            assert x.equal(y[kept])


def test_rows_can_be_repeated():
    """Guards against copies of a row that share memory: the first to write would change all."""
    model = backbone(8)
    tokens = torch.randint(0, VOCABULARY, (2, 10))
    cache = KVCache(model.config, rows=2, capacity=20, like=torch.zeros(()))
    model(tokens, cache=cache)
    copies = torch.tensor([0, 0, 1, 1])
    cache.select(copies)
    rows = torch.cat((tokens[copies], torch.tensor([[1], [2], [1], [2]])), dim=1)
    for token in (3, 4):
        found = logits(model, rows[:, -1:], cache=cache)
        torch.testing.assert_close(found[:, 0], logits(model, rows)[:, -1], **TOLERANCE)
        rows = torch.cat((rows, torch.full((4, 1), token)), dim=1)


def test_local_layers_hold_one_chunk():
    """Guards against a cache that grows with the context on every layer."""
    config = BackboneConfig(layers=4, chunk=8, nope_every=4)
    cache = KVCache(config, rows=1, capacity=1000, like=torch.zeros(()))
    assert [keys.shape[1] for keys in cache.keys] == [8, 8, 8, 1000]


def test_overflow_names_both_numbers():
    """Guards against silent overwriting of the oldest keys."""
    model = backbone(8)
    cache = KVCache(model.config, rows=1, capacity=4, like=torch.zeros(()))
    with pytest.raises(UserError, match=r"holds 4 .* 5 are needed"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)


def test_branches_with_a_cache_are_refused():
    """Guards against branches silently seeing each other through the cache."""
    model = backbone(8)
    cache = KVCache(model.config, rows=1, capacity=4, like=torch.zeros(()))
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="branches"):
        model(tokens, branches=tokens, cache=cache)
