"""Many questions at once: their replies, and that these do not depend on what is asked beside."""

from dataclasses import replace

import pytest
import torch

from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.data.batch import collate
from sandbox.data.prompt import Prompt
from sandbox.evals import answering
from sandbox.evals.answering import Ask, Prefix, answer, groups
from sandbox.model import VisionLanguageModel
from tests.asked import Colours, mixture

MAX_TOKENS = 6


def asks(model: VisionLanguageModel, samples: int, *, blind: int | None = None) -> list[Ask]:
    """All questions of the first samples; sample ``blind`` is shown without its image."""
    found = []
    for index in range(samples):
        sample = Colours().sample("test", index)
        sample = replace(sample, images=()) if index == blind else sample
        prefix = Prefix.of(model.prompts, sample)
        found += [Ask.of(model.prompts, prefix, question.text) for question in sample.questions]
    return found


@pytest.mark.parametrize("fusion", [EarlyFusion, CrossAttention])
def test_replies_are_those_of_generate(fusion: type) -> None:
    """Guards against a prefix that another sample's questions get, a place in the cache that is
    off by one across chunks, and an image that the question cannot see: they must be the replies
    to whole prompts, also beside a prompt without an image.
    """
    model = mixture(fusion)
    group = asks(model, 6, blind=3)
    prompts = []
    for index in range(6):
        sample = Colours().sample("test", index)
        images = () if index == 3 else sample.images
        prompts += [Prompt.ask(question.text, images) for question in sample.questions]
    said = answer(model, group, MAX_TOKENS)
    expected = [model.generate([prompt], max_tokens=MAX_TOKENS)[0] for prompt in prompts]
    assert [reply.text for reply in said] == expected
    assert len(set(expected)) > 3, "a model that always says the same would hide a mix-up"


def test_confidence_is_the_probability_of_the_reply() -> None:
    """Guards against a confidence that leaves out the end of turn, or counts a neighbour's token.

    The reference reads prompt and reply in one pass without a cache.
    """
    model = mixture()
    group = asks(model, 3)
    # An end of turn must be likely enough to happen.
    stop = model.prompts.tokenizer.eot
    with torch.no_grad():
        model.backbone.head.weight[stop] *= 3
    said = answer(model, group, MAX_TOKENS)
    ended = 0
    for ask, reply in zip(group, said, strict=True):
        shown = ask.prefix.example
        probability, tokens = 1.0, [*shown.tokens.tolist(), *ask.tokens]
        for step in range(MAX_TOKENS):
            batch = replace(
                collate([shown]),
                tokens=torch.tensor([tokens]),
                positions=torch.arange(len(tokens))[None],
                patches=torch.tensor([[*shown.patches.tolist(), *[False] * 99][: len(tokens)]]),
                labels=torch.full((1, len(tokens)), -100),
            )
            with torch.no_grad():
                chances = model(batch).logits[0, -1].softmax(-1)
            probability *= chances.max().item()
            tokens.append(int(chances.argmax()))
            if tokens[-1] == stop:
                ended += step > 0
                break
        assert reply.confidence == pytest.approx(probability, rel=1e-4)
    assert 0 < ended < len(group)


def test_the_prompt_is_told_as_the_model_reads_it() -> None:
    """Guards against stored prompts that are not what was asked, so that no score can be redone."""
    model = mixture()
    (ask,) = asks(model, 1)
    whole = model.prompts.encode(
        Prompt.ask("colour?", Colours().sample("test", 0).images), reply=True
    )
    assert [*ask.prefix.example.tokens.tolist(), *ask.tokens] == whole.tokens.tolist()
    assert ask.text(model.prompts) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n<|image_start|><|image|>"
        "<|image_end|>colour?<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_groups_are_the_same_from_any_group_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against groups that remember what came before: a resumed evaluation would compute
    other groups, and round in another way.
    """
    monkeypatch.setattr(answering, "GROUP", 5)
    monkeypatch.setattr(answering, "TOKENS", 190)
    stream = ["x" * (7 * n % 40) for n in range(60)] + ["x" * 300, "x"]
    cut = list(groups(stream, 4))
    assert [one for group in cut for one in group] == stream
    assert {len(group) for group in cut} >= {1, 5}, "neither bound alone"
    for group in cut:
        assert len(group) == 1 or (max(map(len, group)) + 4) * len(group) <= 190
    done = 0
    for number, group in enumerate(cut):
        assert list(groups(stream[done:], 4)) == cut[number:]
        done += len(group)
