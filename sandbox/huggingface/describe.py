"""What a configuration of transformers means: the description of our model for it.

Source: transformers' ``models/{llama,llama4,mllama}/configuration_*.py``, with their defaults, and
``modeling_rope_utils.py``. What our parts cannot express is refused by key and value.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from sandbox.backbone.config import BackboneConfig, RopeScaling
from sandbox.errors import UserError
from sandbox.huggingface.names import (
    CROSS_ATTENTION,
    EARLY_FUSION,
    INPUT_ONLY,
    LAYOUTS,
    LLAMA4_VISION,
    MLLAMA_VISION,
)

Part = dict[str, Any]  # class path and arguments of an encoder or a fusion

# What a key means that a configuration leaves out.
_DECODER: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 500_000.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_DECODER,
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_key_value_heads": 0,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
    "llama4_text": {
        **_DECODER,
        "vocab_size": 202_048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "head_dim": 128,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "layer_types": None,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "llama4_vision": {
        "hidden_size": 768,
        "num_hidden_layers": 34,
        "num_attention_heads": 16,
        "num_channels": 3,
        "intermediate_size": 5632,
        "vision_output_dim": 7680,
        "image_size": 448,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10_000.0,
    },
    "mllama_text": {
        **_DECODER,
        "vocab_size": 128_256,
        "num_hidden_layers": 40,
        "intermediate_size": 14_336,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    },
    "mllama_vision": {
        "hidden_size": 1280,
        "hidden_act": "gelu",
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "num_channels": 3,
        "intermediate_size": 5120,
        "vision_output_dim": 7680,
        "image_size": 448,
        "patch_size": 14,
        "norm_eps": 1e-5,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    },
}
# Most tiles of an image's grid, by default of Meta's chat format (``max_num_chunks``) and of
# transformers' image processor (``max_patches``).
LLAMA4_TILES = 16
_NULLABLE = ("num_key_value_heads", "head_dim", "attention_chunk_size")
# What may stand for a default of each type. In old files a switch may be a number.
_TYPES: dict[type, Any] = {
    bool: int,
    int: int,
    float: (int, float),
    str: str,
    list: list,
    type(None): list,
}


def describe(config: Mapping[str, Any], *, has_head: bool) -> dict[str, Any]:
    """The description of our model for a configuration (see ``VisionLanguageModel.describe``).

    It has no tokenizer, and does not even expert load: transformers does not either.

    Args:
        config: what ``config.json`` holds.
        has_head: whether the checkpoint holds a head. One that it holds stays apart from the
            embedding, even if the configuration ties the two.

    Raises:
        UserError: the model type is unknown, or our parts cannot express a value.
    """
    if config.get("quantization_config"):
        raise UserError("quantization_config: quantised weights have to be dequantised first")
    encoder, fusion, max_tiles = None, None, 1
    match config.get("model_type"):
        case "llama":
            backbone = _llama(_Section("llama", config))
        case "llama4_text":
            backbone = _llama4(_Section("llama4_text", config))
        case "llama4":
            backbone = _llama4(_Section("llama4_text", config, "text_config"))
            vision = _Section("llama4_vision", config, "vision_config")
            encoder, fusion = _llama4_vision(vision, backbone)
            max_tiles = LLAMA4_TILES
        case "mllama":
            text = _Section("mllama_text", config, "text_config")
            vision = _Section("mllama_vision", config, "vision_config")
            backbone, adapted = _mllama(text)
            encoder, fusion = _mllama_vision(vision, backbone, adapted)
        case other:
            raise UserError(f"model_type = {json.dumps(other)}, not one of {', '.join(LAYOUTS)}")
    if has_head:
        backbone = replace(backbone, tied=False)
    return {
        "encoder": encoder,
        "fusion": fusion,
        "backbone": asdict(backbone),
        "tokenizer": None,
        "max_tiles": max_tiles,
    }


class _Section:
    """One part of a configuration, its defaults filled in."""

    def __init__(self, kind: str, config: Mapping[str, Any], part: str = "") -> None:
        given = (config.get(part) or {}) if part else config
        if not isinstance(given, Mapping):
            raise UserError(f"{part} must hold keys and values")
        self._part = f"{part}." if part else ""
        self._values = {**_DEFAULTS[kind], **given}
        for key, default in _DEFAULTS[kind].items():
            missing = self[key] is None and (default is None or key in _NULLABLE)
            if not missing and not isinstance(self[key], _TYPES[type(default)]):
                raise self.refusal(key, "a value of another type is needed")

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key that has no default of its own."""
        return self._values.get(key, default)

    def refusal(self, key: str, why: str) -> UserError:
        """The error that names a key and its value."""
        return UserError(f"{self._part}{key} = {json.dumps(self.get(key))}: {why}")

    def require(self, **wanted: Any) -> None:
        """Refuse all but one value of each key."""
        for key, value in wanted.items():
            if self[key] != value:
                raise self.refusal(key, f"only {json.dumps(value)} can be expressed")


