"""Cached decoding over multimodal prompts of unequal length.

There is one loop, ``_decode``; token ids, whole replies and streamed text are three ways to read
it. A row's reply does not depend on the rows beside it: it has its own positions, its own place in
the cache and its own random draws. Its logits may still differ in the last bits, since matrix
kernels sum in another order for another number of rows; only a tie that close could turn a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion.base import Fused
from sandbox.backbone.cache import KVCache
from sandbox.backbone.transformer import Backbone
from sandbox.data.batch import collate
from sandbox.data.prompt import Prompt
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sandbox.model import VisionLanguageModel

UNFINISHED = "\ufffd"  # what decodes from bytes that are no UTF-8, or not yet


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token, and when to stop.

    Attributes:
        max_tokens: the longest reply, at least 1.
        temperature: divides the logits; 0 is greedy.
        top_k: sample among the k likeliest tokens; 0 means all.
        top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
        seed: of the random draws, one for all prompts or one for each. Every row draws for itself,
            so equal prompts get equal replies unless their seeds differ.
        stop: strings that end a reply; they are cut off.
        stop_ids: token ids that end a reply beside the tokenizer's own; they are not part of it.

    Raises:
        UserError: a value is out of range; the message names the field.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # a string is a sequence of strings too
            raise UserError(f"sampling: stop is a list of strings: write [{self.stop!r:.40}]")
        rules = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more, and finite"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "stop": (all(self.stop), "free of empty strings"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"sampling: {name} must be {rule}, got {getattr(self, name)}")

    def draws(self, rows: int) -> Tensor:
        """Uniform numbers in [0, 1) that decide every token: fp32 ``[rows, max_tokens]``.

        Drawn on the CPU, so a seed means the same on every device, and longer replies begin as
        shorter ones do.

        Raises:
            UserError: there are several seeds, but not one for each row.
        """
        seeds = [self.seed] * rows if isinstance(self.seed, int) else self.seed
        if len(seeds) != rows:
            raise UserError(f"sampling: {len(seeds)} seeds for {rows} prompts: give one for each")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        n, precise = self.max_tokens, torch.float32  # whatever the default dtype
        return torch.stack([torch.rand(n, generator=g, dtype=precise) for g in generators])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; the model's mode is restored, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients."""
    with evaluating(model), torch.inference_mode():
        yield


def generate(
    model: "VisionLanguageModel", prompts: Sequence[Prompt], sampling: Sampling
) -> list[str]:
    """The model's replies, in the order of the prompts, without surrounding white space.

    Raises:
        UserError: a prompt cannot be encoded, or the model has no tokenizer.
    """
    replies = [""] * len(prompts)
    for row, piece in stream(model, prompts, sampling):
        replies[row] += piece
    return [reply.strip() for reply in replies]


