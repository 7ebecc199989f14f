"""Decoding as Llama 4 does: transformers' greedy ids through our cache, and what to do otherwise.

In two places a reference is wrong, and both behaviours are shown: Meta decodes without a mask past
a chunk boundary, and transformers takes the attention temperature from the cache slot, not from
the token's position.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from tests.reference import (
    LOGITS,
    SCOUT_SCALING,
    TOY,
    decoder_pair,
    logits_of,
    their_greedy,
    tokens_of,
)

SCOUT = replace(TOY, rope_scaling=SCOUT_SCALING)
MAVERICK = replace(TOY, experts=6, moe_every=2, qk_norm=False)
KINDS = {"scout": SCOUT, "maverick": MAVERICK}


# --- Greedy decoding ------------------------------------------------------------------------------


@torch.no_grad()
def our_greedy(
    model: Backbone,
    prompt: Tensor,
    steps: int,
    pieces: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    cache: KVCache | None = None,
) -> list[list[int]]:
    """The ids that follow each row of ``prompt [B, T]``, through the cache one token at a time.

    The prompt is read in ``pieces``, or at once; rows of ``lengths`` are padded on the right.
    """
    B, T = prompt.shape
    cache = cache or KVCache(model.config, B, T + steps, like=model.embed.weight)
    documents = None
    if lengths is not None:
        documents = -(torch.arange(T) >= torch.tensor(lengths)[:, None]).long()
    hidden = torch.cat(
        [
            model(piece, documents=documents, cache=cache).hidden
            for piece in prompt.split(pieces or [T], dim=1)
        ],
        dim=1,
    )
    last = hidden[torch.arange(B), cache.lengths - 1]
    replies = []
    for _ in range(steps):
        replies.append(model.unembed(last).argmax(dim=-1))
        last = model(replies[-1][:, None], cache=cache).hidden[:, 0]
    return torch.stack(replies, dim=1).tolist()


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_equal_transformers_across_chunk_boundaries(kind: str, chunk: int) -> None:
    """Guards against a chunk that keeps or loses a key when decoding crosses its edge.

    Prompts end before, on and behind a boundary, and replies cross two more.
    """
    theirs, ours = decoder_pair(replace(KINDS[kind], chunk=chunk))
    steps = 2 * chunk + 3
    for length in (chunk - 1, chunk, chunk + 1, 2 * chunk + 2):
        prompt = tokens_of(1, length)
        expected = their_greedy(theirs, prompt, steps)
        assert our_greedy(ours, prompt, steps) == [expected], f"prompt of {length}"
    cache = KVCache(replace(ours.config, chunk=None), 1, length + steps, ours.embed.weight)
    without = our_greedy(ours, prompt, steps, cache=cache)
    assert without != [expected], "ids that do not depend on chunks prove little"


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_pieces_that_straddle_a_boundary(kind: str, chunk: int) -> None:
    """Guards against a second piece of the prompt that forgets the open chunk, or sees the last."""
    theirs, ours = decoder_pair(replace(KINDS[kind], chunk=chunk))
    prompt = tokens_of(1, 3 * chunk + 1)
    expected = their_greedy(theirs, prompt, chunk + 2)
    for pieces in (
        [chunk - 1, 2, 2 * chunk],
        [chunk, chunk, chunk + 1],
        [chunk + 2, 2 * chunk - 1],
        [2, 1, 3 * chunk - 2],
        [1] * (3 * chunk + 1),
    ):
        assert our_greedy(ours, prompt, chunk + 2, pieces) == [expected], pieces


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unequal_length_decode_as_transformers_does_alone(kind: str, chunk: int) -> None:
    """Guards against padding that shifts a position, a chunk or a temperature of its row."""
    theirs, ours = decoder_pair(replace(KINDS[kind], chunk=chunk))
    lengths = [chunk - 1, 2 * chunk + 2, 1, chunk]
    prompts = tokens_of(len(lengths), max(lengths))
    expected = [
        their_greedy(theirs, row[None, :length], 2 * chunk)
        for row, length in zip(prompts, lengths, strict=True)
    ]
    assert our_greedy(ours, prompts, 2 * chunk, lengths=lengths) == expected


@pytest.mark.parametrize("chunk", [4, 8])
def test_one_token_without_a_mask_fails_past_a_chunk(chunk: int) -> None:
    """Guards against Meta's decoding: a single token needs its mask as well.

    A cache that never closes a chunk is what Meta's code does with one token. From the second
    token of the second chunk on it sees too much; ours stays with the full forward pass.
    """
    theirs, ours = decoder_pair(replace(SCOUT, chunk=chunk))
    steps = 2 * chunk
    prompt = tokens_of(1, chunk - 1)
    row = torch.cat((prompt, torch.tensor([their_greedy(theirs, prompt, steps)])), dim=1)
    with torch.no_grad():
        full = theirs(row).logits
    found = {}
    for name, config in (("ours", ours.config), ("meta", replace(ours.config, chunk=None))):
        cache = KVCache(config, rows=1, capacity=row.shape[1], like=full)
        with torch.no_grad():
            pieces = [ours(piece, cache=cache).hidden for piece in row.split(1, dim=1)]
        found[name] = ours.unembed(torch.cat(pieces, dim=1))
    torch.testing.assert_close(found["ours"], full, atol=LOGITS, rtol=0)
    torch.testing.assert_close(found["meta"][:, :chunk], full[:, :chunk], atol=LOGITS, rtol=0)
    wrong = (found["meta"] - full).abs().amax(dim=(0, 2)) > 1000 * LOGITS
    assert wrong[chunk:].all()
    assert not found["meta"].argmax(-1).equal(full.argmax(-1))


# --- Padding and packing --------------------------------------------------------------------------

TEMPERED = replace(TOY, nope_every=2, temperature_floor=2, temperature_scale=1.0)
FLAT = replace(TEMPERED, temperature_scale=0.0)
PADDING, REAL = 21, 17


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two logits, in units of the tolerance."""
    return float((a - b).abs().max() / LOGITS)


