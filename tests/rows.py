"""Small models and one batch for each kind of row, and what the visibility rule makes of them.

The reference (``dense_loss``) is the decoder written out in fp64, its attention under the dense
mask of ``visibility.visible``: no backend and no fast path of the code under test.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor, nn

from encoders.patches import Patches
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.moe import MoE
from sandbox.backbone.transformer import Backbone
from sandbox.backbone.visibility import Coordinates, visible
from sandbox.data.batch import IGNORE, Batch, Example, collate, pack
from sandbox.data.prompt import Prompt, PromptEncoder
from sandbox.data.task import Question, Sample
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer

# Rows of equal length; padded; packed documents; branches behind an image; the same with images
# read in both directions; cross-attention adapters; and packed rows of images with branches.
KINDS = ("plain", "padded", "packed", "branches", "blocks", "adapters", "packed_images")

# The body of a GPU test runs on the CPU too, in the default suite, where that is quick.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

WORDS = "red blue green bars and lines count seven of twelve left right above below " * 4


def model_of(kind: str, **changes: Any) -> VisionLanguageModel:
    """A model for rows of a kind, whose chunk is shorter than they are; gates stand open."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load()
    config = BackboneConfig(
        **{
            "vocab_size": tokenizer.vocab_size,
            "width": 32,
            "layers": 4,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 16,
            "expert_hidden": 32,
            "chunk": 16,
            "temperature_floor": 8,
        }
        | changes
    )
    fusion: Any = partial(EarlyFusion, bidirectional=kind == "blocks")
    if kind == "adapters":
        fusion = partial(CrossAttention, layers=(1, 3), heads=2, head_dim=16, hidden=32)
    encoder = Patches(tile_size=16, patch_size=4, width=24)
    model = VisionLanguageModel(encoder, fusion, config, tokenizer)
    if kind == "adapters":
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                nn.init.constant_(parameter, 0.5)
    return model


def batch_of(kind: str, prompts: PromptEncoder) -> Batch:
    """A batch on the CPU."""
    if kind == "plain":
        return collate([_text(prompts, skip, 40) for skip in range(3)])
    if kind == "padded":
        return collate([_text(prompts, n, n) for n in (40, 23, 31)])
    if kind == "packed":
        lengths = ((19, 7, 14), (5, 24))
        return pack([[_text(prompts, n, n) for n in row] for row in lengths])
    samples = [prompts.encode_sample(_sample(number), loss="text") for number in range(4)]
    return pack([samples[:2], samples[2:]]) if kind == "packed_images" else collate(samples)


def picture(seed: int) -> PILImage.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def _text(prompts: PromptEncoder, skip: int, length: int) -> Example:
    """The first tokens of a text that starts ``skip`` words into ``WORDS``."""
    text = " ".join(WORDS.split()[skip % 14 :])
    example = prompts.encode(Prompt.ask(text), loss="text")
    assert len(example) >= length
    rows = {
        f.name: getattr(example, f.name)[:length]
        for f in fields(example)
        if isinstance(value := getattr(example, f.name), np.ndarray) and len(value) == len(example)
    }
    return replace(example, **rows)


def _sample(number: int) -> Sample:
    """A picture with one question more than its number."""
    questions = tuple(
        Question(f"which bar is {WORDS.split()[i]}?", str(i), "which") for i in range(number + 1)
    )
    return Sample((picture(number),), questions, str(number))


# --- The reference --------------------------------------------------------------------------------


def dense_loss(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """The mean cross-entropy of the labelled places, in fp64; its graph reaches the parameters."""
    fused = model.fuse(batch)
    hidden = dense_hidden(
        model.backbone,
        fused.embeds,
        (batch.positions, batch.documents, batch.branches, fused.blocks),
        fused.adapters,
        fused.context,
    )
    labelled = batch.labels != IGNORE
    logits = hidden[labelled] @ model.backbone.head.weight.double().T
    return F.cross_entropy(logits, batch.labels[labelled])


def dense_hidden(
    backbone: Backbone,
    embeds: Tensor,
    coordinates: Sequence[Tensor | None],
    adapters: Any = None,
    context: Any = None,
) -> Tensor:
    """Hidden states fp64 ``[B, T, D]``; coordinates are those of ``Coordinates``, or None for 0."""
    config, positions = backbone.config, coordinates[0]
    assert positions is not None
    given = (torch.zeros_like(positions) if x is None else x for x in coordinates[1:])
    row = Coordinates(positions, *given)
    x = embeds.double()
    for number, layer in enumerate(backbone.layers):
        if adapters and number in adapters:
            x = adapters[number](x.float(), context).double()
        rope = config.uses_rope(number)
        mask = visible(row, row, config.chunk if rope else None)
        x = x + _attention(layer.attention, _norm(x, layer.attention_norm), backbone, mask, row)
        x = x + _feed_forward(layer.ffn, _norm(x, layer.ffn_norm))
    return _norm(x, backbone.norm)


def _norm(x: Tensor, norm: nn.RMSNorm | None, eps: float = 0.0) -> Tensor:
    eps = eps if norm is None else float(norm.eps or 0.0)
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x if norm is None else x * norm.weight.double()


def _product(x: Tensor, linear: nn.Linear) -> Tensor:
    return x @ linear.weight.double().T


def _attention(layer: Any, x: Tensor, backbone: Backbone, mask: Tensor, row: Coordinates) -> Tensor:
    config = backbone.config
    q, k, v = (
        _product(x, linear).unflatten(-1, (-1, config.head_dim))
        for linear in (layer.query, layer.key, layer.value)
    )
    if layer.rope:
        angle = row.positions[..., None, None].double() * backbone.frequency.double()
        q, k = (_turn(part, angle) for part in (q, k))
        if config.qk_norm:
            q, k = (_norm(part, None, config.norm_eps) for part in (q, k))
    elif config.temperature_scale:
        steps = torch.floor((row.positions + 1) / config.temperature_floor).double()
        q = q * (1 + config.temperature_scale * torch.log1p(steps))[..., None, None]
    k, v = (part.repeat_interleave(config.heads // config.kv_heads, dim=2) for part in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(config.head_dim)
    weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    return _product(torch.einsum("bhqs,bshk->bqhk", weights, v).flatten(2), layer.output)


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


def _feed_forward(ffn: Any, x: Tensor) -> Tensor:
    if not isinstance(ffn, MoE):
        return _swiglu(x, ffn.gate_up.weight.double().T, ffn.down.weight.double().T)
    assert ffn.config.top_k == 1 and ffn.shared is not None
    logits = _product(x, ffn.router)
    chosen = logits.argmax(-1)  # a bias that starts at zero changes nothing
    gated = x * logits.gather(-1, chosen[..., None]).sigmoid()
    out = _feed_forward(ffn.shared, x)
    for expert in range(ffn.config.experts):
        weights = (ffn.experts.gate_up[expert].double(), ffn.experts.down[expert].double())
        out = out + _swiglu(gated, *weights) * (chosen == expert)[..., None]
    return out


def reference(model: VisionLanguageModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by the reference, on the CPU: of a copy, the model stays as it is."""
    model = deepcopy(model).cpu()
    loss = dense_loss(model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients
