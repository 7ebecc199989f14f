"""Encoder, fusion and backbone together: text, images, packing, decoding."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.cache import KVCache
from sandbox.backbone.config import BackboneConfig
from sandbox.data.batch import collate, pack
from sandbox.data.prompt import Image, Prompt, Turn, Video
from sandbox.data.task import Question, Sample
from sandbox.errors import UserError
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer


def picture(seed: int, size: int = 16) -> PILImage.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def build(bidirectional: bool = False, max_tiles: int = 1, **changes) -> VisionLanguageModel:
    """A small model whose chunk (8) is shorter than any prompt with an image."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load()
    config = BackboneConfig(
        **{"vocab_size": tokenizer.vocab_size, "width": 32, "head_dim": 16, "heads": 2, "chunk": 8}
        | changes
    )
    encoder = Patches(tile_size=16, patch_size=4, width=24)
    fusion = partial(EarlyFusion, bidirectional=bidirectional)
    return VisionLanguageModel(encoder, fusion, config, tokenizer, max_tiles=max_tiles).eval()


both_directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])


@both_directions
def test_text_alone_is_the_bare_backbone_to_the_bit(bidirectional):
    """Guards against a multimodal detour that changes the language model's text behaviour."""
    model = build(bidirectional)
    batch = collate([model.prompts.encode(Prompt.ask("How many bars are there?"), reply=True)])
    bare = model.backbone(batch.tokens)
    output = model(batch)
    assert output.hidden.equal(bare.hidden)
    assert output.logits.equal(model.backbone.unembed(bare.hidden))


