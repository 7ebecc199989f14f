"""The whole model is Llama 4: tower, adapter and decoder against transformers, at toy width.

The decoder alone, and the table of Llama 4's traps, are in ``test_backbone_parity.py``.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig
from transformers.models.llama4.processing_llama4 import Llama4Processor

from encoders.llama4_vit import Llama4Vision
from fusion.early import EarlyFusion
from fusion.layout import IMAGE_END, IMAGE_START, PATCH
from sandbox.data.batch import IGNORE, Batch, collate
from sandbox.data.prompt import Image, Prompt, Turn, Video
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer, llama4_specials
from tests.reference import (
    LOGITS,
    LOSS,
    SCOUT_SCALING,
    TOY,
    assert_same_gradients,
    decoder_weights,
    gradients,
    randomize,
    text_config,
    their_greedy,
)

TILE, ADAPTER = 24, 40
# Their adapter's input is as wide as the tower's MLP: four times its width, as a 2 x 2 square is.
TOWER = {"width": 48, "layers": 4, "heads": 3, "hidden": 4 * 48}
TOKENIZER = Tokenizer.load()
SCOUT = replace(TOY, vocab_size=TOKENIZER.vocab_size, rope_scaling=SCOUT_SCALING)
MAVERICK = replace(SCOUT, rope_scaling=None, qk_norm=False, moe_every=2, top_k=2)
KINDS = {"scout": SCOUT, "maverick": MAVERICK}


def pair(kind: str) -> tuple[Llama4ForConditionalGeneration, VisionLanguageModel]:
    """Transformers' model and ours, with the same random weights: 9 tokens a tile, chunks of 8."""
    torch.manual_seed(1)
    vision = Llama4VisionConfig(
        hidden_size=TOWER["width"],
        num_hidden_layers=TOWER["layers"],
        num_attention_heads=TOWER["heads"],
        intermediate_size=TOWER["hidden"],
        image_size=TILE,
        patch_size=4,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=ADAPTER,
        projector_output_dim=ADAPTER,
        vision_output_dim=ADAPTER,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    config = Llama4Config(
        vision_config=vision.to_dict(),
        text_config=text_config(KINDS[kind]).to_dict(),
        image_token_index=TOKENIZER.special(PATCH),
        attn_implementation="eager",
    )
    theirs = Llama4ForConditionalGeneration(config).eval()
    randomize(theirs)
    fusion = partial(EarlyFusion, projector="mlp", shuffle=2, hidden=ADAPTER)
    encoder = Llama4Vision(TILE, patch_size=4, **TOWER)
    ours = VisionLanguageModel(encoder, fusion, KINDS[kind], TOKENIZER).eval()
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs, ours


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``Llama4ForConditionalGeneration`` under our names."""
    names = {
        "vision_model.patch_embedding.linear": "encoder.patch_embed",
        "vision_model.class_embedding": "encoder.class_token",
        "vision_model.positional_embedding_vlm": "encoder.positions",
        "vision_model.layernorm_pre": "encoder.norm_pre",
        "vision_model.layernorm_post": "encoder.norm_post",
        "vision_model.model.layers": "encoder.layers",
        "vision_model.vision_adapter.mlp": "fusion.projector",
        "multi_modal_projector.linear_1": "fusion.projector.project",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
    }
    text, ours = {}, {}
    for name, tensor in state.items():
        if name.startswith("language_model."):
            text[name.removeprefix("language_model.")] = tensor
            continue
        for their, our in names.items():
            name = name.replace(their, our)
        ours[name] = tensor
    return ours | {f"backbone.{name}": tensor for name, tensor in decoder_weights(text).items()}


def picture(seed: int, width: int = TILE, height: int = TILE) -> PILImage.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


ASSISTANT = Turn("assistant", ["3, 7"])
PROMPTS = [
    Prompt([Turn("user", ["left ", Image(picture(1)), " right ", Image(picture(2)), " red?"])]),
    Prompt.ask("no image here, what then?"),
    Prompt([Turn("user", [Video([picture(3), picture(4)], [0.0, 1.5]), "how many bars?"])]),
]


def their_inputs(batch: Batch, row: int | None = None) -> dict[str, Tensor]:
    """Pixels as transformers reads them, of one row of the batch or of all."""
    tiles = batch.tiles if row is None else batch.tiles[batch.tile_rows == row]
    return {"pixel_values": (tiles / 255 - 0.5) / 0.5} if len(tiles) else {}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_equal_transformers(kind: str) -> None:
    """Guards against an image on another's placeholders, or parts that agree only one by one.

    A row of two images, one of text alone, one of two frames; padded on the right.
    """
    theirs, ours = pair(kind)
    answered = [Prompt([*prompt.turns, ASSISTANT]) for prompt in PROMPTS]
    batch = collate([ours.prompts.encode(prompt, loss="text") for prompt in answered])
    assert batch.documents is not None
    real = batch.documents >= 0
    assert real.sum(1).unique().numel() == 3
    assert batch.tile_rows.tolist() == [0, 0, 2, 2]
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, 1:] = batch.labels[:, :-1]  # they shift by themselves

    expected = theirs(
        batch.tokens, attention_mask=real.long(), labels=labels, **their_inputs(batch)
    )
    output = ours(batch)
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.loss, expected.loss, atol=LOSS, rtol=0)
    output.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, translate(gradients(theirs)))

    exchanged = replace(batch, tiles=batch.tiles[[1, 0, 2, 3]])
    apart = (ours(exchanged).logits[real] - expected.logits[real]).abs().max()
    assert apart > 1000 * LOGITS, "logits that do not depend on the pictures prove little"


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_equal_transformers(kind: str) -> None:
    """Guards against a cache that images in the prefix, or rows of unequal length, put off.

    Ours decodes all rows together, transformers each row alone; both replies end at a stop id.
    """
    theirs, ours = pair(kind)
    batch = collate([ours.prompts.encode(prompt, reply=True) for prompt in PROMPTS])
    assert batch.documents is not None
    expected = [
        their_greedy(theirs, tokens[real][None], 20, **their_inputs(batch, row))
        for row, (tokens, real) in enumerate(zip(batch.tokens, batch.documents >= 0, strict=True))
    ]
    assert ours.generate_ids(batch, max_tokens=20) == expected

    stopped = []
    for ids in expected:
        ends = [place for place, token in enumerate(ids) if token in TOKENIZER.stop_ids]
        stopped.append(TOKENIZER.decode(ids[: min(ends, default=20)]).strip())
    assert ours.generate(PROMPTS, max_tokens=20) == stopped


def test_special_ids_are_transformers_ids() -> None:
    """Guards against placeholders that imported weights know as another token."""
    config = Llama4Config()
    ids = [200_000 + llama4_specials().index(name) for name in (IMAGE_START, IMAGE_END, PATCH)]
    assert ids == [config.boi_token_id, config.eoi_token_id, config.image_token_id]


def test_an_image_is_written_as_transformers_writes_it() -> None:
    """Guards against a prompt that imported weights never saw, around images and frames alike."""
    _, ours = pair("scout")
    span = Llama4Processor._prompt_split_image(SimpleNamespace(), (1, 1), 9)
    images, _, video = (
        TOKENIZER.decode(ours.prompts.encode(prompt).tokens.tolist(), skip_special=False)
        for prompt in PROMPTS
    )
    assert f"left {span} right {span} red?" in images
    assert f"[0.0s]{span}[1.5s]{span}how many bars?" in video
