"""Decoding: rows that keep to themselves, sampling, stopping, and text that arrives in pieces."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor, nn

from encoders.patches import Patches
from fusion.base import Fused
from fusion.early import EarlyFusion
from sandbox import generate as decoding
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.data.batch import collate, pack
from sandbox.data.prompt import Prompt
from sandbox.errors import UserError
from sandbox.generate import Sampling, choose, generate_group_ids, generate_ids
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer

CHUNK = 8
GREEDY = Sampling(max_tokens=20)
SAMPLED = Sampling(max_tokens=20, temperature=1.5, top_k=40, top_p=0.95)


def config(**changes) -> BackboneConfig:
    """A backbone whose chunk every prompt outgrows, and in which every feature is on."""
    small = {"width": 32, "head_dim": 16, "heads": 2, "layers": 5, "moe_every": 2}
    longer = {"chunk": CHUNK, "temperature_floor": 4}
    return BackboneConfig(**small | longer | changes)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    """A model with random weights: its replies are babble, but its own."""
    torch.manual_seed(0)
    encoder = Patches(tile_size=16, patch_size=4, width=24)
    return VisionLanguageModel(encoder, EarlyFusion, config(), Tokenizer.load()).eval()


def picture(seed: int) -> PILImage.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


PROMPTS = [
    Prompt.ask("What is the value of the red bar?", [picture(1)]),
    Prompt.ask("hi"),
    Prompt.ask("Which of the two pictures is brighter, the first?", [picture(2), picture(3)]),
    Prompt.ask("How many bars are there, and how many of them are higher than the blue one?"),
    Prompt.ask("?", [picture(4)]),
    Prompt.ask("hi"),
    Prompt.ask("And now?"),
]


def by_full_passes(
    backbone: Backbone, prompt: Fused, sampling: Sampling, draws: Tensor
) -> list[int]:
    """One row's reply without a cache: the whole sequence is read again for every token."""
    reply: list[int] = []
    embeds, blocks = prompt.embeds[0], prompt.blocks
    with torch.no_grad():
        for draw in draws:
            hidden = backbone(embeds=embeds[None], blocks=blocks).hidden
            logits = backbone.unembed(hidden[:, -1])
            token = choose(logits, sampling, draw[None])
            if int(token) in sampling.stop_ids:
                break
            reply.append(int(token))
            embeds = torch.cat((embeds, backbone.embed(token)))
            blocks = None if blocks is None else F.pad(blocks, (0, 1))
    return reply


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_reply_does_not_depend_on_its_batch(model, sampling, size, bidirectional, monkeypatch):
    """Guards against padding, images, finished rows or random draws that reach a neighbour."""
    monkeypatch.setattr(model.fusion, "bidirectional", bidirectional)
    ends = (*range(0, model.tokenizer.vocab_size, 9), *model.tokenizer.stop_ids)
    seeds = range(5, 5 + len(PROMPTS))  # with so many ends, rows leave at all times
    sampling = Sampling(**vars(sampling) | {"stop_ids": ends, "seed": seeds})
    examples = [model.prompts.encode(prompt, reply=True) for prompt in PROMPTS]
    expected = []
    for example, draws in zip(examples, sampling.draws(len(PROMPTS)), strict=True):
        with torch.no_grad():
            prompt = model.fuse(collate([example]))
        expected.append(by_full_passes(model.backbone, prompt, sampling, draws))
    assert len({len(reply) for reply in expected}) > 3
    for start in range(0, len(examples), size):
        rows = slice(start, start + size)
        options = vars(sampling) | {"seed": seeds[rows]}
        assert model.generate_ids(collate(examples[rows]), **options) == expected[rows]
        texts = [model.tokenizer.decode(reply).strip() for reply in expected[rows]]
        assert model.generate(PROMPTS[rows], **options) == texts


def test_ids_need_no_tokenizer():
    """Guards against a decoder that cannot be compared with another for want of a vocabulary."""
    torch.manual_seed(1)
    backbone = Backbone(config(vocab_size=61)).train()
    tokens = torch.randint(0, 61, (2, 5))
    found = generate_ids(backbone, tokens, GREEDY)
    assert backbone.training
    backbone.eval()
    for row, reply in zip(tokens, found, strict=True):
        prompt = Fused(backbone.embed(row)[None])
        full = by_full_passes(backbone, prompt, GREEDY, GREEDY.draws(1)[0])
        assert reply == full
        assert len(reply) == GREEDY.max_tokens > 2 * CHUNK
    with pytest.raises(UserError, match="stop_ids"):
        generate_ids(backbone, tokens, Sampling(stop=["."]))


