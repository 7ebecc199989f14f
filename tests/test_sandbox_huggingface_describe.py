"""Configurations of transformers: every way to write one, and what is refused."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from sandbox.backbone.config import PRESETS, BackboneConfig, RopeScaling
from sandbox.checkpoint import build_model
from sandbox.errors import UserError
from sandbox.huggingface.configure import configure
from sandbox.huggingface.describe import describe
from sandbox.huggingface.names import LAYOUTS, plan
from sandbox.meta import without_memory

# As Meta published Scout's, by the keys of transformers 4.51.
SCOUT: dict[str, Any] = {
    "model_type": "llama4",
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "text_config": {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": 4,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    },
}


def backbone(config: dict[str, Any], *, has_head: bool = True) -> BackboneConfig:
    """The decoder that a configuration describes."""
    return BackboneConfig.of(describe(config, has_head=has_head)["backbone"])


def text(**changes: Any) -> dict[str, Any]:
    """Scout's decoder alone, with changes."""
    return SCOUT["text_config"] | changes


def test_scout_and_maverick_are_the_presets():
    """Guards against a published key that is read wrongly, or not at all."""
    scout = replace(PRESETS["scout"], balance="none")
    maverick = replace(PRESETS["maverick"], balance="none")
    same = {"balance_rate": scout.balance_rate}
    assert replace(backbone(SCOUT), **same) == scout
    changed = text(
        num_local_experts=128,
        interleave_moe_layer_step=2,
        moe_layers=list(range(1, 48, 2)),
        no_rope_layers=[1, 1, 1, 0] * 12,
        use_qk_norm=False,
        rope_scaling=None,
    )
    assert replace(backbone(changed), **same) == maverick


def test_the_published_scout_has_every_parameter():
    """Guards against a plan that leaves out a tensor, or a tower of another size."""
    description = describe(SCOUT, has_head=True)
    with without_memory():
        model = build_model(description)
    own = model.state_dict()
    transfers = plan("llama4", description)
    assert {transfer.ours for transfer in transfers} == own.keys()
    theirs = [name for transfer in transfers for name in transfer.theirs]
    assert len(set(theirs)) == len(theirs) == 48 * (6 + 6) + 3 + 34 * 16 + 7 + 3
    assert sum(x.numel() for x in own.values()) == 108_641_793_536
    assert "language_model.model.layers.7.feed_forward.experts.gate_up_proj" in theirs
    assert "vision_model.vision_adapter.mlp.fc2.weight" in theirs


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attn_temperature_tuning": False}, {"temperature_scale": 0.0}),
        ({"attention_chunk_size": None}, {"chunk": None}),
        ({"layer_types": ["full_attention"] * 48}, {"chunk": None}),
        ({"num_key_value_heads": None}, {"kv_heads": 40}),
        ({"head_dim": None, "hidden_size": 2560}, {"head_dim": 64}),
        ({"moe_layers": []}, {"experts": 0, "moe_every": 1}),
        ({"moe_layers": [2, 5, 8], "num_hidden_layers": 9}, {"experts": 16, "moe_every": 3}),
        ({"moe_layers": [0, 1], "num_hidden_layers": 2}, {"moe_every": 1}),
        ({"interleave_moe_layer_step": 49}, {"experts": 0}),
        ({"no_rope_layers": [1] * 48}, {"nope_every": 0}),
        ({"no_rope_layers": [0] * 48}, {"nope_every": 1}),
        ({"no_rope_layer_interval": 6}, {"nope_every": 6}),
        ({"rope_scaling": None, "rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": None}),
        ({"rope_scaling": {"type": "default"}}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_theta": 7.0},
        ),
        (
            {
                "max_position_embeddings": 99,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                },
            },
            {"rope_scaling": RopeScaling(2, 1, 4, 99)},
        ),
    ],
    ids=lambda value: next(iter(value)),
)
def test_every_way_to_say_it(changes, expected):
    """Guards against keys of other versions that are taken for their defaults."""
    found = backbone(text(**changes))
    assert {key: getattr(found, key) for key in expected} == expected


def test_what_a_file_leaves_out_is_transformers_default():
    """Guards against our defaults in the place of theirs."""
    transformers = pytest.importorskip("transformers")
    pairs = {
        "llama": transformers.LlamaConfig(),
        "llama4_text": transformers.Llama4TextConfig(),
        "llama4": transformers.Llama4Config(
            vision_config={
                "intermediate_size": 4 * 768,
                "projector_input_dim": 7680,
                "projector_output_dim": 7680,
            }
        ),
        "mllama": transformers.MllamaConfig(),
    }
    for model_type, config in pairs.items():
        whole = json.loads(config.to_json_string(use_diff=False))
        bare = {"model_type": model_type}
        if model_type == "llama4":
            bare["vision_config"] = whole["vision_config"]
        assert describe(bare, has_head=False) == describe(whole, has_head=False), model_type
    assert pairs.keys() == LAYOUTS.keys()


