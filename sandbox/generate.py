"""Cached decoding over multimodal prompts of unequal length.

There is one loop, ``_decode``; token ids, whole replies, groups of replies to one prompt and
streamed text are ways to read it. A row's reply does not depend on the rows beside it: it has its
own positions, its own place in the cache and its own random draws. Its logits may still differ in
the last bits, since matrix kernels sum in another order for another number of rows; only a tie that
close could turn a token.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fusion.base import Fused
from sandbox.backbone.cache import KVCache, close_up
from sandbox.backbone.decode import Step, decoding
from sandbox.backbone.transformer import Backbone
from sandbox.data.batch import collate
from sandbox.data.prompt import Prompt
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sandbox.model import VisionLanguageModel

Item = TypeVar("Item")

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

    def draws(self, prompts: int, replies: int = 1) -> Tensor:
        """Uniform numbers in [0, 1) that decide every token: ``[prompts * replies, max_tokens]``.

        In fp32 and drawn on the CPU, so a seed means the same on every device, and longer replies
        begin as shorter ones do. Reply n to a prompt draws with the prompt's seed + n.

        Raises:
            UserError: there are several seeds, but not one for each prompt.
        """
        seeds = [self.seed] * prompts if isinstance(self.seed, int) else self.seed
        if len(seeds) != prompts:
            raise UserError(f"sampling: {len(seeds)} seeds for {prompts} prompts, not one for each")
        each = (seed + n for seed in seeds for n in range(replies))
        generators = [torch.Generator().manual_seed(seed) for seed in each]
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
    return [group[0] for group in generate_groups(model, prompts, sampling, replies=1)]


@torch.inference_mode()
def generate_groups(
    model: "VisionLanguageModel", prompts: Sequence[Prompt], sampling: Sampling, replies: int
) -> list[list[str]]:
    """Several replies to each prompt, which is read once: ``[prompts][replies]``.

    They are the replies of ``generate`` to the prompts repeated, where reply n to a prompt has the
    prompt's seed + n.

    Raises:
        UserError: a prompt cannot be encoded, the model has no tokenizer, or replies is below 1.
    """
    _check(replies)
    texts = [""] * (len(prompts) * replies)
    if sampling.stop:
        for row, piece in _pieces(model, prompts, sampling, replies):
            texts[row] += piece
    elif prompts:
        tokenizer = model.prompts.tokenizer
        stops, done = {*tokenizer.stop_ids, *sampling.stop_ids}, set[int]()
        with evaluating(model):
            tokens = _tokens(model, prompts, sampling, replies, done)
            texts = [tokenizer.decode(ids) for ids in _gather(tokens, len(texts), stops, done)]
    return _grouped([text.strip() for text in texts], replies)


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
    yield from _pieces(model, prompts, sampling, replies=1)


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
    return [group[0] for group in generate_group_ids(backbone, prompt, sampling, 1, documents)]


def generate_group_ids(
    backbone: Backbone,
    prompt: Tensor | Fused,
    sampling: Sampling,
    replies: int,
    documents: Tensor | None = None,
) -> list[list[list[int]]]:
    """Token ids of several replies to each prompt, see ``generate_groups`` and ``generate_ids``.

    Raises:
        UserError: the sampling has stop strings, which only text can hold, or replies is below 1.
    """
    if sampling.stop:
        raise UserError("sampling: stop strings need text: give stop_ids to stop at token ids")
    _check(replies)
    done: set[int] = set()
    with inference(backbone):
        fused = prompt if isinstance(prompt, Fused) else Fused(backbone.embed(prompt))
        tokens = _decode(backbone, fused, documents, sampling, replies, done)
        rows = len(fused.embeds) * replies
        return _grouped(_gather(tokens, rows, sampling.stop_ids, done), replies)


def _check(replies: int) -> None:
    if replies < 1:
        raise UserError(f"sampling: replies must be at least 1, got {replies}")


def _eager(call: Any) -> Any:
    """A call without ``torch.compile``, for which prompts and single tokens are new shapes."""
    return torch.compiler.set_stance("force_eager")(call)


def _grouped(rows: list[Item], replies: int) -> list[list[Item]]:
    return [rows[first : first + replies] for first in range(0, len(rows), replies)]


def _gather(
    tokens: Iterator[tuple[int, int]], rows: int, stops: Container[int], done: set[int]
) -> list[list[int]]:
    """The ids of each row up to the first that stops it, which is left out."""
    found: list[list[int]] = [[] for _ in range(rows)]
    for row, token in tokens:
        if token in stops:
            done.add(row)
        else:
            found[row].append(token)
    return found


def _pieces(
    model: "VisionLanguageModel", prompts: Sequence[Prompt], sampling: Sampling, replies: int
) -> Iterator[tuple[int, str]]:
    """The replies piece by piece, as (row, further text), see ``stream``."""
    if not prompts:
        return
    tokenizer = model.prompts.tokenizer
    stops = {*tokenizer.stop_ids, *sampling.stop_ids}
    texts = [_Text(tokenizer, sampling.stop) for _ in range(len(prompts) * replies)]
    done: set[int] = set()
    with evaluating(model):
        for row, token in _tokens(model, prompts, sampling, replies, done):
            text = texts[row]
            piece = text.close() if token in stops else text.add(token)
            if text.closed:
                done.add(row)
            if piece:
                yield row, piece
        for row, text in enumerate(texts):
            if piece := text.close():
                yield row, piece


def _tokens(
    model: "VisionLanguageModel",
    prompts: Sequence[Prompt],
    sampling: Sampling,
    replies: int,
    done: set[int],
) -> Iterator[tuple[int, int]]:
    """What ``_decode`` gives for the prompts."""
    examples = [model.prompts.encode(prompt, reply=True) for prompt in prompts]
    batch = collate(examples, name="prompts").to(model.backbone.embed.weight.device)
    fused = _eager(model.fuse)(batch)
    return _decode(model.backbone, fused, batch.documents, sampling, replies, done)


def _decode(
    backbone: Backbone,
    prompt: Fused,
    documents: Tensor | None,
    sampling: Sampling,
    replies: int,
    done: set[int],
) -> Iterator[tuple[int, int]]:
    """Every reply's tokens as (row, token), step by step; prompt b has rows from b * replies on.

    Prompts are padded on the right and keep their true positions. The reader adds to ``done`` the
    rows that have ended; they leave the batch before the next step. Of each step the host waits for
    the chosen tokens, and for nothing else.
    """
    B, T = prompt.embeds.shape[:2]
    device = prompt.embeds.device
    draws = sampling.draws(B, replies).to(device)
    # The last token is never read.
    cache = KVCache(backbone.config, B, T + sampling.max_tokens - 1, like=prompt.embeds)
    adapters, context = prompt.adapters, prompt.context
    seen = {"documents": documents, "blocks": prompt.blocks}
    more = {"cache": cache, "adapters": adapters, "context": context}
    hidden = _eager(backbone.__call__)(embeds=prompt.embeds, **seen, **more).hidden
    last = cache.lengths - 1
    logits = backbone.unembed(hidden[torch.arange(B, device=device), last])
    if context is not None:
        context = context.decoding(last)
    rows = list(range(B * replies))  # the reply that each row of the cache still writes
    if replies > 1:
        copies = torch.arange(B, device=device).repeat_interleave(replies)
        logits = logits[copies]
        cache.select(copies)
        context = None if context is None else context.select(copies)
    decode: Step | None = None
    for step in range(sampling.max_tokens):
        tokens = choose(logits, sampling, draws[:, step])
        yield from zip(rows, tokens.tolist(), strict=True)
        going = [place for place, row in enumerate(rows) if row not in done]
        if not going or step == sampling.max_tokens - 1:
            return
        if len(going) < len(rows):
            going = close_up(going)
            rows = [rows[place] for place in going]
            kept = torch.tensor(going, device=device)
            tokens, draws = tokens[kept], draws[kept]
            cache.select(kept)
            context = None if context is None else context.select(kept)
        decode = decode or decoding(backbone)  # not before it is certain that there is a step
        logits = decode(tokens, cache, adapters, context)


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