def test_every_parameter_gets_a_gradient():
    """Guards against a part that training never reaches."""
    model = build()
    questions = tuple(Question(f"question {i}?", str(i), "count") for i in range(8))
    samples = [Sample((picture(i),), questions, str(i)) for i in range(8)]
    model(collate([model.prompts.encode_sample(s, loss="text") for s in samples])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_several_images_anywhere_are_read_in_order():
    """Guards against features that land on another image's placeholders."""
    model = build(chunk=None)
    a, b = picture(1), picture(2)
    prompts = [
        Prompt([Turn("user", ["first ", Image(x), " then ", Image(y), " what changed?"])])
        for x, y in ((a, b), (b, a), (a, a))
    ]
    batch = collate([model.prompts.encode(p) for p in prompts])
    fused = model.fuse(batch).embeds
    n = model.fusion.tokens_per_tile
    images = [fused[row][batch.patches[row]].split(n) for row in range(3)]
    assert images[0][0].equal(images[1][1])
    assert images[0][1].equal(images[1][0])
    assert images[2][0].equal(images[2][1])
    assert not images[0][0].allclose(images[0][1], atol=1e-2)


@both_directions
@pytest.mark.parametrize("max_tiles", [1, 4])
def test_who_sees_a_later_pixel(bidirectional, max_tiles):
    """Guards against an image blind to what comes later in it, and text or images that are not."""
    model = build(bidirectional, max_tiles)

    def read(*images: PILImage.Image, question: str = " which?"):
        """Hidden states ``[T, D]``, the placeholders, and where both images begin."""
        one, two = map(Image, images)
        turn = Turn("user", ["see ", one, " and ", two, question])
        batch = collate([model.prompts.encode(Prompt([turn]))])
        starts = batch.tile_starts.unique().tolist()
        return model(batch).hidden[0].detach(), batch.patches[0], *starts

    hidden, patches, first, second = read(picture(1, 32), picture(2, 32))
    edited = picture(1, 32)
    edited.paste((255, 255, 255), (24, 24, 32, 32))  # its last corner
    changed = (read(edited, picture(2, 32))[0] - hidden).abs().amax(1) > 1e-5
    image = changed[:second][patches[:second]]
    assert image.all() if bidirectional else not image[0]
    assert image[-1]
    assert not changed[: first + 1].any()
    assert changed[second:].all()
    later = read(picture(1, 32), picture(3, 32), question=" what else?")[0]
    torch.testing.assert_close(later[:second], hidden[:second], atol=1e-5, rtol=0)


@both_directions
@pytest.mark.parametrize("step", [1, 3])
def test_cached_decoding_with_images_in_the_prefix(step, bidirectional):
    """Guards against chunk boundaries and positions that images shift, prefill and decode."""
    model = build(bidirectional)
    video = Video([picture(1), picture(2)], [0.0, 1.5])
    turn = Turn("user", ["look: ", Image(picture(3)), video, " how many bars are there in all?"])
    batch = collate([model.prompts.encode(Prompt([turn]), reply=True)])
    embeds = model.fuse(batch).embeds.detach()
    full = model.backbone(embeds=embeds).hidden
    prefill = int(batch.patches[0].nonzero().max()) + 2
    T = embeds.shape[1]
    assert 4 * model.backbone.config.chunk < T
    cache = KVCache(model.backbone.config, rows=1, capacity=T, like=embeds)
    pieces = [embeds[:, :prefill], *embeds[:, prefill:].split(step, dim=1)]
    cached = [model.backbone(embeds=piece, cache=cache).hidden for piece in pieces]
    torch.testing.assert_close(torch.cat(cached, dim=1), full, atol=1e-4, rtol=0)


def test_replies_do_not_depend_on_the_rows_beside_them():
    """Guards against padding, images or finished rows that leak into a neighbour's reply."""
    model = build()
    prompts = [
        Prompt.ask("What is the value of the red bar?", [picture(1)]),
        Prompt.ask("hi"),
        Prompt.ask("Which of the two pictures is brighter?", [picture(2), picture(3)]),
    ]
    for sampling in ({}, {"temperature": 1.0, "seed": 5}):
        together = model.generate(prompts, max_tokens=12, **sampling)
        alone = [model.generate([p], max_tokens=12, **sampling)[0] for p in prompts]
        assert together == alone
    assert model.generate([]) == []


@both_directions
def test_packed_samples_answer_as_if_alone(bidirectional):
    """Guards against packing that lets sample B see sample A, or hands it A's picture."""
    model = build(bidirectional)
    questions = (Question("red?", "yes", "a"), Question("how many?", "3", "b"))
    samples = [Sample((picture(i),), questions, str(i)) for i in range(2)]
    examples = [model.prompts.encode_sample(s) for s in samples]
    row = model(pack([examples])).hidden[0]
    start = 0
    for example in examples:
        alone = model(collate([example])).hidden[0]
        torch.testing.assert_close(row[start : start + len(example)], alone, atol=1e-4, rtol=0)
        start += len(example)


def test_vocabularies_must_agree():
    """Guards against ids beyond the embedding, an index error deep in torch."""
    with pytest.raises(UserError, match=r"tokenizer has \d+ tokens but backbone.vocab_size is 77"):
        build(vocab_size=77)


def test_placeholders_without_images_are_refused():
    """Guards against placeholder embeddings silently standing in for pictures."""
    model = build()
    example = model.prompts.encode(Prompt.ask("what?", [picture(1)]))
    object.__setattr__(example, "tiles", example.tiles[:0])
    with pytest.raises(UserError, match="placeholders but no image"):
        model(collate([example], name="batch 7"))


def test_balancing_parts_join_the_loss():
    """Guards against a balancing loss that is logged but never minimised."""
    model = build(balance="loss", balance_rate=0.5, router_z_loss=0.25)
    batch = collate([model.prompts.encode(Prompt.ask("a b c"), loss="text")])
    output = model(batch)
    expected = (
        output.parts["text"] + 0.5 * output.parts["balance"] + 0.25 * output.parts["router_z"]
    )
    torch.testing.assert_close(output.loss, expected)
    plain = torch.autograd.grad(
        output.parts["text"], model.backbone.layers[0].ffn.router.weight, retain_graph=True
    )[0]
    full = torch.autograd.grad(output.loss, model.backbone.layers[0].ffn.router.weight)[0]
    assert not plain.allclose(full)
