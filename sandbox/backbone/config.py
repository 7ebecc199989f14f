"""The typed configuration of the backbone, and its presets by name."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sandbox.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rescaling of rotary frequencies for contexts longer than the original one.

    Wavelengths above ``original_context / low`` are stretched by ``factor``, those below
    ``original_context / high`` are kept, and the band between is blended. Scout has low = high:
    no band.
    """

    factor: float
    low: float
    high: float
    original_context: int


@dataclass(frozen=True)
class BackboneConfig:
    """A Llama 4 text decoder. Widths count features, layers are numbered from 0.

    Attributes:
        vocab_size: tokens that the head predicts; the tokenizer's size.
        input_only: further rows of the embedding, for tokens that are read but never predicted
            (Llama 3.2 Vision's image token).
        width: D.
        layers: number of decoder layers.
        heads, kv_heads, head_dim: H, G and K of grouped-query attention.
        dense_hidden: hidden width of the feed-forward of dense layers.
        expert_hidden: F, hidden width of each routed expert and of the shared expert.
        experts: E, routed experts of a mixture layer; 0 makes every layer dense.
        top_k: routed experts a token visits.
        moe_every: every n-th layer is a mixture: 1 = all, 2 = layers 1, 3, 5, ...
        shared_expert: whether a mixture layer also sends every token through a shared expert.
        router_score: gate of a chosen expert: ``sigmoid`` of its logit (Llama 4) or ``softmax``
            over all logits.
        router_placement: where the gate multiplies: the expert's ``input`` (Llama 4) or ``output``.
        balance: how expert load is evened: by an auxiliary ``loss`` (Switch, arXiv 2101.03961),
            by a selection ``bias`` moved after each step (DeepSeek, arXiv 2408.15664), or ``none``.
        balance_rate: coefficient of that loss, or step of that bias.
        router_z_loss: coefficient of the router z-loss (ST-MoE, arXiv 2202.08906).
        rope_theta, rope_scaling: base of the rotary frequencies and their rescaling.
        chunk: C, local attention span of RoPE layers; None makes them global.
        nope_every: every n-th layer has no rotary embedding and attends globally: 4 = layers 3, 7,
            ...; 0 = RoPE everywhere, 1 = nowhere.
        qk_norm: weightless RMS norm of queries and keys after RoPE, on RoPE layers only.
        temperature_floor, temperature_scale: attention temperature of NoPE layers; a scale of 0
            turns it off.
        norm_eps: epsilon of every RMS norm.
        tied: whether the head shares the embedding's weights.
        init_std: standard deviation of initial weights; None draws embeddings at unit scale and
            every matrix with the inverse root of its fan-in, which learned several times faster
            at small scale (experiments/LOG.md).
    """

    vocab_size: int = 1024
    input_only: int = 0
    width: int = 96
    layers: int = 4
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 32
    dense_hidden: int = 256
    expert_hidden: int = 128
    experts: int = 4
    top_k: int = 1
    moe_every: int = 1
    shared_expert: bool = True
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    router_placement: Literal["input", "output"] = "input"
    balance: Literal["none", "loss", "bias"] = "bias"
    balance_rate: float = 0.02
    router_z_loss: float = 0.0
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    chunk: int | None = 8192
    nope_every: int = 4
    qk_norm: bool = True
    temperature_floor: int = 8192
    temperature_scale: float = 0.1
    norm_eps: float = 1e-5
    tied: bool = False
    init_std: float | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"backbone: heads ({self.heads}) must divide by kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"backbone: head_dim ({self.head_dim}) must be even, RoPE turns pairs")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise UserError(
                f"backbone: top_k ({self.top_k}) must lie between 1 and experts ({self.experts})"
            )
        if self.experts and self.moe_every < 1:
            raise UserError(f"backbone: moe_every ({self.moe_every}) must be at least 1")
        if self.tied and self.input_only:
            raise UserError(
                f"backbone: a tied head predicts every row of the embedding: input_only "
                f"({self.input_only}) must be 0"
            )
        if self.chunk is not None and self.chunk < 1:
            raise UserError(
                f"backbone: chunk ({self.chunk}) must be at least 1, or null for global"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "BackboneConfig":
        """The configuration that ``dataclasses.asdict`` made these plain values of."""
        scaling = values["rope_scaling"]
        return cls(**{**values, "rope_scaling": scaling and RopeScaling(**scaling)})

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` is a mixture of experts."""
        return bool(self.experts) and (layer + 1) % self.moe_every == 0

    def uses_rope(self, layer: int) -> bool:
        """Whether ``layer`` is a local RoPE layer; the others are global and have no positions."""
        return not self.nope_every or (layer + 1) % self.nope_every != 0


_LLAMA4 = BackboneConfig(
    vocab_size=202_048,
    width=5120,
    layers=48,
    heads=40,
    kv_heads=8,
    head_dim=128,
    dense_hidden=16_384,
    expert_hidden=8192,
    top_k=1,
    balance="loss",
    balance_rate=0.001,
)


def _rung(
    layers: int, width: int, heads: int, kv_heads: int, head_dim: int, expert_hidden: int
) -> BackboneConfig:
    """A size that one machine can train, in Llama 4's proportions.

    Kept: 16 experts top-1 beside a shared one in every layer, experts 1.6 times as wide as the
    model, about 5 query heads for each KV head, 3 local layers for each global one. Each rung adds
    such a group of four layers, and the width grows from about 30 times the number of layers to
    80 (Scout: 107).

    Unlike Llama 4, a chunk is 1024 tokens, so that contexts of a few thousand already cross its
    edge; and the vocabulary is the shipped one of 1024 tokens, on every rung: their losses compare,
    and parameters are spent on layers (of 400m, Llama 4's vocabulary would be over half).
    """
    return BackboneConfig(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dense_hidden=2 * expert_hidden,
        expert_hidden=expert_hidden,
        experts=16,
        chunk=1024,
        temperature_floor=1024,
    )


PRESETS: dict[str, BackboneConfig] = {
    # The backbone of the quickstart: trains in minutes on two CPU cores.
    "tiny": BackboneConfig(),
    # A ladder of sizes to train, named by the parameters that a token visits.
    "1m": _rung(4, 128, 4, 1, 32, 208),
    "5m": _rung(8, 208, 5, 1, 48, 336),
    "25m": _rung(12, 400, 5, 1, 80, 640),
    "100m": _rung(16, 720, 15, 3, 48, 1152),
    "400m": _rung(20, 1280, 10, 2, 128, 2048),
    "1b": _rung(24, 1920, 15, 3, 128, 3072),
    # Llama 4 Scout (17B-16E): every layer a mixture, context stretched sixteen-fold.
    "scout": replace(
        _LLAMA4,
        experts=16,
        moe_every=1,
        rope_scaling=RopeScaling(factor=16, low=1, high=1, original_context=8192),
    ),
    # Llama 4 Maverick (17B-128E): every other layer a mixture, no qk-norm.
    "maverick": replace(_LLAMA4, experts=128, moe_every=2, qk_norm=False),
    # An ESTIMATE of Llama 4 Behemoth: NOTES says what is known and what is guessed.
    "behemoth": replace(
        _LLAMA4,
        width=15_360,
        layers=100,
        heads=120,
        kv_heads=24,
        dense_hidden=49_152,
        expert_hidden=24_576,
        experts=16,
        moe_every=1,
    ),
}

# What must be said wherever a preset's numbers are shown.
NOTES = {
    "behemoth": (
        "an estimate: Meta announced 288B active parameters, 16 experts and nearly 2T parameters "
        "in all (The Llama 4 herd, April 2025), and nothing else. Guessed are Scout's proportions "
        "at three times its width, in heads and experts too, and its vocabulary, chunks and "
        "qk-norm; 100 layers then meet both numbers. Rotary frequencies are unscaled, as "
        "Maverick's"
    ),
}


def preset(name: str, vocab_size: int | None = None) -> BackboneConfig:
    """The preset called ``name``, for another vocabulary where ``vocab_size`` is given.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"unknown preset '{name}'{hint} (presets: {', '.join(PRESETS)})")
    found = PRESETS[name]
    return found if vocab_size is None else replace(found, vocab_size=vocab_size)
