"""Greedy replies to many questions, the same to the last bit however many are asked at a time.

A matrix product may add its terms in another order when it has another number of rows. So a reply's
probability, and a token that is nearly tied with another, would depend on what happens to be
computed beside it. Here nothing happens: questions are computed in groups, cut by `groups` from the
stream of questions in their order, by rules that know neither batch size nor progress, and a group
is always computed alone, in the same shapes. A batch size only says how many questions are read and
encoded ahead. (Other threads, another processor or another release of torch may still round in
another way.)

A group reads every image once, then all its questions behind copies of its keys and values ::

    image 1 ............ | question a, question b, question c
    image 2 ............ | question d
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, fields, replace
from math import exp, fsum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sandbox.backbone.cache import KVCache, close_up
from sandbox.backbone.decode import decoding
from sandbox.data.batch import PADDING, Batch, Example, collate
from sandbox.data.prompt import Prompt, PromptEncoder, Turn, context
from sandbox.data.task import Sample
from sandbox.generate import inference
from sandbox.model import VisionLanguageModel

# These decide what is computed together. Whoever changes one changes the last bits of confidences.
GROUP = 64  # questions of a group, at most
TOKENS = 32_768  # of a group's rows together, which bounds the memory of its cache
TILES = 32  # tiles that the encoder is given at a time

Asked = TypeVar("Asked", bound=Sized)


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the questions about a sample stand behind, encoded; as an object, it is shared."""

    example: Example

    @classmethod
    def of(cls, prompts: PromptEncoder, sample: Sample) -> "Prefix":
        """The open user turn with the sample's images."""
        whole = prompts.encode(Prompt([Turn("user", context(sample))]))
        # All but the end of the turn. Tiles and kinds have lengths of their own.
        rows: dict[str, Any] = {
            field.name: value[:-1]
            for field in fields(Example)
            if isinstance(value := getattr(whole, field.name), np.ndarray)
            and not field.name.startswith("tile")
        }
        return cls(replace(whole, **rows))


@dataclass(frozen=True)
class Ask:
    """One question to be answered.

    Attributes:
        prefix: the one of its sample.
        tokens: what follows it, up to where the reply begins.
    """

    prefix: Prefix
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, prompts: PromptEncoder, prefix: Prefix, question: str) -> "Ask":
        """The rest of the user turn, and the header of the reply."""
        tokenizer = prompts.tokenizer
        ids = [*tokenizer.encode(question), tokenizer.eot, *tokenizer.header("assistant")]
        return cls(prefix, tuple(ids))

    def __len__(self) -> int:
        return len(self.prefix.example) + len(self.tokens)

    def text(self, prompts: PromptEncoder) -> str:
        """The prompt as the model reads it, special tokens by name, without the placeholders."""
        shown = self.prefix.example
        ids = [*shown.tokens[~shown.patches].tolist(), *self.tokens]
        return prompts.tokenizer.decode(ids, skip_special=False)


@dataclass(frozen=True)
class Reply:
    """What the model says, without white space around it.

    ``confidence`` is the probability of just this reply: the product of the probabilities of its
    tokens, that of the end of turn included, unless the reply was cut off before.
    """

    text: str
    confidence: float


def groups(asks: Iterable[Asked], max_tokens: int) -> Iterator[list[Asked]]:
    """Cut a stream of what is as long as its prompt, where a group would exceed its bounds.

    A group depends on nothing that comes before its first question, so an evaluation may go on at
    any group. A question that is longer than ``TOKENS`` is a group of its own.
    """
    group: list[Asked] = []
    longest = 0
    for ask in asks:
        length = len(ask) + max_tokens
        longest = max(longest, length)
        if group and (len(group) == GROUP or longest * (len(group) + 1) > TOKENS):
            yield group
            group, longest = [], length
        group.append(ask)
    if group:
        yield group