@pytest.mark.parametrize("stop", [(), ("e", "qu")], ids=["", "stop"])
def test_groups_are_the_replies_to_repeated_prompts(model, stop):
    """Guards against a reply behind another prompt's copy, and draws that replies share."""
    G, ends = 3, (*range(0, model.tokenizer.vocab_size, 9), *model.tokenizer.stop_ids)
    seeds = [100 * n for n in range(len(PROMPTS))]
    options = vars(SAMPLED) | {"stop_ids": ends}
    repeated = [prompt for prompt in PROMPTS for _ in range(G)]
    each = [seed + n for seed in seeds for n in range(G)]
    texts = model.generate(repeated, **options | {"seed": each, "stop": stop})
    assert len(set(texts)) > len(PROMPTS)
    assert model.generate_groups(PROMPTS, replies=G, **options | {"seed": seeds, "stop": stop}) == [
        texts[first : first + G] for first in range(0, len(texts), G)
    ]
    examples, copies = (
        collate([model.prompts.encode(prompt, reply=True) for prompt in prompts])
        for prompts in (PROMPTS, repeated)
    )
    ids = model.generate_ids(copies, **options | {"seed": each})
    assert len({len(reply) for reply in ids}) > 3
    groups = model.generate_group_ids(examples, replies=G, **options | {"seed": seeds})
    assert groups == [ids[first : first + G] for first in range(0, len(ids), G)]


def test_a_group_reads_its_prompt_once(model):
    """Guards against images that are encoded, and prompts that are read, for every reply anew."""
    read: list[tuple[int, ...]] = []
    hooks = [
        model.encoder.register_forward_hook(lambda *a: read.append(tuple(a[1][0].shape))),
        model.backbone.register_forward_pre_hook(
            lambda *a: read.append(tuple(a[2]["embeds"].shape)), with_kwargs=True
        ),
    ]
    groups = model.generate_groups(PROMPTS[:1], replies=5, temperature=1.0, max_tokens=3)
    for hook in hooks:
        hook.remove()
    assert len(groups[0]) == 5
    assert [shape[0] for shape in read] == [1, 1]


def test_groups_at_the_edges(model):
    """Guards against a group of no replies, and a division by it."""
    assert model.generate_groups([], replies=4) == []
    with pytest.raises(UserError, match="replies must be at least 1, got 0"):
        model.generate_groups(PROMPTS, replies=0)
    with pytest.raises(UserError, match="2 seeds for 3 prompts"):
        model.generate_groups(PROMPTS[:3], replies=4, seed=[1, 2])


def test_packed_rows_are_refused(model):
    """Guards against a reply that continues the padding, or one of several questions."""
    example = model.prompts.encode(PROMPTS[1])
    with pytest.raises(ValueError, match="several texts"):
        model.generate_ids(pack([[example, example]]))


class _Shift(nn.Module):
    """An adapter: adds to every token the vector that its context holds for it."""

    def forward(self, hidden: Tensor, context: "_Context") -> Tensor:
        """Add ``[B, T, D]``."""
        return hidden + context.shift


class _Context:
    """What a cross-attention context must do, on vectors ``[B, T, D]``."""

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift

    def decoding(self, last: Tensor) -> "_Context":
        """Every further token gets what the last one of the prompt had."""
        return _Context(self.shift[torch.arange(len(last)), last][:, None])

    def select(self, rows: Tensor) -> "_Context":
        """The given rows."""
        return _Context(self.shift[rows])