def test_a_tied_head_is_the_embedding_unless_it_is_in_the_file():
    """Guards against a head that is dropped, or one that is asked for in vain."""
    tied = text(tie_word_embeddings=True)
    assert backbone(tied, has_head=False).tied
    assert not backbone(tied, has_head=True).tied
    assert not backbone(text(), has_head=False).tied


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen3"}, 'model_type = "qwen3", not one of llama, llama4_text, llama4, m'),
        ({"model_type": None}, "model_type = null, not one of"),
        ({"quantization_config": {"bits": 4}}, "quantised weights have to be dequantised first"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu": only "silu" can be expressed'),
        ({"attention_bias": True}, "attention_bias = true: only false can be expressed"),
        ({"hidden_size": "5120"}, 'hidden_size = "5120": a value of another type is needed'),
        ({"num_hidden_layers": None}, "num_hidden_layers = null: a value of another type"),
        ({"num_hidden_layers": 4, "moe_layers": [0, 3]}, "moe_layers = [0, 3]: only every n-th"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step = 0: must be at least 1"),
        (
            {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0]},
            "no_rope_layers = [0, 1, 1, 0]: only every n-th layer can be chosen",
        ),
        (
            {"num_hidden_layers": 3, "no_rope_layers": [1]},
            "no_rope_layers = [1]: one for each of 3 layers",
        ),
        (
            {"num_hidden_layers": 2, "layer_types": ["chunked_attention", "full_attention"]},
            'layer_types = ["chunked_attention", "full_attention"]: all layers that rotate, or',
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
            'rope_scaling = {"rope_type": "yarn", "factor": 4}: only the types default and llama3',
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters = ",
        ),
        ({"rope_scaling": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_experts_per_tok": 17}, "top_k (17) must lie between 1 and experts (16)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_expressed_is_named(changes, says):
    """Guards against a model that loads, and computes something else."""
    with pytest.raises(UserError, match=re.escape(says)) as error:
        describe(text(**changes), has_head=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pixel_shuffle_ratio": 0.3}, "vision_config.pixel_shuffle_ratio = 0.3: must be 1 over"),
        ({"projector_input_dim": 99}, "vision_config.projector_input_dim = 99: only 4096"),
        ({"intermediate_size": 99}, "vision_config.intermediate_size = 99: only 5632"),
        ({"rope_theta": 1.0}, "only plain ones with a base of 10000"),
        ({"num_channels": 1}, "vision_config.num_channels = 1: only 3"),
        ({"image_size": [336, 336]}, "vision_config.image_size = [336, 336]: a value of another"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_towers_that_cannot_be_expressed_are_named(changes, says):
    """Guards against a tower that loads, and sees something else."""
    config = SCOUT | {"vision_config": SCOUT["vision_config"] | changes}
    with pytest.raises(UserError, match=re.escape(says)):
        describe(config, has_head=True)


@pytest.mark.parametrize(
    ("layers", "adapted"),
    [([3, 8], [3, 7]), ([0], [0]), ([0, 2, 4], [0, 1, 2]), ([3, 99], [3])],
)
def test_cross_attention_layers_become_adapters(layers, adapted):
    """Guards against an adapter one layer too early or late, which a toy may not show."""
    text = {"num_hidden_layers": 10, "cross_attention_layers": layers}
    description = describe({"model_type": "mllama", "text_config": text}, has_head=True)
    assert description["fusion"]["init_args"]["layers"] == adapted
    assert description["backbone"]["layers"] == 10 - len(adapted)
    assert description["backbone"]["input_only"] == 8
    again = configure(description)
    expected = [layer for layer in layers if layer < 10]
    assert again["text_config"]["cross_attention_layers"] == expected
    assert again["text_config"]["num_hidden_layers"] == 10


@pytest.mark.parametrize("layers", [[], [3, 4], [2, 9]], ids=["none", "in a row", "last"])
def test_cross_attention_layers_that_no_adapter_expresses_are_named(layers):
    """Guards against cross-attention that is silently left out."""
    text = {"num_hidden_layers": 10, "cross_attention_layers": layers}
    says = f"text_config.cross_attention_layers = {layers}: each must stand right before a layer"
    with pytest.raises(UserError, match=re.escape(says)):
        describe({"model_type": "mllama", "text_config": text}, has_head=True)


def test_an_imported_configuration_comes_back():
    """Guards against ids, names and limits that a round trip loses, and stale keys it keeps."""
    again = configure(describe(SCOUT, has_head=True), source=SCOUT, dtype="bfloat16")
    kept = {key: again["text_config"][key] for key in ("max_position_embeddings", "vocab_size")}
    assert kept == {"max_position_embeddings": 10485760, "vocab_size": 202048}
    assert again["text_config"]["attn_temperature_tuning"] is True
    assert again["text_config"]["rope_parameters"]["rope_type"] == "llama3"
    assert not {"rope_scaling", "rope_theta"} & again["text_config"].keys()
    assert again["dtype"] == "bfloat16" and "torch_dtype" not in again
    assert describe(again, has_head=True) == describe(SCOUT, has_head=True)
