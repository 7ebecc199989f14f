"""Tasks told in words: textual twins and captions."""

import re
from dataclasses import replace

import pytest

from sandbox.data.charts import Charts
from sandbox.data.pictures import Pictures
from sandbox.data.prompt import PromptEncoder
from sandbox.data.shapes import Shapes
from sandbox.data.task import Sample, Split, Task
from sandbox.data.words import REQUEST, Described, InWords
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer

TASKS: list[Task] = [
    Charts(charts=["bar", "line", "pie"], questions=["value", "extremum", "count"]),
    Charts(size=200, charts=["bar", "line", "pie"], questions=["value", "extremum"]),
    Shapes(questions=["color", "shape", "place", "count"]),
    Shapes(size=48, grid=4, questions=["color", "place"]),
]


class Mute(Task):
    """A task that does not tell."""

    def size(self, split: Split) -> int | None:
        return None

    def sample(self, split: Split, index: int) -> Sample:
        return replace(Shapes().sample(split, index), text=None)

    def identity(self) -> str:
        return "mute"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_the_words_hold_all_that_is_asked(task: Task):
    """Guards against a twin from which a language model cannot know the answer."""
    for index in range(40):
        sample = InWords(task).sample("train", index)
        for question in sample.questions:
            if question.kind not in ("count",):
                assert re.search(rf"\b{re.escape(question.answer)}\b", sample.text), question


def test_a_count_is_that_of_the_things_told():
    """Guards against words that leave something out."""
    for index in range(40):
        sample = Shapes(questions=["count"]).sample("train", index)
        assert sample.questions[0].answer == str(len(sample.text.split(",")))


@pytest.mark.parametrize("split", ["train", "val", "test", "heldout"])
def test_a_twin_differs_in_the_image_alone(split: Split):
    """Guards against a language model that is tested on other questions than its successor."""
    task = Charts()
    seen, told = task.sample(split, 5), InWords(task).sample(split, 5)
    assert not told.images
    assert replace(told, images=seen.images) == replace(seen)
    assert InWords(task).size(split) == task.size(split)


def test_a_share_is_told_in_training_alone():
    """Guards against images that are never shown, or an evaluation that does not show them."""
    task = InWords(Charts(), share=0.25)
    shown = [bool(task.sample("train", index).images) for index in range(12)]
    assert shown == [True, True, True, False] * 3
    assert all(task.sample("test", index).images for index in range(8))
    with pytest.raises(UserError, match="share must be above 0 and at most 1, got 0"):
        InWords(Charts(), share=0)


def test_training_never_shows_more_images_than_allowed():
    """Guards against a model that is said to have seen two images at a time, and saw eight."""
    task = InWords(Pictures(images=[2, 4, 8]), share=0.2, most_images=2)
    shown = {len(task.sample("train", index).images) for index in range(60)}
    assert shown == {0, 2}
    assert {len(task.sample("val", index).images) for index in range(60)} == {2, 4, 8}


def test_a_twin_is_encoded_as_its_text():
    """Guards against a context that is left out where there is no image."""
    tokenizer = Tokenizer.load("small")
    sample = InWords(Charts()).sample("train", 0)
    example = PromptEncoder(tokenizer, tile_size=1, tokens_per_tile=0).encode_sample(sample)
    assert sample.text in tokenizer.decode(example.tokens.tolist())
    assert len(example.tiles) == 0


def test_descriptions_are_asked_for_in_training_only():
    """Guards against accuracies that a long caption, hardly ever all right, pulls down."""
    task = Charts()
    first, *others = Described(task).sample("train", 3).questions
    plain = task.sample("train", 3)
    assert (first.text, first.answer, first.kind) == (REQUEST, plain.text, "caption")
    assert tuple(others) == plain.questions
    assert Described(task).sample("val", 3).questions == task.sample("val", 3).questions


@pytest.mark.parametrize("wrapper", [InWords, Described])
def test_a_task_that_does_not_tell_is_refused(wrapper: type[InWords] | type[Described]):
    """Guards against training on empty captions."""
    with pytest.raises(UserError, match="has no text: its task does not tell"):
        wrapper(Mute()).sample("train", 0)


def test_identities_tell_the_views_apart():
    """Guards against a resumed run that goes on with images where it had words."""
    task = Charts()
    views = {task.identity(), InWords(task).identity(), Described(task).identity()}
    assert len(views) == 3
    assert InWords(Charts(seed=1)).identity() != InWords(Charts()).identity()
    assert InWords(task, share=0.5).identity() != InWords(task).identity()


@pytest.mark.parametrize("view", [InWords, Described])
@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_alone_are_those_of_the_sample(
    view: type[InWords] | type[Described], split: Split
):
    """Guards against a majority of other questions than those that are asked: a caption that is
    left out, or told where no training is.
    """
    task = view(Charts(size=32))
    for index in range(4):
        assert task.questions_of(split, index) == task.sample(split, index).questions
