"""Which tensor of transformers is which of ours, and what changes between the two.

A plan is a list of transfers; each maps one of our tensors to one or more of theirs, and converts
exactly in both directions. Source: the modules of transformers' ``models/llama``, ``llama4`` and
``mllama``.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sandbox.backbone.config import BackboneConfig

LLAMA4_VISION = "encoders.llama4_vit.Llama4Vision"
MLLAMA_VISION = "encoders.mllama_vit.MllamaVision"
EARLY_FUSION = "fusion.early.EarlyFusion"
CROSS_ATTENTION = "fusion.cross_attention.CrossAttention"

INPUT_ONLY = 8  # rows by which mllama's embedding exceeds its head


@dataclass(frozen=True)
class Transfer:
    """One of our tensors and what transformers makes of it.

    Attributes:
        ours: its name here.
        theirs: its names there, in the order in which their rows are joined to ours. None at all
            means that transformers has no such tensor, and behaves as if it were zero.
        heads: where transformers rotates the halves of each head and we rotate adjacent pairs, the
            number of heads; else 0.
    """

    ours: str
    theirs: tuple[str, ...]
    heads: int = 0

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """Our tensor, made of theirs.

        Within a head, rows ``x0 x1 y0 y1``, where (x0, y0) and (x1, y1) turn together, become
        ``x0 y0 x1 y1``.
        """
        x = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
        if self.heads:
            x = x.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return x

    def to_theirs(self, x: Tensor) -> dict[str, Tensor]:
        """Their tensors by name, made of ours."""
        if self.heads:
            x = x.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return dict(zip(self.theirs, x.chunk(len(self.theirs) or 1), strict=False))


class Layout(NamedTuple):
    """Prefixes of the parts of a model in a checkpoint."""

    body: str  # the decoder without its head
    head: str
    vision: str = ""
    projector: str = ""


_PARTS = ("vision_model.", "multi_modal_projector.")

# The first of each is what transformers 5 writes, as does the Hub. Its loader understands the
# others too, which other versions wrote, or models saved without their head.
LAYOUTS = {
    "llama": (Layout("model.", "lm_head."), Layout("", "lm_head.")),
    "llama4_text": (
        Layout("model.", "lm_head."),
        Layout("language_model.model.", "language_model.lm_head."),
    ),
    "llama4": (Layout("language_model.model.", "language_model.lm_head.", *_PARTS),),
    "mllama": (
        Layout("language_model.model.", "language_model.lm_head.", *_PARTS),
        Layout("model.language_model.", "lm_head.", *(f"model.{part}" for part in _PARTS)),
    ),
}


def layout_of(model_type: str, names: Collection[str]) -> int:
    """The number of the layout that a checkpoint with these tensor names has; 0 if none fits."""
    layouts = LAYOUTS.get(model_type, ())
    fits = [f"{layout.body}embed_tokens.weight" in names for layout in layouts]
    return fits.index(True) if True in fits else 0


def has_head(model_type: str, layout: int, names: Collection[str]) -> bool:
    """Whether a head is among the tensors of a checkpoint."""
    return model_type in LAYOUTS and f"{LAYOUTS[model_type][layout].head}weight" in names


def plan(model_type: str, description: Mapping[str, Any], layout: int = 0) -> list[Transfer]:
    """How every tensor of a described model transfers (see ``VisionLanguageModel.describe``)."""
    prefixes = LAYOUTS[model_type][layout]
    config = BackboneConfig.of(description["backbone"])
    fusion = description["fusion"]
    adapted = fusion["init_args"]["layers"] if model_type == "mllama" else ()
    transfers = [
        Transfer("backbone.embed.weight", (f"{prefixes.body}embed_tokens.weight",)),
        *_decoder(model_type, config, prefixes.body, adapted),
        Transfer("backbone.norm.weight", (f"{prefixes.body}norm.weight",)),
    ]
    if not config.tied:
        transfers.append(Transfer("backbone.head.weight", (f"{prefixes.head}weight",)))
    if model_type == "llama4":
        transfers += _llama4_vision(description["encoder"]["init_args"]["layers"], prefixes)
    if model_type == "mllama":
        transfers += _mllama_vision(description["encoder"]["init_args"], prefixes)
    return transfers


def _decoder(
    model_type: str, config: BackboneConfig, body: str, adapted: Collection[int]
) -> Iterator[Transfer]:
    """The layers; an adapter before one of ours is a cross-attention layer of its own there."""
    halves = model_type in ("llama", "mllama")
    ffn = "mlp" if halves else "feed_forward"
    number = 0
    for i in range(config.layers):
        if i in adapted:
            yield from _adapter(f"fusion.adapters.{i}.", f"{body}layers.{number}.")
            number += 1
        ours, theirs = f"backbone.layers.{i}.", f"{body}layers.{number}."
        number += 1
        heads = (config.heads, config.kv_heads) if halves else (0, 0)
        yield from _attention(f"{ours}attention.", f"{theirs}self_attn.", *heads)
        yield from _same(
            ours,
            theirs,
            {
                "attention_norm.weight": "input_layernorm.weight",
                "ffn_norm.weight": "post_attention_layernorm.weight",
            },
        )
        if not config.is_moe(i):
            yield from _swiglu(f"{ours}ffn.", f"{theirs}{ffn}.")
            continue
        yield from _same(
            f"{ours}ffn.",
            f"{theirs}feed_forward.",
            {
                "router.weight": "router.weight",
                "experts.gate_up": "experts.gate_up_proj",
                "experts.down": "experts.down_proj",
            },
        )
        yield from _swiglu(f"{ours}ffn.shared.", f"{theirs}feed_forward.shared_expert.")
        if config.balance == "bias":
            yield Transfer(f"{ours}ffn.balance_bias", ())


def _attention(ours: str, theirs: str, heads: int = 0, kv_heads: int = 0) -> Iterator[Transfer]:
    rows = {"query": ("q", heads), "key": ("k", kv_heads), "value": ("v", 0), "output": ("o", 0)}
    for name, (letter, turned) in rows.items():
        yield Transfer(f"{ours}{name}.weight", (f"{theirs}{letter}_proj.weight",), turned)


def _swiglu(ours: str, theirs: str) -> Iterator[Transfer]:
    gate_up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    yield Transfer(f"{ours}gate_up.weight", gate_up)
    yield Transfer(f"{ours}down.weight", (f"{theirs}down_proj.weight",))


def _same(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[Transfer]:
    """Tensors that differ in name alone; a name that ends in a dot has a weight and a bias."""
    for name, their_name in names.items():
        for end in ("weight", "bias") if name.endswith(".") else ("",):
            yield Transfer(f"{ours}{name}{end}", (f"{theirs}{their_name}{end}",))


def _adapter(ours: str, theirs: str) -> Iterator[Transfer]:
    """A gated cross-attention layer. Its queries and keys are not rotated."""
    yield from _attention(f"{ours}attention.", f"{theirs}cross_attn.")
    yield from _swiglu(f"{ours}ffn.", f"{theirs}mlp.")
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "attention.query_norm.weight": "cross_attn.q_norm.weight",
        "attention.key_norm.weight": "cross_attn.k_norm.weight",
        "attention_gate": "cross_attn_attn_gate",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate": "cross_attn_mlp_gate",
    }
    yield from _same(ours, theirs, names)


def _llama4_vision(layers: int, prefixes: Layout) -> Iterator[Transfer]:
    """Tower, adapter and projector of Llama 4."""
    tower = {
        "patch_embed.weight": "patch_embedding.linear.weight",
        "class_token": "class_embedding",
        "positions": "positional_embedding_vlm",
        "norm_pre.": "layernorm_pre.",
        "norm_post.": "layernorm_post.",
    }
    layer = {
        "attention_norm.": "input_layernorm.",
        "attention.query.": "self_attn.q_proj.",
        "attention.key.": "self_attn.k_proj.",
        "attention.value.": "self_attn.v_proj.",
        "attention.output.": "self_attn.o_proj.",
        "mlp_norm.": "post_attention_layernorm.",
        "mlp.fc1.": "mlp.fc1.",
        "mlp.fc2.": "mlp.fc2.",
    }
    projector = {
        "fc1.weight": f"{prefixes.vision}vision_adapter.mlp.fc1.weight",
        "fc2.weight": f"{prefixes.vision}vision_adapter.mlp.fc2.weight",
        "project.weight": f"{prefixes.projector}linear_1.weight",
    }
    yield from _same("encoder.", prefixes.vision, tower)
    for i in range(layers):
        yield from _same(f"encoder.layers.{i}.", f"{prefixes.vision}model.layers.{i}.", layer)
    yield from _same("fusion.projector.", "", projector)


def _mllama_vision(tower: Mapping[str, Any], prefixes: Layout) -> Iterator[Transfer]:
    """Tower and projector of Llama 3.2 Vision; the adapters belong to the decoder's layers."""
    whole = {
        "patch_embed.weight": "patch_embedding.weight",
        "class_token": "class_embedding",
        "position.patch": "gated_positional_embedding.embedding",
        "position.tile.weight": "gated_positional_embedding.tile_embedding.weight",
        "position.gate": "gated_positional_embedding.gate",
        "tile_before.table.weight": "pre_tile_positional_embedding.embedding.weight",
        "tile_before.gate": "pre_tile_positional_embedding.gate",
        "tile_after.table.weight": "post_tile_positional_embedding.embedding.weight",
        "tile_after.gate": "post_tile_positional_embedding.gate",
        "norm_before.": "layernorm_pre.",
        "norm_after.": "layernorm_post.",
    }
    layer = {
        "attention_norm.": "input_layernorm.",
        "ffn_norm.": "post_attention_layernorm.",
        "ffn.up.": "mlp.fc1.",
        "ffn.down.": "mlp.fc2.",
    }
    gates = {"attention_gate": "gate_attn", "ffn_gate": "gate_ffn"}
    yield from _same("encoder.", prefixes.vision, whole)
    parts = {"layers": ("transformer", {}), "global_layers": ("global_transformer", gates)}
    for part, (their_part, extra) in parts.items():
        for i in range(tower[part]):
            ours, theirs = f"encoder.{part}.{i}.", f"{prefixes.vision}{their_part}.layers.{i}."
            yield from _same(ours, theirs, layer | extra)
            yield from _attention(f"{ours}attention.", f"{theirs}self_attn.")
    yield from _same("fusion.", "", {"projector.": prefixes.projector})


def to_ours(
    transfers: Sequence[Transfer], tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Our tensors, made of all of theirs, which leave ``tensors`` as they are used.

    They are used in the order in which they stand there, so that of a sharded checkpoint, whose
    tensors are views of its files, no more than a shard or two are in memory at once. Ours are
    copies. ``dtype`` None keeps each tensor's.
    """
    place = {name: number for number, name in enumerate(tensors)}
    ours = {}
    for transfer in sorted(transfers, key=lambda t: max(place[name] for name in t.theirs)):
        parts = [tensors.pop(name) for name in transfer.theirs]
        tensor = transfer.to_ours(parts).to(dtype)
        shared = tensor.data_ptr() == parts[0].data_ptr()
        ours[transfer.ours] = tensor.clone() if shared else tensor
    return ours


def to_theirs(
    transfers: Sequence[Transfer], tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> Iterator[dict[str, Tensor]]:
    """Their tensors, made of ours, which leave ``tensors`` as they are used."""
    for transfer in transfers:
        yield transfer.to_theirs(tensors.pop(transfer.ours).to(dtype))
