"""What a report shows of a model and its answers: plain facts for ``page``."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, zip_longest

import numpy as np
from PIL import Image as PILImage

from sandbox.data.prompt import Prompt as Question
from sandbox.data.task import Sample, Task
from sandbox.errors import UserError
from sandbox.evals.metrics import exact_match
from sandbox.evals.run import Record, with_replies
from sandbox.model import VisionLanguageModel
from sandbox.params import count
from sandbox.report.page import Architecture, Card, Gallery, Layer, Prompt, Stage


def architecture(model: VisionLanguageModel, sample: Sample) -> Architecture:
    """The model in numbers, and what it reads when asked the sample's first question."""
    encoder, fusion, config = model.encoder, model.fusion, model.backbone.config
    if encoder is None or fusion is None:
        raise UserError("a report shows pictures, and this model reads text alone")
    total, text = sum(p.numel() for p in model.parameters()), count(config)
    shared = ", one expert shared by all tokens" if config.experts and config.shared_expert else ""
    chunks = "everywhere" if config.chunk is None else f"in chunks of {config.chunk:,}"
    tokens = fusion.tokens_per_tile
    tiles = f"up to {model.max_tiles} tiles and one of all, " if model.max_tiles > 1 else ""
    return Architecture(
        params_total=total,
        params_active=total - text["total"] + text["active"],
        stages=[
            Stage("Picture", f"{tiles}{encoder.tile_size} × {encoder.tile_size} pixels"),
            Stage(type(encoder).__name__, f"{encoder.grid**2} patches of width {encoder.width}"),
            Stage(type(fusion).__name__, f"{tokens or 'no'} tokens of width {config.width}"),
            Stage("Decoder", f"{config.layers} layers of width {config.width}{shared}"),
            Stage("Answer", f"a vocabulary of {config.vocab_size:,}"),
        ],
        layers=[
            Layer(
                f"rotary positions, {chunks}"
                if config.uses_rope(layer)
                else "no positions, everywhere",
                config.experts if config.is_moe(layer) else 0,
                config.top_k,
            )
            for layer in range(config.layers)
        ],
        prompt=_prompt(model, sample),
    )


def _prompt(model: VisionLanguageModel, sample: Sample) -> Prompt:
    question = Question.ask(sample.questions[0].text, sample.images[:1])
    prompts = model.prompts
    example = prompts.encode(question, reply=True)
    words = [
        None if patch else prompts.tokenizer.decode([token], skip_special=False)
        for token, patch in zip(example.tokens.tolist(), example.patches.tolist(), strict=True)
    ]
    column = np.concatenate(example.tiles.transpose(0, 2, 3, 1))
    return Prompt(PILImage.fromarray(column), round(prompts.tokens_per_tile**0.5), words)


def gallery(
    task: Task, records: Sequence[Record], *, title: str, note: str = "", size: int
) -> Gallery:
    """Wrong and right answers, one a picture, about a third of them wrong where there are so many.

    The records need their replies.
    """
    wrong = [record for record in records if not record.correct]
    right = [record for record in records if record.correct]
    shown_wrong = list(islice(_varied(wrong), max(size // 3, size - len(right))))
    taken = {record.index for record in shown_wrong}
    others = (record for record in _varied(right) if record.index not in taken)
    shown_right = list(islice(others, size - len(shown_wrong)))
    chosen = (
        f"{len(shown_wrong)} of its {len(wrong):,} wrong answers, "
        f"and {len(shown_right)} of its {len(right):,} right ones."
    )
    cards = [card(task, record) for record in shown_wrong + shown_right]
    return Gallery(title, f"{note} {chosen}".strip(), cards)


def swap(
    model: VisionLanguageModel, task: Task, own: Sequence[Record], shuffled: Sequence[Record]
) -> tuple[Card, Card] | None:
    """The first question that has one answer about its own picture and another about the next.

    Returns:
        The question about either picture, the true answer and the reply of each; None where no
        question of ``shuffled`` has an answer about the picture that it was exchanged for.
    """
    for before, after in zip(own, shuffled, strict=True):
        for question in task.sample(after.split, after.shown).questions:
            if question.text == before.question.text and question.answer != before.question.answer:
                first, second = with_replies(model, task, [before, replace(after, correct=False)])
                reply = second.reply or ""
                right = exact_match(reply, question.answer)
                return card(task, first), replace(
                    card(task, second), answer=question.answer, correct=right
                )
    return None


def card(task: Task, record: Record) -> Card:
    """A record with its reply and the picture that the model saw."""
    question = record.question
    picture = _picture(task.sample(record.split, record.shown))
    return Card(picture, question.text, question.answer, record.reply or "", record.correct)


def _varied(records: Sequence[Record]) -> Iterator[Record]:
    """Records in order, the question types taking turns, one a picture."""
    by_kind = defaultdict[str, list[Record]](list)
    for record in records:
        by_kind[record.question.kind].append(record)
    pictures = set()
    for turn in zip_longest(*by_kind.values()):
        for record in turn:
            if record and record.index not in pictures:
                pictures.add(record.index)
                yield record


def _picture(sample: Sample) -> PILImage.Image:
    """The sample's images side by side."""
    if len(sample.images) == 1:
        return sample.images[0]
    width = sum(image.width for image in sample.images)
    strip = PILImage.new("RGB", (width, max(image.height for image in sample.images)), "white")
    left = 0
    for image in sample.images:
        strip.paste(image, (left, 0))
        left += image.width
    return strip
