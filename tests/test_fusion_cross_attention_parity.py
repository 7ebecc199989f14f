"""Cross-attention is Llama 3.2 Vision's: parity with transformers, its leak included."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fusion.cross_attention import visible_tiles
from tests.crossing import (
    BACKBONE,
    IMAGE,
    LAYERS,
    LOGITS,
    D,
    P,
    V,
    features,
    grouped,
    layout,
    ours,
    randomize,
    row,
    run_ours,
)

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
from transformers.models.mllama import modeling_mllama, processing_mllama  # noqa: E402

LAYER, LOSS, GRADIENT = 5e-5, 1e-5, 1e-4  # agreement in fp32

# Transformers counts adapters among its seven layers: number 4 there stands before our layer 3.
THEIR_ADAPTERS = (1, 4)
THEIR_LAYERS = (0, 2, 3, 5, 6)


def pair(**arguments: object):
    """Transformers' language model and projector, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.MllamaForCausalLM(
        transformers.MllamaTextConfig(
            vocab_size=97,
            hidden_size=D,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=80,
            rope_parameters={"rope_type": "default", "rope_theta": BACKBONE.rope_theta},
            rms_norm_eps=0.01,
            cross_attention_layers=list(THEIR_ADAPTERS),
            pad_token_id=None,
            attn_implementation="eager",
        )
    )
    theirs.multi_modal_projector = nn.Linear(V, D)
    randomize(theirs)
    fusion, backbone = ours(**arguments)
    state = translate(theirs.state_dict())
    fusion.load_state_dict(state["fusion"])
    backbone.load_state_dict(state["backbone"])
    return theirs, fusion, backbone


