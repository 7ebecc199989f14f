"""What transformers has to be told of a model of ours: its configuration.

``describe`` backwards. What transformers cannot express is refused, and every reason named.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from encoders.mllama_vit import every_arrangement
from fusion.layout import IMAGE, IMAGE_END, IMAGE_START, PATCH
from sandbox.backbone.config import BackboneConfig
from sandbox.errors import UserError
from sandbox.huggingface.describe import layer_types
from sandbox.huggingface.names import (
    CROSS_ATTENTION,
    EARLY_FUSION,
    INPUT_ONLY,
    LLAMA4_VISION,
    MLLAMA_VISION,
)
from sandbox.tokenizer import Tokenizer

Values = dict[str, Any]

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}
_PARTS = {"llama4": (LLAMA4_VISION, EARLY_FUSION), "mllama": (MLLAMA_VISION, CROSS_ATTENTION)}

# What transformers' classes leave no choice about.
_DENSE: Values = {"experts": 0, "nope_every": 0, "chunk": None, "qk_norm": False}
_MIXTURE: Values = {"router_score": "sigmoid", "router_placement": "input", "shared_expert": True}

# Told in another way by ``configure``, or no longer true.
_OBSOLETE = {
    "dtype",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
}


def configure(
    description: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    source: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> Values:
    """What ``config.json`` has to hold for a model.

    Args:
        description: of the model, see ``VisionLanguageModel.describe``.
        tokenizer: gives the ids of special tokens.
        source: the configuration that the model was imported from, if it was: its model type and
            whatever does not concern the architecture stay as they were.
        dtype: of the weights.

    Raises:
        UserError: transformers cannot express the model; the message names every reason.
    """
    source = source or {}
    model_type = _model_type(description, source.get("model_type"))
    config = BackboneConfig.of(description["backbone"])
    values: Values = {
        "model_type": model_type,
        "architectures": [_CLASSES[model_type]],
        "dtype": dtype,
    }
    ends: Values = {}
    if tokenizer is not None:
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.stop_ids)}
    if model_type in ("llama", "llama4_text"):
        return ends | _kept(source) | values | _text(model_type, config)

    encoder, fusion = description["encoder"]["init_args"], description["fusion"]["init_args"]
    if model_type == "llama4":
        text, vision = _text("llama4_text", config), _llama4_vision(encoder, fusion, config.width)
        marks = {"boi_token_index": IMAGE_START, "eoi_token_index": IMAGE_END}
        marks["image_token_index"] = PATCH
        values["tie_word_embeddings"] = False  # the decoder's stands in its own section
    else:
        text, vision = _mllama_text(config, fusion["layers"]), _mllama_vision(encoder)
        marks = {"image_token_index": IMAGE}
        ends["pad_token_id"] = None  # by default an id that a small embedding lacks
    indices = {} if tokenizer is None else {k: tokenizer.special(v) for k, v in marks.items()}
    return {
        **indices,
        **_kept(source),
        **values,
        "text_config": ends | _kept(source.get("text_config")) | text,
        "vision_config": _kept(source.get("vision_config")) | vision,
    }


def _kept(source: Mapping[str, Any] | None) -> Values:
    return {key: value for key, value in (source or {}).items() if key not in _OBSOLETE}


def _model_type(description: Mapping[str, Any], imported: str | None) -> str:
    """The model type that can express the model; the one it came from before others."""
    fusion = description["fusion"]
    if fusion is None:
        candidates = [imported] if imported else ["llama", "llama4_text"]
    else:
        candidates = ["mllama" if fusion["class_path"] == CROSS_ATTENTION else "llama4"]
    reasons: list[str] = []
    for model_type in candidates:
        reasons = list(_obstacles(model_type, description))
        if not reasons:
            return model_type
    raise UserError(f"transformers' {candidates[-1]} cannot express it: {'; '.join(reasons)}")


def _obstacles(model_type: str, description: Mapping[str, Any]) -> Iterator[str]:
    """Why a model type cannot express a model."""
    config = BackboneConfig.of(description["backbone"])
    fixed: Values = {"input_only": 0}
    if model_type in ("llama", "mllama"):
        fixed = fixed | _DENSE
    elif any(config.is_moe(i) for i in range(config.layers)):
        fixed = fixed | _MIXTURE
    if model_type == "mllama":
        fixed |= {"input_only": INPUT_ONLY, "head_dim": config.width // config.heads}
    if model_type == "llama" and config.width % config.heads:
        yield f"backbone.width {config.width} does not divide by heads {config.heads}"
    yield from _differing("backbone", fixed, description["backbone"])

    if model_type not in _PARTS:
        return
    parts = {part: description[part] for part in ("encoder", "fusion")}
    others = [
        f"the {name} is {part['class_path']}, not {wanted}"
        for (name, part), wanted in zip(parts.items(), _PARTS[model_type], strict=True)
        if part["class_path"] != wanted
    ]
    if others:
        yield from others
        return
    encoder, fusion = (part["init_args"] for part in parts.values())
    if model_type == "mllama":
        shared = {
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "hidden": config.dense_hidden,
            "norm_eps": config.norm_eps,
        }
        yield from _differing("fusion", shared, fusion)
        return
    causal = {"bidirectional": False}  # absent before it could be chosen
    yield from _differing("fusion", {"projector": "mlp"} | causal, causal | fusion)
    if fusion["shuffle"] not in (1, 2, 4, 8):  # its inverse is told, and has to be exact
        yield f"fusion.shuffle is {fusion['shuffle']}, must be 1, 2, 4 or 8"
    merged = {"hidden": encoder["width"] * fusion["shuffle"] ** 2}
    yield from _differing("encoder", merged, encoder)


def _differing(part: str, fixed: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in fixed.items():
        if values[key] != value:
            yield f"{part}.{key} is {json.dumps(values[key])}, must be {json.dumps(value)}"


def _text(model_type: str, config: BackboneConfig) -> Values:
    """The decoder's section, but for the ids of special tokens."""
    rope: Values = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": float(config.rope_scaling.factor),
            "low_freq_factor": float(config.rope_scaling.low),
            "high_freq_factor": float(config.rope_scaling.high),
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.dense_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": rope,
    }
    if model_type != "llama4_text":
        return common
    every = range(config.layers)
    return common | {
        "model_type": "llama4_text",
        "intermediate_size": config.expert_hidden,
        "intermediate_size_mlp": config.dense_hidden,
        "num_local_experts": config.experts or 1,
        "num_experts_per_tok": config.top_k,
        "moe_layers": [i for i in every if config.is_moe(i)],
        "interleave_moe_layer_step": config.moe_every,
        "use_qk_norm": config.qk_norm,
        "no_rope_layers": [int(config.uses_rope(i)) for i in every],
        "no_rope_layer_interval": config.nope_every or config.layers + 1,
        "layer_types": layer_types(config),
        # A number is needed even where ``layer_types`` names no layer that it concerns.
        "attention_chunk_size": config.chunk or 8192,
        "attn_temperature_tuning": config.temperature_scale != 0,
        "attn_scale": float(config.temperature_scale),
        "floor_scale": config.temperature_floor,
    }