# As a decorator it is in force only while this generator runs, not in the code that reads it.
@torch.inference_mode()
def stream(
    model: "VisionLanguageModel", prompts: Sequence[Prompt], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """The replies piece by piece, as (number of the prompt, further text), never empty.

    A piece holds whole characters, and nothing that a stop string may yet turn out to begin with.
    A prompt's pieces together are its reply. The model is in eval mode until the iterator ends.

    Raises:
        UserError: a prompt cannot be encoded, or the model has no tokenizer.
    """
    encoder = model.prompts
    if not prompts:
        return
    stops = {*encoder.tokenizer.stop_ids, *sampling.stop_ids}
    texts = [_Text(encoder.tokenizer, sampling.stop) for _ in prompts]
    done: set[int] = set()
    with evaluating(model):
        examples = [encoder.encode(prompt, reply=True) for prompt in prompts]
        batch = collate(examples, name="prompts").to(model.backbone.embed.weight.device)
        fused = model.fuse(batch)
        for row, token in _decode(model.backbone, fused, batch.documents, sampling, done):
            text = texts[row]
            piece = text.close() if token in stops else text.add(token)
            if text.closed:
                done.add(row)
            if piece:
                yield row, piece
        for row, text in enumerate(texts):
            if piece := text.close():
                yield row, piece


def generate_ids(
    backbone: Backbone,
    prompt: Tensor | Fused,
    sampling: Sampling,
    documents: Tensor | None = None,
) -> list[list[int]]:
    """Token ids of the replies, without the ids that stopped them; needs no tokenizer.

    Args:
        backbone: the decoder.
        prompt: tokens, int64 ``[B, T]``, or what a fusion made of them.
        sampling: only its ``stop_ids`` end a reply early.
        documents: int64 ``[B, T]``, negative on the padding to the right of short rows, else 0.

    Raises:
        UserError: the sampling has stop strings, which only text can hold.
    """
    if sampling.stop:
        raise UserError("sampling: stop strings need text: give stop_ids to stop at token ids")
    done: set[int] = set()
    with inference(backbone):
        fused = prompt if isinstance(prompt, Fused) else Fused(backbone.embed(prompt))
        replies: list[list[int]] = [[] for _ in fused.embeds]
        for row, token in _decode(backbone, fused, documents, sampling, done):
            if token in sampling.stop_ids:
                done.add(row)
            else:
                replies[row].append(token)
    return replies


def _decode(
    backbone: Backbone,
    prompt: Fused,
    documents: Tensor | None,
    sampling: Sampling,
    done: set[int],
) -> Iterator[tuple[int, int]]:
    """Every row's tokens as (row, token), step by step.

    Rows are padded on the right and keep their true positions. The reader adds to ``done`` the rows
    that have ended; they leave the batch before the next step. Of each step the host waits for
    the chosen tokens, and for nothing else.
    """
    B, T = prompt.embeds.shape[:2]
    device = prompt.embeds.device
    draws = sampling.draws(B).to(device)
    # The last token is never read.
    cache = KVCache(backbone.config, B, T + sampling.max_tokens - 1, like=prompt.embeds)
    adapters, context = prompt.adapters, prompt.context
    hidden = backbone(
        embeds=prompt.embeds,
        documents=documents,
        blocks=prompt.blocks,
        cache=cache,
        adapters=adapters,
        context=context,
    ).hidden
    last = cache.lengths - 1
    hidden = hidden[torch.arange(B, device=device), last]
    if context is not None:
        context = context.decoding(last)
    rows = list(range(B))  # the prompt that each row of the cache still answers
    for step in range(sampling.max_tokens):
        tokens = choose(backbone.unembed(hidden), sampling, draws[:, step])
        yield from zip(rows, tokens.tolist(), strict=True)
        going = [place for place, row in enumerate(rows) if row not in done]
        if not going or step == sampling.max_tokens - 1:
            return
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            kept = torch.tensor(going, device=device)
            tokens, draws = tokens[kept], draws[kept]
            cache.select(kept)
            if context is not None:
                context = context.select(kept)
        decoded = backbone(tokens[:, None], cache=cache, adapters=adapters, context=context)
        hidden = decoded.hidden[:, 0]


def choose(logits: Tensor, sampling: Sampling, draw: Tensor) -> Tensor:
    """The next token of every row: int64 ``[B]`` of logits ``[B, V]`` and draws in [0, 1) ``[B]``.

    Sampling inverts the cumulative distribution. Nucleus: arXiv 1904.09751, section 3.1.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / sampling.temperature, None
    if sampling.top_k:
        logits, ids = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    kept = cumulative[:, -1:]
    if sampling.top_p < 1:
        # The token that reaches top_p is the last one kept; rounding may leave none that does.
        crossing = (cumulative < sampling.top_p).sum(dim=-1, keepdim=True)
        kept = cumulative.gather(-1, crossing.clamp(max=cumulative.shape[-1] - 1))
    # Strictly below kept, so the pick is never beyond it, and never a token of probability 0.
    pick = (cumulative <= draw[:, None] * kept).sum(dim=-1, keepdim=True)
    return (pick if ids is None else ids.gather(-1, pick)).squeeze(-1)


class _Text:
    """One reply's text as its tokens arrive.

    Attributes:
        closed: whether the reply has ended.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.closed = False
        self._decode = tokenizer.decode
        self._stop = stop
        self._ids: list[int] = []
        self._read = 0  # ids that have become text
        self._anchor = 0  # decoding starts here: some decoders treat the first token differently
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that is certain now, perhaps none. A stop string closes the reply."""
        self._ids.append(token)
        text = self._unread()
        if text.endswith(UNFINISHED):
            return ""  # perhaps half a character: the next token tells
        self._anchor, self._read = self._read, len(self._ids)
        text = self._cut(self._held + text)
        hold = 0 if self.closed else self._suspicious(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def close(self) -> str:
        """End the reply: the text that was held back."""
        if self.closed:
            return ""
        text = self._cut(self._held + self._unread())
        self.closed = True
        return text

    def _unread(self) -> str:
        """The text of the ids that have not been read."""
        known = len(self._decode(self._ids[self._anchor : self._read]))
        return self._decode(self._ids[self._anchor :])[known:]

    def _cut(self, text: str) -> str:
        """The text before the stop string that is complete first, which closes the reply."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return text
        self.closed = True
        return text[: min(found)[1]]

    def _suspicious(self, text: str) -> int:
        """The length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