def answer(model: VisionLanguageModel, group: Sequence[Ask], max_tokens: int) -> list[Reply]:
    """The greedy replies to one group, in its order.

    The cached prefix, its copies and the questions behind them give the tokens that
    ``model.generate`` gives, which reads each prompt whole.
    """
    with inference(model):
        return _answer(model, group, max_tokens)


def _answer(model: VisionLanguageModel, group: Sequence[Ask], max_tokens: int) -> list[Reply]:
    backbone, tokenizer = model.backbone, model.prompts.tokenizer
    device = backbone.embed.weight.device
    prefixes = list(dict.fromkeys(ask.prefix for ask in group))
    place = {prefix: number for number, prefix in enumerate(prefixes)}
    batch = collate([prefix.example for prefix in prefixes], name="prompts").to(device)
    fused = model.fuse(batch, _features(model, batch))
    tokens, documents = (x.to(device) for x in _pad([ask.tokens for ask in group]))

    T = batch.tokens.shape[1] + tokens.shape[1]
    # The last token of a reply is never read.
    cache = KVCache(backbone.config, len(prefixes), T + max_tokens - 1, like=fused.embeds)
    adapters, seen = fused.adapters, fused.context
    backbone(
        embeds=fused.embeds,
        documents=batch.documents,
        blocks=fused.blocks,
        cache=cache,
        adapters=adapters,
        context=seen,
    )
    copies = torch.tensor([place[ask.prefix] for ask in group], device=device)
    if seen is not None:
        seen = seen.decoding(cache.lengths - 1).select(copies)
    cache.select(copies)
    padded = documents if bool((documents == PADDING).any()) else None
    hidden = backbone(tokens, documents=padded, cache=cache, adapters=adapters, context=seen).hidden
    last = torch.tensor([len(ask.tokens) - 1 for ask in group], device=device)
    logits = backbone.unembed(hidden[torch.arange(len(group), device=device), last])
    decode = decoding(backbone)

    ids: list[list[int]] = [[] for _ in group]
    logs: list[list[float]] = [[] for _ in group]
    rows = list(range(len(group)))  # the question that each row of the cache still answers
    for step in range(max_tokens):
        chosen, log = _choose(logits)
        going = []
        for here, (row, token, probability) in enumerate(
            zip(rows, chosen.tolist(), log.tolist(), strict=True)
        ):
            logs[row].append(probability)
            if token not in tokenizer.stop_ids:
                ids[row].append(token)
                going.append(here)
        if not going or step == max_tokens - 1:
            break
        if len(going) < len(rows):
            going = close_up(going)
            rows = [rows[here] for here in going]
            kept = torch.tensor(going, device=device)
            chosen = chosen[kept]
            cache.select(kept)
            seen = None if seen is None else seen.select(kept)
        logits = decode(chosen, cache, adapters, seen)
    return [
        Reply(tokenizer.decode(each).strip(), exp(fsum(log)))
        for each, log in zip(ids, logs, strict=True)
    ]


def _features(model: VisionLanguageModel, batch: Batch) -> Tensor | None:
    """Patch features of the batch's tiles, a few tiles at a time; None where it has none."""
    if not len(batch.tiles):
        return None
    parts = [model.features(replace(batch, tiles=tiles)) for tiles in batch.tiles.split(TILES)]
    return torch.cat([part for part in parts if part is not None])


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens padded on the right, and their documents: both int64 ``[B, T]``."""
    shape = len(rows), max(map(len, rows))
    tokens, documents = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        documents[number, : len(row)] = 0
    return torch.from_numpy(tokens), torch.from_numpy(documents)


def _choose(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, int64 ``[B]``, and the logarithms of their probabilities, fp32 ``[B]``.

    ``logits`` are ``[B, V]``.
    """
    logits = logits.float()
    chosen = logits.argmax(dim=-1)
    best = logits.gather(-1, chosen[:, None]).squeeze(-1)
    return chosen, best - logits.logsumexp(dim=-1)