def _llama4_vision(encoder: Values, fusion: Values, width: int) -> Values:
    hidden = fusion["hidden"] or width
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": encoder["width"],
        "num_hidden_layers": encoder["layers"],
        "num_attention_heads": encoder["heads"],
        "intermediate_size": encoder["hidden"],
        "image_size": encoder["tile_size"],
        "patch_size": encoder["patch_size"],
        "pixel_shuffle_ratio": 1 / fusion["shuffle"],
        "projector_input_dim": hidden,
        "projector_output_dim": hidden,
        "vision_output_dim": hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }


def _mllama_text(config: BackboneConfig, adapted: list[int]) -> Values:
    values = _text("mllama", config)
    del values["head_dim"]
    return values | {
        "model_type": "mllama_text_model",
        "num_hidden_layers": config.layers + len(adapted),
        "cross_attention_layers": [i + number for number, i in enumerate(sorted(adapted))],
    }


def _mllama_vision(encoder: Values) -> Values:
    intermediate = encoder["intermediate_layers"]
    arrangements = encoder["arrangements"] or every_arrangement(encoder["max_tiles"])
    return {
        "model_type": "mllama_vision_model",
        "hidden_size": encoder["hidden"],
        "hidden_act": "gelu",
        "num_hidden_layers": encoder["layers"],
        "num_global_layers": encoder["global_layers"],
        "attention_heads": encoder["heads"],
        "intermediate_size": encoder["ffn_hidden"],
        "intermediate_layers_indices": list(intermediate),
        "vision_output_dim": encoder["hidden"] * (1 + len(intermediate)),
        "image_size": encoder["tile_size"],
        "patch_size": encoder["patch_size"],
        "max_num_tiles": encoder["max_tiles"],
        "supported_aspect_ratios": [list(sides) for sides in arrangements],
        "norm_eps": encoder["norm_eps"],
    }