def test_adapters_see_their_row_in_every_step():
    """Guards against cross-attention that is dropped after the prompt, or reads another's image."""
    torch.manual_seed(2)
    backbone = Backbone(config(vocab_size=61)).eval()
    lengths, T, D = (9, 4, 6), 9, backbone.config.width
    embeds, shift = torch.randn(3, T, D), 3 * torch.randn(3, T, D)
    documents = torch.tensor([[0] * n + [-1] * (T - n) for n in lengths])
    sampling = Sampling(max_tokens=14, stop_ids=range(0, 61, 6))
    adapters = {1: _Shift(), 3: _Shift()}
    together = generate_ids(backbone, Fused(embeds, adapters, _Context(shift)), sampling, documents)
    assert len({len(reply) for reply in together}) == 3
    for row, length in enumerate(lengths):
        prompt, vectors, reply = embeds[row, :length], shift[row, :length], []
        while len(reply) < sampling.max_tokens:
            context = _Context(vectors[None])
            with torch.no_grad():
                decoded = backbone(embeds=prompt[None], adapters=adapters, context=context)
                token = backbone.unembed(decoded.hidden[:, -1]).argmax(-1)
                prompt = torch.cat((prompt, backbone.embed(token)))
            if int(token) in sampling.stop_ids:
                break
            vectors = torch.cat((vectors, vectors[-1:]))
            reply.append(int(token))
        assert together[row] == reply
    fused = Fused(embeds, adapters, _Context(shift))
    groups = generate_group_ids(backbone, fused, sampling, 2, documents)
    assert groups == [[reply, reply] for reply in together]


# --- Choosing -------------------------------------------------------------------------------------


def test_draws_become_tokens_in_proportion():
    """Guards against nucleus sampling that drops the token crossing the threshold."""
    p = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    draws = (torch.arange(2000) + 0.5) / 2000

    def shares(temperature: float = 1.0, **options) -> list[float]:
        sampling = Sampling(temperature=temperature, **options)
        tokens = choose(p.log().expand(2000, -1), sampling, draws)
        return (tokens.bincount(minlength=4) / 2000).tolist()

    assert shares() == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=1e-3)
    assert shares(top_k=2) == pytest.approx([0, 0.625, 0, 0.375], abs=1e-3)
    assert shares(top_k=9) == pytest.approx(shares(), abs=1e-3)
    assert shares(top_p=0.6) == shares(top_k=2)
    assert shares(top_p=0.9) == pytest.approx([0.158, 0.526, 0, 0.316], abs=1e-3)
    assert shares(top_p=1e-9) == [0, 1, 0, 0]
    assert shares(top_k=3, top_p=0.7) == shares(top_k=2)
    squared = p.square() / p.square().sum()
    assert shares(temperature=0.5) == pytest.approx(squared[0].tolist(), abs=1e-3)
    assert choose(p, Sampling(), draws[:1]).tolist() == [1]


def test_impossible_tokens_are_never_drawn():
    """Guards against the edges of [0, 1): the first draw, and the last below 1."""
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, [400, 600]] = 0.0
    edges = torch.tensor([0.0, 1 - 2**-24])
    for options in ({}, {"top_p": 0.999}, {"top_k": 700}):
        sampling = Sampling(temperature=1.0, **options)
        assert choose(logits, sampling, edges).tolist() == [400, 600]


