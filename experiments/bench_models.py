"""The two models side by side: one configuration, the same weights, the same steps."""

from collections.abc import Callable
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench_measure import Bench
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.loss import chunked_cross_entropy
from sandbox.backbone.transformer import Backbone
from sandbox.errors import UserError
from sandbox.huggingface.configure import configure
from sandbox.huggingface.names import plan

FULL = BackboneConfig(
    vocab_size=4096,
    width=256,
    layers=8,
    heads=8,
    kv_heads=2,
    head_dim=32,
    expert_hidden=512,
    experts=16,
    chunk=128,
    balance="none",
)
MINIATURE = replace(
    FULL, vocab_size=64, width=32, layers=4, heads=4, head_dim=8, expert_hidden=16, chunk=8
)


def transformers() -> ModuleType:
    """The package compared with.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "the benchmark compares with transformers, which is not installed: run `uv sync`"
        ) from None
    return transformers


def shape(bench: Bench, **changes: Any) -> BackboneConfig:
    """The benchmark's model, or its miniature, with changes."""
    return replace(bench.pick(FULL, MINIATURE), **changes)


def twins(
    config: BackboneConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Backbone, nn.Module]:
    """Ours and transformers' ``Llama4ForCausalLM`` on the same random weights.

    Theirs attends by its default, SDPA.
    """
    package = transformers()
    description = {"encoder": None, "fusion": None, "backbone": asdict(config)}
    torch.manual_seed(0)
    theirs = package.AutoModelForCausalLM.from_config(
        package.AutoConfig.for_model(**configure(description)),
        attn_implementation="sdpa",
        dtype=dtype,
    ).to(device)
    ours = Backbone(config).to(device, dtype)
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            transfer.ours.removeprefix("backbone."): transfer.to_ours(
                [state[name] for name in transfer.theirs]
            )
            for transfer in plan("llama4_text", description)
        }
    )
    return ours, theirs


def random_tokens(bench: Bench, config: BackboneConfig, B: int, T: int) -> Tensor:
    """Random tokens ``[B, T]``, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (B, T), generator=generator).to(bench.device)


Step = Callable[[], Tensor]


def training_step(model: nn.Module, loss: Step) -> Step:
    """Forward, backward and AdamW; the same optimizer for both models. Returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def our_loss(ours: Backbone, tokens: Tensor, forward: nn.Module | None = None) -> Step:
    """The loss of next tokens as training computes it: logits only a chunk of tokens at a time.

    ``forward`` may stand in for calling ``ours``, e.g. its compiled self.
    """
    forward = ours if forward is None else forward

    def loss() -> Tensor:
        hidden = forward(tokens).hidden[:, :-1].flatten(0, 1)
        return chunked_cross_entropy(hidden, ours.head.weight, tokens[:, 1:].flatten())[0]

    return loss


def their_loss(theirs: nn.Module, tokens: Tensor) -> Step:
    """The loss of next tokens as transformers' training computes it, without a cache."""
    return lambda: theirs(input_ids=tokens, labels=tokens, use_cache=False).loss


def matmul_weights(config: BackboneConfig) -> int:
    """Weights that a token is multiplied with in the layers (the head aside)."""
    heads = 2 * config.heads + 2 * config.kv_heads  # query and output, key and value
    weights = config.layers * config.width * heads * config.head_dim
    for layer in range(config.layers):
        if config.is_moe(layer):
            visited = config.top_k + config.shared_expert
            weights += config.width * (config.experts + visited * 3 * config.expert_hidden)
        else:
            weights += 3 * config.width * config.dense_hidden
    return weights


def matmul_flops(config: BackboneConfig, B: int, T: int, *, train: bool) -> int:
    """Floating-point operations of the matmuls that rows ``[B, T]`` cannot do without.

    A weight costs 2 a token forwards and 4 backwards (its gradient and its input's); a query and a
    key that it sees cost 4 * K forwards (score, mix) and 8 * K backwards. What no query sees, and
    what an implementation computes twice, does not count. Training predicts all tokens but the
    first of a row, inference only what follows the last.
    """
    pairs = 0
    for layer in range(config.layers):
        local = config.uses_rope(layer) and config.chunk is not None
        C = min(config.chunk, T) if local and config.chunk else T
        full, rest = divmod(T, C)
        pairs += full * C * (C + 1) // 2 + rest * (rest + 1) // 2
    forward = 2 * B * T * matmul_weights(config)
    forward += 2 * B * (T - 1 if train else 1) * config.vocab_size * config.width
    forward += 4 * B * pairs * config.heads * config.head_dim
    return 3 * forward if train else forward


def training_memory(config: BackboneConfig, visits: int, itemsize: int = 4) -> float:
    """Bytes that both models take in training, transformers sending ``visits`` to every expert.

    Weights and two moments of each model, the gradients of one, and what autograd keeps of
    transformers' experts: their input before and after the gate, gate and up, and two products.
    """
    expert = 3 * config.width * config.expert_hidden
    weights = config.layers * config.experts * expert
    kept = config.layers * config.experts * visits * (2 * config.width + 4 * config.expert_hidden)
    return itemsize * (7 * weights + 1.2 * kept)
