"""Transformers' Llama 4 as the reference: the same configuration, and its weights under our names.

Everything is written out here and rests on nothing in ``sandbox.checkpoint``: a parity test that
imported weights with the code under test would share its mistakes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

from sandbox.backbone.config import BackboneConfig, RopeScaling
from sandbox.backbone.transformer import Backbone

# Agreement in fp32: logits, what a layer returns, loss; gradients by relative L2 norm.
LOGITS, LAYER, LOSS, GRADIENT = 2e-5, 5e-5, 1e-5, 1e-4

# Scout's has no band between kept and stretched wavelengths; Llama 3.1's has one.
SCOUT_SCALING = RopeScaling(factor=16, low=1, high=1, original_context=64)
BAND_SCALING = RopeScaling(factor=8, low=1, high=4, original_context=64)

# Every feature on: a NoPE layer among RoPE layers, chunks shorter than any sequence, a floor that
# several temperatures lie above, and an epsilon large enough that another one would show.
TOY = BackboneConfig(
    vocab_size=97,
    width=64,
    layers=6,
    heads=4,
    kv_heads=2,
    head_dim=16,
    dense_hidden=80,
    expert_hidden=48,
    experts=4,
    balance="none",
    chunk=8,
    temperature_floor=4,
    norm_eps=0.01,
)


def text_config(config: BackboneConfig) -> Llama4TextConfig:
    """The configuration that means the same to transformers."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": float(config.rope_scaling.factor),
            "low_freq_factor": float(config.rope_scaling.low),
            "high_freq_factor": float(config.rope_scaling.high),
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    return Llama4TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.expert_hidden,
        intermediate_size_mlp=config.dense_hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.experts or 1,
        num_experts_per_tok=config.top_k,
        interleave_moe_layer_step=config.moe_every,
        moe_layers=None if config.experts else [],
        # They refuse None; a chunk that nothing outgrows means the same.
        attention_chunk_size=config.chunk or 4096,
        no_rope_layer_interval=config.nope_every or config.layers + 1,
        use_qk_norm=config.qk_norm,
        attn_temperature_tuning=bool(config.temperature_scale),
        floor_scale=config.temperature_floor,
        attn_scale=config.temperature_scale,
        rope_parameters=rope,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=512,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every parameter anew: no ones, no zeros, nothing that a swap would leave unseen.

    Matrices at the inverse root of the toy's width, so that logits stay near unit scale and fp32
    tolerances mean what they say.
    """
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
        parameter.normal_(mean=1.0 if norm else 0.0, std=0.3 if norm else TOY.width**-0.5)


def decoder_pair(config: BackboneConfig, seed: int = 0) -> tuple[Llama4ForCausalLM, Backbone]:
    """Transformers' decoder and ours, with the same random weights."""
    torch.manual_seed(seed)
    theirs = Llama4ForCausalLM(text_config(config)).eval()
    randomize(theirs)
    ours = Backbone(config).eval()
    ours.load_state_dict(decoder_weights(theirs.state_dict()), strict=config.balance != "bias")
    return theirs, ours


def decoder_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``Llama4ForCausalLM`` (weights or gradients) under our names."""
    layer = {
        "input_layernorm.weight": "attention_norm.weight",
        "self_attn.q_proj.weight": "attention.query.weight",
        "self_attn.k_proj.weight": "attention.key.weight",
        "self_attn.v_proj.weight": "attention.value.weight",
        "self_attn.o_proj.weight": "attention.output.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "feed_forward.down_proj.weight": "ffn.down.weight",
        "feed_forward.router.weight": "ffn.router.weight",
        "feed_forward.experts.gate_up_proj": "ffn.experts.gate_up",
        "feed_forward.experts.down_proj": "ffn.experts.down",
        "feed_forward.shared_expert.down_proj.weight": "ffn.shared.down.weight",
    }
    whole = {
        "model.embed_tokens.weight": "embed.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    ours = {}
    for name, tensor in state.items():
        if name in whole:
            ours[whole[name]] = tensor
            continue
        _, _, number, rest = name.split(".", 3)
        if rest.endswith("gate_proj.weight"):
            target = "ffn.shared" if "shared_expert" in rest else "ffn"
            up = state[name.replace("gate_proj", "up_proj")]
            ours[f"layers.{number}.{target}.gate_up.weight"] = torch.cat((tensor, up))
        elif not rest.endswith("up_proj.weight"):
            ours[f"layers.{number}.{layer[rest]}"] = tensor
    return ours


def tokens_of(rows: int, T: int = 29) -> Tensor:
    """Random token ids ``[rows, T]``; by default three chunks of the toy and a part of another."""
    return torch.randint(0, TOY.vocab_size, (rows, T), generator=torch.Generator().manual_seed(1))


def logits_of(model: Backbone, tokens: Tensor, **where: Tensor) -> Tensor:
    """Our logits of a full forward pass, without gradient."""
    with torch.no_grad():
        return model.unembed(model(tokens, **where).hidden)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Every gradient of ``ours`` equals the one of that name, by relative L2 norm."""
    for name, gradient in gradients(ours).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < GRADIENT, f"gradient of {name}: relative error {error:.1e}"


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What each of the layers returns, in order of the calls."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    yield outputs
    for hook in hooks:
        hook.remove()


def their_greedy(model: nn.Module, prompt: Tensor, steps: int, **inputs: Tensor) -> list[int]:
    """The ids that transformers' own cached ``generate`` adds to ``prompt [1, T]``.

    Its full forward pass over them chooses the same ids, so the reference agrees with itself.
    """
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        do_sample=False,
        **inputs,
    )
    with torch.no_grad():
        full = model(ids[:, :-1], **inputs).logits.argmax(dim=-1)
    replies = ids[0, prompt.shape[1] :].tolist()
    assert full[0, prompt.shape[1] - 1 :].tolist() == replies
    return replies
