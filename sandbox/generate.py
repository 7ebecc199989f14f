"""Cached decoding over multimodal prompts of unequal length."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sandbox.backbone.cache import KVCache
from sandbox.data.batch import collate
from sandbox.data.prompt import Prompt

if TYPE_CHECKING:
    from sandbox.model import VisionLanguageModel


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        max_tokens: the longest reply.
        temperature: divides the logits; 0 is greedy.
        top_k: sample among the k likeliest tokens; 0 means all.
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: every row draws from a generator of its own with this seed, so its reply does not
            depend on the rows beside it.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Without gradients and in eval mode; the model's mode is restored, whatever happens."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def generate(
    model: "VisionLanguageModel", prompts: Sequence[Prompt], sampling: Sampling
) -> list[str]:
    """The model's replies, in the order of the prompts.

    Rows are padded on the right and keep their true positions; a row leaves the batch when it
    ends.

    Raises:
        MediaError, ValueError: a prompt cannot be encoded.
    """
    if not prompts:
        return []
    with inference(model):
        return _generate(model, prompts, sampling)


def _generate(
    model: "VisionLanguageModel", prompts: Sequence[Prompt], sampling: Sampling
) -> list[str]:
    backbone = model.backbone
    device = backbone.embed.weight.device
    examples = [model.prompts.encode(prompt, reply=True) for prompt in prompts]
    batch = collate(examples, name="prompts").to(device)
    fused = model.fuse(batch)
    B, T = batch.tokens.shape
    cache = KVCache(backbone.config, B, T + sampling.max_tokens, like=fused.embeds)
    hidden = backbone(
        embeds=fused.embeds,
        positions=None if batch.documents is None else batch.positions,
        documents=batch.documents,
        cache=cache,
        adapters=fused.adapters,
        context=fused.context,
    ).hidden
    last = hidden[torch.arange(B, device=device), cache.lengths - 1]

    stops = torch.tensor(model.tokenizer.stop_ids, device=device)
    generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in prompts]
    replies: list[list[int]] = [[] for _ in prompts]
    rows = list(range(B))  # the prompt that each row of the cache still answers
    for step in range(sampling.max_tokens):
        tokens = choose(backbone.unembed(last), sampling, [generators[row] for row in rows])
        going = ~torch.isin(tokens, stops)
        for row, token, goes in zip(rows, tokens.tolist(), going.tolist(), strict=True):
            if goes:
                replies[row].append(token)
        if not going.all():
            cache.select(going.nonzero().squeeze(1))
            rows = [row for row, goes in zip(rows, going.tolist(), strict=True) if goes]
        if not rows or step == sampling.max_tokens - 1:
            break
        last = backbone(tokens[going, None], cache=cache).hidden[:, 0]
    return [model.tokenizer.decode(reply).strip() for reply in replies]


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of every row: int64 ``[B]`` of logits ``[B, V]``."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    ranked, ids = (logits.float() / sampling.temperature).sort(dim=-1, descending=True)
    if sampling.top_k:
        ranked[:, sampling.top_k :] = -torch.inf
    probability = ranked.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    # The likeliest token always stays, whatever top_p: nothing precedes it.
    probability = probability.masked_fill(before >= sampling.top_p, 0.0)
    probability[:, 0] = probability[:, 0].clamp(min=1e-9)
    picks = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probability, generators, strict=True)
    ]
    return ids.gather(-1, torch.stack(picks)).squeeze(-1)