def test_seeds(model):
    """Guards against equal prompts that never get different replies, and lengths that matter."""
    babble = {"max_tokens": 12, "temperature": 1.0}
    alike = model.generate([PROMPTS[1]] * 3, seed=3, **babble)
    assert len(set(alike)) == 1
    assert len(set(model.generate([PROMPTS[1]] * 3, seed=[3, 4, 5], **babble))) == 3
    assert model.generate([PROMPTS[1]], seed=4, **babble) != alike[:1]
    short, long = (Sampling(max_tokens=n, seed=7).draws(2) for n in (5, 300))
    assert long[:, :5].equal(short)
    with pytest.raises(UserError, match="2 seeds for 3 prompts"):
        model.generate(PROMPTS[:3], seed=[1, 2])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 .greedy. or more, and finite, got -0.5"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": ["a", ""]}, "stop must be free of empty strings"),
        ({"stop": "END"}, r"write \['END'\]"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(model, options, says):
    """Guards against a negative temperature that prefers the unlikeliest token, without a word."""
    with pytest.raises(UserError, match=says):
        model.stream(PROMPTS, **options)


# --- Text -----------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, *replies: list[int]) -> None:
    """Let every model say these tokens, row by row and step by step, until it is stopped."""

    def decode(*args) -> Iterator[tuple[int, int]]:
        done = args[-1]
        for step in range(max(map(len, replies))):
            for row, reply in enumerate(replies):
                if row not in done and step < len(reply):
                    yield row, reply[step]

    monkeypatch.setattr(decoding, "_decode", decode)


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text in small tokens: letter by letter, and rare characters byte by byte."""
    return [token for character in text for token in tokenizer.encode(character)]


def test_pieces_are_whole_characters_as_soon_as_they_are_complete(model, monkeypatch):
    """Guards against half a character shown as U+FFFD, and against text that comes too late."""
    ids = spelled(model.tokenizer, "é日 ok🦙!")
    assert len(ids) > 11  # several tokens a character
    scripted(monkeypatch, [*ids, model.tokenizer.eot], ids[:-3])
    pieces = list(model.stream(PROMPTS[:2]))
    assert [piece for row, piece in pieces if row == 0] == list("é日 ok🦙!")
    # The second reply ends within the llama: what there is of it is shown at the end.
    assert [piece for row, piece in pieces if row == 1] == [*"é日 ok", "\ufffd"]


@pytest.mark.parametrize("stop", [(), ("the", "\ufffd\ufffd", "ab")], ids=["", "stop"])
def test_pieces_are_the_reply(model, monkeypatch, stop):
    """Guards against text lost or repeated between pieces, whatever bytes the model babbles."""
    rng = random.Random(0)
    ids = [*range(256)] * 6 + [*range(256, model.tokenizer.vocab_size)]  # mostly single bytes
    ids = [token for token in ids if token not in model.tokenizer.stop_ids]
    replies = [rng.choices(ids, k=60) for _ in range(40)]
    scripted(monkeypatch, *replies)
    prompts = [PROMPTS[1]] * len(replies)
    texts = [""] * len(replies)
    for row, piece in model.stream(prompts, stop=stop):
        assert piece
        texts[row] += piece
    for reply, text in zip(replies, texts, strict=True):
        whole = model.tokenizer.decode(reply)
        ends = [whole.find(s) for s in stop if s in whole]
        assert text == whole[: min(ends, default=None)]
    assert model.generate(prompts, stop=stop) == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("text", "stop", "reply"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("a STOP b", ["STOP"], "a"),
        ("a STO b", ["STOP"], "a STO b"),
        ("a STSTOP b", ["STOP"], "a ST"),
        ("a STO", ["STOP"], "a STO"),
        ("abcd", ["bc", "abcd"], "a"),  # what is complete first, as if letter by letter
        ("abcd", ["abc", "bc"], ""),
        ("value", ["alu", "value"], "v"),  # even where they come in one token
        ("naïve", ["ï"], "na"),
        ("quiet", ["loud"], "quiet"),
    ],
)
def test_stop_strings_cut_the_reply(model, monkeypatch, text, stop, reply):
    """Guards against stops missed across tokens, text after them, and held text that is lost."""
    tokenizer = model.tokenizer
    for ids in (tokenizer.encode(text), spelled(tokenizer, text)):
        scripted(monkeypatch, [*ids, tokenizer.eot, *tokenizer.encode("never")])
        shown = ""
        for _, piece in model.stream(PROMPTS[:1], stop=stop):
            shown += piece
            assert reply.startswith(shown.strip())
        assert shown.strip() == reply
        assert model.generate(PROMPTS[:1], stop=stop) == [reply]


def test_stopped_rows_are_not_decoded_further(model):
    """Guards against a reply that is cut for the eye, while its row is computed to the end."""
    whole = model.generate(PROMPTS[:3], max_tokens=30)
    steps: list[int] = []
    handle = model.backbone.embed.register_forward_hook(lambda *a: steps.append(len(a[2])))
    middle = whole[0][10]
    model.generate(PROMPTS[:1], max_tokens=30, stop=[middle])
    handle.remove()
    assert len(steps) < 25


def test_the_reader_of_a_stream_is_left_alone(model):
    """Guards against inference mode that leaks between pieces: what is made there cannot train."""
    recorded: list[bool] = []
    handle = model.backbone.embed.register_forward_hook(
        lambda *_: recorded.append(torch.is_inference_mode_enabled())
    )
    model.train()
    for _ in model.stream(PROMPTS[:2], max_tokens=5):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        if len(recorded) == 3:
            break
    assert recorded == [True] * 3  # but the model itself runs in it
    assert model.training
    model.eval()
    handle.remove()


def test_decoders_that_treat_the_first_token_differently(model, monkeypatch):
    """Guards against words run together: some tokenizers join them when they decode."""
    scripted(monkeypatch, [1, 2, 3])
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: " ".join(f"w{i}" for i in ids))
    assert list(model.stream(PROMPTS[:1])) == [(0, "w1"), (0, " w2"), (0, " w3")]


def test_a_model_without_a_tokenizer_says_so(model, monkeypatch):
    """Guards against an AttributeError of None, deep in the encoding of a prompt."""
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(UserError, match="no tokenizer"):
        model.generate(PROMPTS)