@pytest.mark.parametrize("config", [TEMPERED, FLAT], ids=["temperature", "none"])
def test_padding_on_the_left_changes_their_temperature(config: BackboneConfig) -> None:
    """Guards against a temperature by cache slot: a row would answer otherwise in company.

    Two rows of 17 and 38 tokens, the first padded on the left by 21. With the temperature off,
    transformers is right too: the slot is all that is wrong there.
    """
    theirs, ours = decoder_pair(config)
    tokens = tokens_of(2, PADDING + REAL)
    alone = tokens[:1, PADDING:]
    real = torch.ones_like(tokens)
    real[0, :PADDING] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)

    padded = logits_of(ours, tokens, positions=positions, documents=real - 1)
    assert apart(padded[:1, PADDING:], logits_of(ours, alone)) < 1
    assert apart(padded[1:], logits_of(ours, tokens[1:])) < 1
    # Padded on the right instead, the same row gives the same once more.
    turned = torch.stack((tokens[0].roll(-PADDING), tokens[1]))
    right = logits_of(ours, turned, documents=torch.stack((real[0].flip(0), real[1])) - 1)
    assert apart(right[:1, :REAL], padded[:1, PADDING:]) < 1

    with torch.no_grad():
        expected = theirs(alone).logits
        in_company = theirs(tokens, attention_mask=real, position_ids=positions, use_cache=False)
    assert apart(logits_of(ours, alone), expected) < 1
    difference = apart(in_company.logits[:1, PADDING:], expected)
    assert difference > 1000 if config is TEMPERED else difference < 1


@pytest.mark.parametrize("config", [TEMPERED, FLAT], ids=["temperature", "none"])
@pytest.mark.parametrize("first", [8, 11])
def test_packing_changes_their_temperature(config: BackboneConfig, first: int) -> None:
    """Guards against a temperature by place in the row: a packed document keeps its own positions.

    A document of 17 tokens behind one of 8 or 11, a whole number of chunks or not.
    """
    theirs, ours = decoder_pair(config)
    tokens = tokens_of(1, first + REAL)
    documents = (torch.arange(first + REAL) >= first).long()[None]
    positions = torch.cat((torch.arange(first), torch.arange(REAL)))[None]
    packed = logits_of(ours, tokens, positions=positions, documents=documents)
    with torch.no_grad():
        their_packed = theirs(tokens, position_ids=positions, use_cache=False).logits
        expected = theirs(tokens[:, first:]).logits
    assert apart(packed[:, first:], expected) < 1
    difference = apart(their_packed[:, first:], expected)
    assert difference > 1000 if config is TEMPERED else difference < 1


def test_their_generate_answers_otherwise_in_company() -> None:
    """Guards against batched replies that depend on the batch: theirs do, by the temperature."""
    theirs, ours = decoder_pair(TEMPERED)
    tokens = tokens_of(2, PADDING + REAL)
    alone = tokens[:1, PADDING:]
    real = torch.ones_like(tokens)
    real[0, :PADDING] = 0
    in_company = theirs.generate(
        tokens, attention_mask=real, max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, tokens.shape[1] :].tolist()
    expected = their_greedy(theirs, alone, 12)
    assert in_company != expected
    turned = torch.stack((tokens[0].roll(-PADDING), tokens[1]))
    assert our_greedy(ours, turned, 12, lengths=[REAL, PADDING + REAL])[0] == expected
