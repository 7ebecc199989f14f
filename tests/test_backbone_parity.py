"""The backbone is Llama 4: parity with transformers at toy width, every feature on."""

import itertools

import pytest
import torch
from torch import Tensor

from sandbox.backbone.config import BackboneConfig, RopeScaling
from sandbox.backbone.transformer import Backbone

transformers = pytest.importorskip("transformers", reason="parity needs transformers")

LAYERS, VOCABULARY, T = 6, 97, 29


def pair(top_k: int, moe_every: int, qk_norm: bool, scaled: bool):
    """Transformers' model and ours on the same random, non-degenerate weights."""
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
    }
    theirs = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=48,
            intermediate_size_mlp=80,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=top_k,
            interleave_moe_layer_step=moe_every,
            attention_chunk_size=8,
            use_qk_norm=qk_norm,
            attn_temperature_tuning=True,
            floor_scale=4,
            attn_scale=0.1,
            rope_parameters={"rope_theta": 5e5} | (scaling if scaled else {"rope_type": "default"}),
            rms_norm_eps=1e-5,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    for parameter in theirs.parameters():
        matrix = parameter.ndim > 1
        torch.nn.init.normal_(parameter, mean=0.0 if matrix else 1.0, std=0.2 if matrix else 0.3)
    ours = Backbone(
        BackboneConfig(
            vocab_size=VOCABULARY,
            width=64,
            layers=LAYERS,
            heads=4,
            kv_heads=2,
            head_dim=16,
            dense_hidden=80,
            expert_hidden=48,
            experts=4,
            top_k=top_k,
            moe_every=moe_every,
            balance="none",
            rope_scaling=RopeScaling(16, 1, 1, 32) if scaled else None,
            chunk=8,
            nope_every=4,
            qk_norm=qk_norm,
            temperature_floor=4,
            temperature_scale=0.1,
        )
    )
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs, ours


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' tensors under our names."""
    ours = {
        "embed.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    projections = {"q": "query", "k": "key", "v": "value", "o": "output"}
    for i in range(LAYERS):
        their, our = f"model.layers.{i}", f"layers.{i}"
        ours[f"{our}.attention_norm.weight"] = state[f"{their}.input_layernorm.weight"]
        ours[f"{our}.ffn_norm.weight"] = state[f"{their}.post_attention_layernorm.weight"]
        for letter, name in projections.items():
            ours[f"{our}.attention.{name}.weight"] = state[
                f"{their}.self_attn.{letter}_proj.weight"
            ]
        source, target = f"{their}.feed_forward", f"{our}.ffn"
        if f"{source}.router.weight" in state:
            ours[f"{target}.router.weight"] = state[f"{source}.router.weight"]
            ours[f"{target}.experts.gate_up"] = state[f"{source}.experts.gate_up_proj"]
            ours[f"{target}.experts.down"] = state[f"{source}.experts.down_proj"]
            source, target = f"{source}.shared_expert", f"{target}.shared"
        gate, up = state[f"{source}.gate_proj.weight"], state[f"{source}.up_proj.weight"]
        ours[f"{target}.gate_up.weight"] = torch.cat((gate, up))
        ours[f"{target}.down.weight"] = state[f"{source}.down_proj.weight"]
    return ours


GRID = list(itertools.product((1, 2), (1, 2), (True, False), (True, False)))


@pytest.mark.parametrize(("top_k", "moe_every", "qk_norm", "scaled"), GRID)
def test_logits_loss_and_gradients_equal_transformers(top_k, moe_every, qk_norm, scaled):
    """Guards against a misplaced norm, a swapped gate, half-rotated RoPE, a wrong chunk edge."""
    torch.manual_seed(0)
    theirs, ours = pair(top_k, moe_every, qk_norm, scaled)
    tokens = torch.randint(0, VOCABULARY, (2, T))
    expected = theirs(tokens).logits
    logits = ours.unembed(ours(tokens).hidden)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)

    losses = [
        torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for x in (expected, logits)
    ]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    gradients = translate({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-4, f"gradient of {name}: relative error {error:.1e}"
