"""The backbone is Llama 4: parity with transformers at toy width, every feature on.

Llama 4 is easily got wrong in twenty places; each has a test that fails then. In this table a
name without a file stands here:

     1  top-k of raw logits, sigmoid gate on the expert's input, shared expert unscaled
            test_each_trap_would_show
            test_the_balancing_bias_chooses_but_never_gates
     2  weightless qk-norm behind RoPE, on RoPE layers only
            test_each_trap_would_show
            test_queries_and_keys_have_the_same_bits_in_bfloat16
     3  RoPE turns adjacent pairs, in fp32
            test_each_trap_would_show
            test_rotation_keeps_fp32_in_a_bfloat16_model
     4  no_rope_layers[i] == 1 means that RoPE is used
            test_each_trap_would_show
            test_layers_without_rope_are_the_same_ones
     5  temperature by true positions, on NoPE layers only
            test_each_trap_would_show
            test_backbone_parity_decoding.py::test_padding_on_the_left_changes_their_temperature
            test_backbone_parity_decoding.py::test_packing_changes_their_temperature
     6  local layers see their own chunk; None is global
            test_each_trap_would_show
            test_no_chunk_means_global
     7  decoding past a chunk boundary needs a mask
            test_backbone_parity_decoding.py::test_one_token_without_a_mask_fails_past_a_chunk
     8  Scout's scaling has no band to blend
            test_each_trap_would_show
            test_backbone_transformer.py::test_scout_stretches_the_last_29_frequencies
     9  stacked experts [E, D, 2F], gate first, applied as x @ W
            test_each_trap_would_show
    10  sparse dispatch, and a balancing loss that arrives
            test_experts_that_nobody_visits_are_not_run
            test_balancing_reaches_our_router_alone
    11  tower: patches unfolded (c, y, x), class token last, its row of positions too
            test_encoders_llama4_vit.py::test_parity_notices
    12  tower: columns turn before rows, counted from 1, the class token not at all
            test_encoders_llama4_vit.py::test_parity_notices
    13  tower: not causal, biases, epsilon 1e-5, exact GELU
            test_encoders_llama4_vit.py::test_parity_notices
            test_encoders_llama4_vit.py::test_norms_have_the_real_epsilon
    14  pixel shuffle orders channels (dy, dx, c)
            test_fusion_projectors.py::test_channels_are_ordered_dy_dx_c
    15  adapter with two GELUs, no biases
            test_fusion_projectors.py::test_mlp_equals_transformers
    16  ids of the special tokens; features replace patch tokens
            test_sandbox_tokenizer.py::test_special_ids_are_meta_ids
            test_sandbox_parity.py::test_logits_loss_and_gradients_equal_transformers
    17  the order of an image's tokens
            test_fusion_layout.py::test_spans_equal_transformers
            test_sandbox_parity.py::test_an_image_is_written_as_transformers_writes_it
    18  a frame of a video is an image behind its time
            test_sandbox_parity.py::test_an_image_is_written_as_transformers_writes_it
    19  cross-attention is gated from zero, queries and keys normed
            test_fusion_cross_attention_parity.py::test_logits_loss_and_gradients_equal_transformers
            test_fusion_cross_attention.py::test_the_adapted_model_starts_as_the_plain_one
    20  a token that may see no image gets nothing
            test_fusion_cross_attention_parity.py::test_the_leak_of_transformers_is_closed
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.llama4 import modeling_llama4

from sandbox.backbone.backends import cpu
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.loss import chunked_cross_entropy
from sandbox.backbone.moe import balance_loss
from sandbox.backbone.transformer import Backbone
from sandbox.backbone.visibility import Visibility
from tests.reference import (
    BAND_SCALING,
    GRADIENT,
    LAYER,
    LOGITS,
    LOSS,
    SCOUT_SCALING,
    TOY,
    assert_same_gradients,
    decoder_pair,
    decoder_weights,
    gradients,
    logits_of,
    recorded,
    text_config,
    tokens_of,
)

IGNORED = -100


# --- Equality -------------------------------------------------------------------------------------

GRID = [
    {"top_k": k, "moe_every": every, "qk_norm": norm, "rope_scaling": scaling}
    for k, every, norm, scaling in itertools.product(
        (1, 2), (1, 2), (True, False), (None, SCOUT_SCALING, BAND_SCALING)
    )
]
CORNERS = [
    {"temperature_scale": 0.0},
    {"temperature_scale": 0.0, "moe_every": 2, "top_k": 2, "qk_norm": False},
    {"temperature_floor": 1, "temperature_scale": 0.5},
    {"chunk": None},
    {"chunk": None, "moe_every": 2, "rope_scaling": SCOUT_SCALING},
    {"chunk": 2},
    {"experts": 0},
    {"experts": 0, "qk_norm": False, "rope_scaling": BAND_SCALING},
    {"tied": True},
    {"nope_every": 0},
    {"nope_every": 1},
    {"nope_every": 2, "moe_every": 3},
    {"experts": 1},
    {"experts": 4, "top_k": 4},
    {"kv_heads": 4},
    {"kv_heads": 1, "head_dim": 32},
]


def named(features: dict[str, object]) -> str:
    """A short name of a configuration: what differs from the toy."""
    scalings = {None: "plain", SCOUT_SCALING: "scout", BAND_SCALING: "band"}
    shown = {k: scalings[v] if k == "rope_scaling" else v for k, v in features.items()}
    return ",".join(f"{key}={value}" for key, value in shown.items())


@pytest.mark.parametrize("features", [*GRID, *CORNERS], ids=named)
def test_forward_loss_and_gradients_equal_transformers(features: dict[str, object]) -> None:
    """Guards against a misplaced norm, a swapped gate, half-rotated RoPE, a wrong chunk edge, a
    renormalised or detached score, and against errors that cancel before the logits.
    """
    theirs, ours = decoder_pair(replace(TOY, **features))
    tokens = tokens_of(2)
    labels = tokens.clone()
    labels[0, 5:9] = IGNORED
    with recorded(theirs.model.layers) as expected_layers, recorded(ours.layers) as layers:
        expected = theirs(tokens, labels=labels, output_router_logits=True)
        decoded = ours(tokens)
    for layer, expected_layer in zip(layers, expected_layers, strict=True):
        layer = layer.view_as(expected_layer)  # ours takes the tokens of all rows end to end
        torch.testing.assert_close(layer, expected_layer, atol=LAYER, rtol=0)
    logits = ours.unembed(decoded.hidden)
    torch.testing.assert_close(logits, expected.logits, atol=LOGITS, rtol=0)
    for routing, raw in zip(decoded.routing, expected.router_logits or (), strict=True):
        torch.testing.assert_close(routing.logits, raw, atol=LOGITS, rtol=0)

    targets = labels[:, 1:].flatten()
    kept = targets != IGNORED
    loss, _ = chunked_cross_entropy(
        decoded.hidden[:, :-1].flatten(0, 1)[kept], ours.head.weight, targets[kept], chunk=16
    )
    torch.testing.assert_close(loss, expected.loss, atol=LOSS, rtol=0)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, decoder_weights(gradients(theirs)))


# --- The power of that equality -------------------------------------------------------------------

Weights = dict[str, Tensor]
Trap = Callable[[BackboneConfig, Weights], tuple[BackboneConfig, Weights]]


def configured(**changes: object) -> Trap:
    """The trap of another configuration."""
    return lambda config, weights: (replace(config, **changes), weights)


def weighted(ending: str, change: Callable[[Tensor], Tensor]) -> Trap:
    """The trap of weights laid out otherwise, where their names end in ``ending``."""
    return lambda config, weights: (
        config,
        {name: change(x) if name.endswith(ending) else x for name, x in weights.items()},
    )


def half_rotated(x: Tensor) -> Tensor:
    """Rows of a query or key matrix as an importer of Llama 3 permutes them."""
    return x.unflatten(0, (-1, TOY.head_dim // 2, 2)).transpose(1, 2).reshape_as(x)


def inverted(config: BackboneConfig, weights: Weights) -> tuple[BackboneConfig, Weights]:
    """The trap of reading ``no_rope_layers`` by its name."""

    class Inverted(BackboneConfig):
        def uses_rope(self, layer: int) -> bool:
            return not super().uses_rope(layer)

    return Inverted(**vars(config)), weights


TRAPS: dict[str, Trap] = {
    "1 softmax gate": configured(router_score="softmax"),
    "1 gate on the output": configured(router_placement="output"),
    "1 one expert less": configured(top_k=1),
    "2 no qk-norm": configured(qk_norm=False),
    "2 another epsilon": configured(norm_eps=1e-5),
    "3 queries half-rotated": weighted("attention.query.weight", half_rotated),
    "3 keys half-rotated": weighted("attention.key.weight", half_rotated),
    "4 NoPE and RoPE exchanged": inverted,
    "4 NoPE layers counted from 1": configured(nope_every=3),
    "5 no temperature": configured(temperature_scale=0.0),
    "5 another floor": configured(temperature_floor=5),
    "6 a chunk less one": configured(chunk=7),
    "6 local layers global": configured(chunk=None),
    "8 frequencies unscaled": configured(rope_scaling=None),
    "8 a band blended": configured(rope_scaling=replace(SCOUT_SCALING, high=4)),
    "8 another theta": configured(rope_theta=10_000.0),
    "9 up before gate, experts": weighted(
        "experts.gate_up", lambda x: x.roll(x.shape[-1] // 2, -1)
    ),
    "9 up before gate, dense": weighted("gate_up.weight", lambda x: x.roll(len(x) // 2, 0)),
    "9 experts transposed": weighted("experts.gate_up", lambda x: x.transpose(1, 2)),
    "9 experts out of order": weighted("experts.down", lambda x: x.roll(1, 0)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_would_show(trap: str) -> None:
    """Guards against a parity test that cannot see: each option, taken wrongly, must be far off.

    The numbers are those of the table above. Our default is the one that equals transformers.
    """
    # Experts of 2F = D, so that no shape betrays a transposed matrix.
    config = replace(
        TOY, top_k=2, moe_every=2, rope_scaling=SCOUT_SCALING, expert_hidden=TOY.width // 2
    )
    theirs, ours = decoder_pair(config)
    tokens = tokens_of(2)
    expected = theirs(tokens).logits
    torch.testing.assert_close(logits_of(ours, tokens), expected, atol=LOGITS, rtol=0)
    wrong_config, wrong_weights = TRAPS[trap](config, ours.state_dict())
    wrong = Backbone(wrong_config)
    wrong.load_state_dict(wrong_weights)
    assert (logits_of(wrong, tokens) - expected).abs().max() > 1000 * LOGITS


# --- One by one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 3], ids=["RoPE", "NoPE"])
def test_queries_and_keys_have_the_same_bits_in_bfloat16(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a norm before RoPE or on NoPE layers, and against a rounded temperature.

    A rotation keeps the norm, so in exact arithmetic the order does not show. In bfloat16 the
    result of the first step is rounded, and it does: a swap changes a quarter of all numbers.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    their_attention = modeling_llama4.eager_attention_forward

    def their_spy(module, q, k, *rest, **options):
        seen["theirs"] = q.transpose(1, 2), k.transpose(1, 2)
        return their_attention(module, q, k, *rest, **options)

    our_attention = cpu.attend

    def our_spy(q, k, *rest, **options):
        seen["ours"] = q[None], k[None]
        return our_attention(q, k, *rest, **options)

    monkeypatch.setattr(cpu, "attend", our_spy)
    monkeypatch.setattr(modeling_llama4, "eager_attention_forward", their_spy)
    theirs, ours = decoder_pair(TOY)
    positions = torch.arange(29)[None]
    x = torch.randn(1, 29, TOY.width).bfloat16()
    turns = theirs.model.rotary_emb(x, positions)
    theirs.model.layers[layer].self_attn.bfloat16()(x, turns, None)
    view = Visibility(TOY, ours.frequency, positions, plain=True)
    ours.layers[layer].attention.bfloat16()(x[0], view)
    for mine, their in zip(seen["ours"], seen["theirs"], strict=True):
        assert mine.dtype == their.dtype == torch.bfloat16
        assert (mine == their).float().mean() > 0.99


def test_rotation_keeps_fp32_in_a_bfloat16_model() -> None:
    """Guards against frequencies rounded with the weights: far positions would lose their angle.

    Dense and global, so that rounding the weights alone moves the result by 2%, not by 20%.
    """
    config = replace(TOY, experts=0, chunk=None, nope_every=0)
    _, ours = decoder_pair(config)
    far = {"tokens": tokens_of(1), "positions": 300 * torch.arange(29)[None]}
    with torch.no_grad():
        exact = ours(**far).hidden
        rounded = ours.to(torch.bfloat16)(**far).hidden
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("nope_every", [0, 1, 2, 4])
def test_layers_without_rope_are_the_same_ones(nope_every: int) -> None:
    """Guards against reading ``no_rope_layers`` by its name: a 1 there means that RoPE is used."""
    config = replace(TOY, layers=12, nope_every=nope_every)
    theirs = text_config(config)
    rope = [config.uses_rope(i) for i in range(12)]
    assert theirs.no_rope_layers == [int(used) for used in rope]
    assert theirs.layer_types == ["chunked_attention" if r else "full_attention" for r in rope]
    if nope_every == 4:
        assert [i for i, used in enumerate(rope) if not used] == [3, 7, 11]


def test_no_chunk_means_global() -> None:
    """Guards against a null chunk that crashes, as in transformers: it means global everywhere."""
    theirs, ours = decoder_pair(replace(TOY, chunk=None))
    tokens = tokens_of(1, 40)
    expected = logits_of(ours, tokens)
    wide = Backbone(replace(TOY, chunk=40))
    wide.load_state_dict(ours.state_dict())
    torch.testing.assert_close(logits_of(wide, tokens), expected, atol=LOGITS, rtol=0)
    theirs.config.attention_chunk_size = None
    with pytest.raises(ValueError, match="attention_chunk_size"):
        theirs(tokens, use_cache=False)


def test_the_balancing_bias_chooses_but_never_gates() -> None:
    """Guards against top-k after the bias by default, and against a bias inside the gate."""
    theirs, ours = decoder_pair(replace(TOY, balance="bias"))
    tokens = tokens_of(2)
    expected = theirs(tokens).logits
    torch.testing.assert_close(logits_of(ours, tokens), expected, atol=LOGITS, rtol=0)
    for layer in ours.mixtures().values():
        layer.balance_bias.fill_(0.7)  # the same for all experts: none is chosen otherwise
    torch.testing.assert_close(logits_of(ours, tokens), expected, atol=LOGITS, rtol=0)
    for layer in ours.mixtures().values():
        layer.balance_bias[1] += 0.7
    assert (logits_of(ours, tokens) - expected).abs().max() > 1000 * LOGITS


@pytest.mark.parametrize("length", [1, 3])
def test_experts_that_nobody_visits_are_not_run(length: int) -> None:
    """Guards against running every expert on every token: an unvisited one must not be read."""
    theirs, ours = decoder_pair(replace(TOY, experts=16))
    tokens = tokens_of(1, length)
    expected = logits_of(ours, tokens)
    with torch.no_grad():
        for routing in ours(tokens).routing:
            unvisited = routing.load() == 0
            assert unvisited.any()
            ours.layers[routing.layer].ffn.experts.gate_up[unvisited] = torch.nan
            theirs.model.layers[routing.layer].feed_forward.experts.gate_up_proj[unvisited] = (
                torch.nan
            )
    assert logits_of(ours, tokens).equal(expected)
    assert theirs(tokens).logits.isnan().any()


def test_balancing_reaches_our_router_alone() -> None:
    """Guards against a coefficient that changes nothing, as transformers' does.

    Without it both routers have the same gradient.
    """
    theirs, ours = decoder_pair(replace(TOY, balance="loss", balance_rate=0.5))
    tokens = tokens_of(2)
    router = ours.layers[0].ffn.router.weight
    found = []
    for coefficient in (0.0, 0.5):
        theirs.config.router_aux_loss_coef = coefficient
        their_loss = theirs(tokens, labels=tokens, output_router_logits=True).loss
        their_router = theirs.model.layers[0].feed_forward.router.weight
        decoded = ours(tokens)
        loss, _ = chunked_cross_entropy(
            decoded.hidden[:, :-1].flatten(0, 1), ours.head.weight, tokens[:, 1:].flatten()
        )
        balance = torch.stack([balance_loss(routing) for routing in decoded.routing]).mean()
        found.append(
            (
                *torch.autograd.grad(their_loss, their_router),
                *torch.autograd.grad(loss + coefficient * balance, router),
            )
        )
    (their_plain, our_plain), (their_balanced, our_balanced) = found
    assert (our_plain - their_plain).norm() < GRADIENT * their_plain.norm()
    assert their_balanced.equal(their_plain)
    assert (our_balanced - our_plain).norm() > 0.01 * our_plain.norm()


# --- The table ------------------------------------------------------------------------------------


def test_the_table_names_a_test_for_each_trap() -> None:
    """Guards against a trap without a test, and against a table that outlives a renaming."""
    here = Path(__file__)
    traps: dict[int, list[str]] = {}
    for line in (__doc__ or "").splitlines():
        if found := re.fullmatch(r" +(\d+)  \S.*", line):
            traps[int(found[1])] = []
        elif found := re.fullmatch(r" {12}(\w+\.py::)?(test_\w+)", line):
            traps[max(traps)].append(found[2])
            file = here.with_name(found[1][:-2]) if found[1] else here
            assert re.search(rf"^def {found[2]}\(", file.read_text(), re.MULTILINE), line
    assert sorted(traps) == list(range(1, 21))
    assert all(traps.values())
    numbered = {int(name.split()[0]) for name in TRAPS}
    assert numbered == {n for n, names in traps.items() if "test_each_trap_would_show" in names}
