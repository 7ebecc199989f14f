"""The control without images: that nothing of them is left, and what it tells of a model."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image as PILImage

from encoders.patches import Patches
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.data.batch import Batch, collate
from sandbox.data.charts import Charts
from sandbox.data.clips import Clips
from sandbox.data.pictures import Pictures
from sandbox.data.prompt import Prompt
from sandbox.data.task import Question, Sample, Task
from sandbox.data.words import InWords
from sandbox.evals.run import Images, evaluate, with_replies
from sandbox.model import FusionBuilder, VisionLanguageModel
from sandbox.tokenizer import Tokenizer

FUSIONS = [
    pytest.param(EarlyFusion, id="early"),
    pytest.param(partial(CrossAttention, layers=[1]), id="cross-attention"),
]


def toy(fusion: FusionBuilder) -> VisionLanguageModel:
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("small")
    config = BackboneConfig(tokenizer.vocab_size, width=32, layers=2, heads=2, experts=0)
    return VisionLanguageModel(Patches(32, 8, width=32), fusion, config, tokenizer)


@pytest.mark.parametrize(
    "shown",
    [Charts(size=32), Pictures(images=[3]), Clips(frames=4)],
    ids=["one", "labels", "times"],
)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_without_images_the_question_stands_alone(
    fusion: FusionBuilder, shown: Task, monkeypatch: pytest.MonkeyPatch
):
    """Guards against whatever still tells of the images: tokens that stand for them, labels, times,
    and above all the sample's text, which takes the place of images elsewhere.
    """
    model = toy(fusion)
    batches, prompts = list[Batch](), list[Prompt]()
    fuse = VisionLanguageModel.fuse
    monkeypatch.setattr(
        VisionLanguageModel,
        "fuse",
        lambda self, batch, *rest: batches.append(batch) or fuse(self, batch, *rest),
    )
    monkeypatch.setattr(
        VisionLanguageModel,
        "generate",
        lambda self, asked, **_: prompts.extend(asked) or ["?"] * len(asked),
    )
    own = evaluate(model, shown, "test", 3)
    unseen = evaluate(model, shown, "test", 3, images="none")
    assert [(r.question, r.index, r.content) for r in own] == [
        (r.question, r.index, r.content) for r in unseen
    ]
    assert {record.images for record in unseen} == {"none"}
    with_images, without = batches
    assert len(with_images.tiles) > len(without.tiles) == 0
    assert not without.patches.any()
    trunk = [model.tokenizer.bos, *model.tokenizer.header("user")]
    assert without.branches is not None
    for row, branches in zip(without.tokens.tolist(), without.branches.tolist(), strict=True):
        assert row[: len(trunk)] == trunk
        assert branches[len(trunk)] == 1, "the first question follows at once"

    with_replies(model, shown, [replace(record, correct=False) for record in unseen])
    for record, prompt in zip(unseen, prompts, strict=True):
        assert [turn.content for turn in prompt.turns] == [[record.question.text]]


def test_samples_without_images_lose_none():
    """Guards against a control that asks the same again, or crashes, where a task is in words."""
    assert evaluate(toy(EarlyFusion), InWords(Charts(size=32)), "test", 3, images="none") == []


class Colors(Task):
    """Squares, each in a shade of its own: every third is blue, the others red."""

    def size(self, split: str) -> int:
        return 9

    def sample(self, split: str, index: int) -> Sample:
        answer = "blue" if index % 3 == 2 else "red"
        color = (0, 0, 250 - index) if answer == "blue" else (250 - index, 0, 0)
        question = Question("Which color?", answer, "color")
        image = PILImage.new("RGB", (32, 32), color)
        return Sample((image,), (question,), f"{index:x}", text=f"A {answer} square.")

    def identity(self) -> str:
        return "colors"


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        # Shuffled is rolled by one: red red blue sees red blue red, and only the first fits.
        (True, {"own": 9, "shuffled": 3, "none": 6}),
        (False, {"own": 6, "shuffled": 6, "none": 6}),
    ],
    ids=["looks", "guesses"],
)
def test_controls_tell_a_model_that_looks_from_one_that_guesses(
    fusion: FusionBuilder, looks: bool, expected: dict[Images, int]
):
    """Guards against a control without images that the images get into, or that asks differently:
    who answers from the image must fall to the majority, and who guesses it must not change.
    """
    task, model = Colors(), toy(fusion)
    seen = [task.sample("test", index) for index in range(9)]
    guess = (replace(seen[0].questions[0], answer="red"),)
    if not looks:
        seen = [replace(sample, questions=guess) for sample in seen]
    unseen = replace(seen[0], images=(), text=None, questions=guess)
    batch = collate([model.prompts.encode_sample(sample) for sample in [*seen, unseen]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    found = {
        images: sum(record.correct for record in evaluate(model, task, "test", 9, images=images))
        for images in expected
    }
    assert found == expected