def translate(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Transformers' tensors under our names, for the fusion and for the backbone."""
    shared = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "mlp.down_proj.weight": "ffn.down.weight",
    }
    crossing = shared | {
        "cross_attn.q_proj.weight": "attention.query.weight",
        "cross_attn.k_proj.weight": "attention.key.weight",
        "cross_attn.v_proj.weight": "attention.value.weight",
        "cross_attn.o_proj.weight": "attention.output.weight",
        "cross_attn.q_norm.weight": "attention.query_norm.weight",
        "cross_attn.k_norm.weight": "attention.key_norm.weight",
        "cross_attn_attn_gate": "attention_gate",
        "cross_attn_mlp_gate": "ffn_gate",
    }
    fusion = {f"projector.{x}": state[f"multi_modal_projector.{x}"] for x in ("weight", "bias")}
    backbone = {
        "embed.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for layer, number in zip(THEIR_ADAPTERS, LAYERS, strict=True):
        source, target = f"model.layers.{layer}", f"adapters.{number}"
        for theirs, mine in crossing.items():
            fusion[f"{target}.{mine}"] = state[f"{source}.{theirs}"]
        fusion[f"{target}.ffn.gate_up.weight"] = gate_up(state, source)
    for number, layer in enumerate(THEIR_LAYERS):
        source, target = f"model.layers.{layer}", f"layers.{number}"
        for theirs, mine in shared.items():
            backbone[f"{target}.{mine}"] = state[f"{source}.{theirs}"]
        backbone[f"{target}.ffn.gate_up.weight"] = gate_up(state, source)
        for letter, name in {"q": "query", "k": "key", "v": "value", "o": "output"}.items():
            weight = state[f"{source}.self_attn.{letter}_proj.weight"]
            if letter in "qk":
                weight = adjacent(weight)
            backbone[f"{target}.attention.{name}.weight"] = weight
    return {"fusion": fusion, "backbone": backbone}


def gate_up(state: dict[str, Tensor], layer: str) -> Tensor:
    return torch.cat([state[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up")])


def adjacent(weight: Tensor) -> Tensor:
    """Rows for our rotation of pairs (2i, 2i + 1), from those for the halves (i, i + K/2)."""
    return weight.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of every parameter; zeros where none arrived, as in adapters that a text alone skips."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


def their_mask(rows: Sequence[Sequence[int]], scope: str) -> Tensor:
    """Transformers' mask of tokens by images, ``[B, T, images, 1]``."""
    T = max(map(len, rows))
    if scope == "latest":
        spans = [processing_mllama.get_cross_attention_token_mask(list(r), IMAGE) for r in rows]
    else:
        spans = [[[t, T] for t, token in enumerate(r) if token == IMAGE] for r in rows]
    dense = processing_mllama.convert_sparse_cross_attention_mask_to_dense(
        spans, [[1] * len(x) for x in spans], 1, T
    )
    return torch.from_numpy(dense)


def run_theirs(theirs, rows: Sequence[Sequence[int]], vision: Tensor, scope: str) -> Tensor:
    """Logits of transformers; rows with fewer images than others get vision tokens of zeros."""
    prompt = layout(rows)
    B, M = len(rows), max(sum(token == IMAGE for token in r) for r in rows)
    arguments = {}
    if M:
        states = torch.zeros(B, M, P, D)
        slots = [slot for r in rows for slot in range(sum(token == IMAGE for token in r))]
        states[prompt.tile_rows, slots] = theirs.multi_modal_projector(vision)
        mask, full = modeling_mllama._prepare_cross_attention_mask(
            their_mask(rows, scope), num_vision_tokens=P, dtype=torch.float32
        )
        arguments = {
            "cross_attention_states": states.flatten(1, 2),
            "cross_attention_mask": mask,
            "full_text_row_masked_out_mask": full,
        }
    return theirs(prompt.tokens, **arguments, use_cache=False).logits


@pytest.mark.parametrize("scope", ["every", "latest"])
def test_the_rule_is_transformers(scope: str) -> None:
    """Guards against another reading of which images share a text, over random rows."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        images = torch.rand(12, generator=generator) < 0.4
        images[3] = True
        tokens = [IMAGE if image else 0 for image in images.tolist()]
        starts = images.nonzero().T
        expected = their_mask([tokens], scope)[..., 0].bool()
        assert torch.equal(visible_tiles(starts, 12, scope), expected), tokens


ROWS = {
    "image first": ["I....."],
    "text first": ["..I...."],
    "two images": [".I..I.."],
    "images side by side": [".II..I."],
    "text alone": ["....."],
    "a batch": [".I..I..", "..II...", "I....I."],
}


@pytest.mark.parametrize("scope", ["every", "latest"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_logits_loss_and_gradients_equal_transformers(rows: list[str], scope: str) -> None:
    """Guards against a swapped gate, a missing norm, a mask by the wrong image; the leak is on."""
    theirs, fusion, backbone = pair(scope=scope, hf_compat=True)
    tokens = [row(text) for text in rows]
    vision = features(sum(text.count("I") for text in rows))
    expected = run_theirs(theirs, tokens, vision, scope)
    logits = run_ours(fusion, backbone, tokens, vision)
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)

    targets = torch.tensor(tokens)[:, 1:].flatten()
    losses = [
        nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), targets) for x in (expected, logits)
    ]
    torch.testing.assert_close(losses[1], losses[0], atol=LOSS, rtol=0)
    for loss in losses:
        loss.backward()
    expected = translate(gradients(theirs))
    for part, module in (("fusion", fusion), ("backbone", backbone)):
        for name, (got, wanted) in grouped(gradients(module), expected[part]).items():
            if rows == ROWS["text alone"] and part == "fusion":
                assert not got.any() and not wanted.any()
                continue
            error = (got - wanted).norm() / wanted.norm()
            assert error < GRADIENT, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("hf_compat", [True, False])
def test_a_row_without_images_is_plain_text(hf_compat: bool) -> None:
    """Guards against a row that changes with the images of the rows beside it."""
    theirs, fusion, backbone = pair(scope="latest", hf_compat=hf_compat)
    rows = [row(".I..I.."), row(".......")]
    logits = run_ours(fusion, backbone, rows, features(2))[1]
    expected = run_theirs(theirs, rows, features(2), "latest")[1]
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)
    plain = backbone.unembed(backbone(torch.tensor(rows)).hidden)
    assert torch.equal(logits, plain[1])


def test_the_leak_of_transformers_is_closed() -> None:
    """Guards against vision in text that precedes its image (transformers #39379, #47845).

    Side by side: transformers, ours in its likeness, and ours, which leaves that text alone.
    """
    theirs, likeness, backbone = pair(scope="latest", hf_compat=True)
    closed, _ = pair(scope="latest")[1:]
    rows, vision, before = [row("...I...")], features(1), 3
    leaking = run_theirs(theirs, rows, vision, "latest")[:, :before]
    logits = run_ours(closed, backbone, rows, vision)[:, :before]
    plain = backbone.unembed(backbone(torch.tensor(rows)).hidden)[:, :before]
    assert torch.equal(logits, plain)
    assert (leaking - plain).abs().amin(0).amax(1).min() > 1e-2  # every one of those tokens
    likened = run_ours(likeness, backbone, rows, vision)[:, :before]
    torch.testing.assert_close(likened, leaking, atol=LOGITS, rtol=0)


def test_an_adapter_differs_from_transformers_where_that_leaks_and_nowhere_else() -> None:
    """Guards against a mask that closes more than the leak, in either branch."""
    theirs, likeness, _ = pair(scope="latest", hf_compat=True)
    closed, _ = pair(scope="latest")[1:]
    rows = [row("..I..I."), row(".......")]
    prompt, vision = layout(rows), features(2)
    hidden = torch.randn(2, 7, D)
    mask, full = modeling_mllama._prepare_cross_attention_mask(
        their_mask(rows, "latest"), num_vision_tokens=P, dtype=torch.float32
    )
    states = torch.zeros(2, 2 * P, D)
    states[0] = theirs.multi_modal_projector(vision).flatten(0, 1)
    expected = theirs.model.layers[THEIR_ADAPTERS[1]](hidden, states, mask, None, full)
    compat, strict = (
        f.adapters[str(LAYERS[1])](hidden, f(hidden, vision, prompt).context)
        for f in (likeness, closed)
    )
    torch.testing.assert_close(compat, expected, atol=LAYER, rtol=0)
    torch.testing.assert_close(strict[0, 2:], expected[0, 2:], atol=LAYER, rtol=0)
    assert torch.equal(strict[0, :2], hidden[0, :2])  # untouched, where transformers leaks
    assert (expected[0, :2] - hidden[0, :2]).abs().amax(1).min() > 1e-2
    assert torch.equal(strict[1], hidden[1])