def _decoder(text: _Section) -> BackboneConfig:
    """What the decoders have in common; dense, rotary and global in every layer."""
    text.require(hidden_act="silu", attention_bias=False)
    theta, scaling = _rope(text)
    return BackboneConfig(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"] or text["num_attention_heads"],
        head_dim=text["head_dim"] or text["hidden_size"] // text["num_attention_heads"],
        dense_hidden=text["intermediate_size"],
        experts=0,
        balance="none",
        rope_theta=theta,
        rope_scaling=scaling,
        chunk=None,
        nope_every=0,
        qk_norm=False,
        temperature_scale=0.0,
        norm_eps=text["rms_norm_eps"],
        tied=bool(text["tie_word_embeddings"]),
    )


def _rope(section: _Section) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, in the old style of keys or the new."""
    key = "rope_scaling" if section.get("rope_scaling") else "rope_parameters"
    rope = section.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise section.refusal(key, "all layers must share one set of numbers")
    partial = rope.get("partial_rotary_factor", section.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise section.refusal(key, f"partial_rotary_factor is {partial}, only 1 can be expressed")
    theta = float(rope.get("rope_theta", section["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise section.refusal(key, "only the types default and llama3 can be expressed")
    numbers = ("factor", "low_freq_factor", "high_freq_factor")
    if lacking := [name for name in numbers if name not in rope]:
        raise section.refusal(key, f"{lacking[0]} is missing")
    context = "original_max_position_embeddings"
    original = section.get(context) or rope.get(context) or section["max_position_embeddings"]
    factor, low, high = (rope[name] for name in numbers)
    return theta, RopeScaling(factor, low, high, original)


def _llama(text: _Section) -> BackboneConfig:
    text.require(mlp_bias=False)
    return _decoder(text)


def _llama4(text: _Section) -> BackboneConfig:
    config = _decoder(text)
    flags = (text["no_rope_layers"] or [])[: config.layers]
    if flags and len(flags) < config.layers:
        raise text.refusal("no_rope_layers", f"one for each of {config.layers} layers is needed")
    # By their name they are the layers without, but a 1 means that the layer does rotate.
    nope = [i for i, rotates in enumerate(flags) if not rotates] if flags else None
    moe_every = _period(text, "interleave_moe_layer_step", "moe_layers", text["moe_layers"])
    config = replace(
        config,
        dense_hidden=text["intermediate_size_mlp"],
        expert_hidden=text["intermediate_size"],
        experts=text["num_local_experts"] if moe_every else 0,
        top_k=text["num_experts_per_tok"],
        moe_every=moe_every or 1,
        nope_every=_period(text, "no_rope_layer_interval", "no_rope_layers", nope),
        qk_norm=bool(text["use_qk_norm"]),
        temperature_floor=text["floor_scale"],
        temperature_scale=text["attn_scale"] if text["attn_temperature_tuning"] else 0.0,
    )
    chunked = replace(config, chunk=text["attention_chunk_size"])
    types = text["layer_types"] and text["layer_types"][: config.layers]
    if types == layer_types(config):
        return config
    if types not in (None, [], layer_types(replace(config, chunk=1))):
        raise text.refusal("layer_types", "all layers that rotate, or none, can be chunked")
    return chunked


def layer_types(config: BackboneConfig) -> list[str]:
    """What transformers calls local and global layers."""
    local = [config.uses_rope(i) and config.chunk is not None for i in range(config.layers)]
    return ["chunked_attention" if x else "full_attention" for x in local]


def _period(text: _Section, step: str, key: str, chosen: Collection[int] | None) -> int:
    """The n for which layers n - 1, 2n - 1, ... are chosen, by a list or a step; 0 for none."""
    layers = text["num_hidden_layers"]
    if chosen is None:
        if text[step] < 1:
            raise text.refusal(step, "must be at least 1")
        return text[step] if text[step] <= layers else 0
    chosen = set(chosen) & set(range(layers))
    n = min(chosen) + 1 if chosen else 0
    if n and chosen != set(range(n - 1, layers, n)):
        raise text.refusal(key, "only every n-th layer can be chosen")
    return n


def _llama4_vision(vision: _Section, backbone: BackboneConfig) -> tuple[Part, Part]:
    vision.require(num_channels=3)
    if _rope(vision) != (10_000.0, None):
        raise vision.refusal("rope_parameters", "only plain ones with a base of 10000 fit")
    ratio, hidden = vision["pixel_shuffle_ratio"], vision["vision_output_dim"]
    shuffle = round(1 / ratio) if 0 < ratio <= 1 else 0
    if shuffle * ratio != 1:
        raise vision.refusal("pixel_shuffle_ratio", "must be 1 over a whole number")
    vision.require(projector_input_dim=hidden, projector_output_dim=hidden)
    vision.require(intermediate_size=vision["hidden_size"] * shuffle**2)  # what the adapter reads
    encoder = {
        "tile_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "hidden": vision["intermediate_size"],
    }
    fusion = {
        "encoder_width": vision["hidden_size"],
        "encoder_grid": vision["image_size"] // vision["patch_size"],
        "width": backbone.width,
        "projector": "mlp",
        "shuffle": shuffle,
        "hidden": hidden,
    }
    return _part(LLAMA4_VISION, encoder), _part(EARLY_FUSION, fusion)


def _mllama(text: _Section) -> tuple[BackboneConfig, list[int]]:
    """The decoder, and the layers of ours that a cross-attention layer of theirs precedes."""
    config = _decoder(text)
    crossing = sorted(set(text["cross_attention_layers"]) & set(range(config.layers)))
    adapted = [layer - number for number, layer in enumerate(crossing)]
    own = config.layers - len(crossing)
    if not crossing or len(set(adapted)) < len(adapted) or adapted[-1] >= own:
        why = "each must stand right before a layer of self-attention"
        raise text.refusal("cross_attention_layers", why)
    return replace(config, layers=own, input_only=INPUT_ONLY, tied=False), adapted


def _mllama_vision(
    vision: _Section, backbone: BackboneConfig, adapted: list[int]
) -> tuple[Part, Part]:
    vision.require(num_channels=3, hidden_act="gelu")
    intermediate = vision["intermediate_layers_indices"]
    width = vision["hidden_size"] * (1 + len(intermediate))
    vision.require(vision_output_dim=width)
    encoder = {
        "tile_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "global_layers": vision["num_global_layers"],
        "heads": vision["attention_heads"],
        "ffn_hidden": vision["intermediate_size"],
        "intermediate_layers": intermediate,
        "max_tiles": vision["max_num_tiles"],
        "arrangements": vision["supported_aspect_ratios"],
        "norm_eps": vision["norm_eps"],
    }
    fusion = {
        "encoder_width": width,
        "encoder_grid": vision["image_size"] // vision["patch_size"],
        "width": backbone.width,
        "layers": adapted,
        "heads": backbone.heads,
        "kv_heads": backbone.kv_heads,
        "head_dim": backbone.head_dim,
        "hidden": backbone.dense_hidden,
        "norm_eps": backbone.norm_eps,
        # What transformers' processor arranges, and Llama 3.2 Vision was trained on.
        "scope": "latest",
    }
    return _part(MLLAMA_VISION, encoder), _part(CROSS_ATTENTION, fusion)


def _part(class_path: str, init_args: dict[str, Any]) -> Part:
    return {"class_path": class_path, "init_args": init_args}
