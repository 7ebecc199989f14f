"""The harness: what it counts as right, and that its blind control is blind."""

import json
from dataclasses import replace

import pytest
import torch

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.data.batch import collate
from sandbox.data.charts import Charts
from sandbox.data.clips import Clips
from sandbox.data.pictures import Pictures
from sandbox.data.prompt import Image, Prompt, Video
from sandbox.data.task import Question, Sample, Task
from sandbox.data.words import InWords
from sandbox.errors import UserError
from sandbox.evals.metrics import exact_match
from sandbox.evals.run import (
    Record,
    evaluate,
    expert_load,
    reorder,
    summarize,
    with_replies,
    write_predictions,
)
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def task() -> Task:
    return Charts(size=32, questions_per_image=5)


@pytest.fixture(scope="module")
def model(task: Task) -> VisionLanguageModel:
    """A model that knows the first two test charts by heart and guesses about the others."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("small")
    config = BackboneConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, head_dim=16, experts=3
    )
    model = VisionLanguageModel(Patches(32, 8, width=32), EarlyFusion, config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    examples = [model.prompts.encode_sample(task.sample("test", index)) for index in range(2)]
    for _ in range(30):
        optimizer.zero_grad()
        model(collate(examples)).loss.backward()
        optimizer.step()
    return model


def test_one_forward_pass_scores_what_generate_says(model: VisionLanguageModel, task: Task):
    """Guards against a score read off the wrong tokens, branch or position: it must be the score
    of the text that ``generate`` writes, question by question, of its own chart, another or none.
    """
    for images in ("own", "shuffled", "none"):
        records = evaluate(model, task, "test", 6, batch_size=3, images=images)
        # Replies are generated for wrong records only, so ask for all by calling each wrong.
        asked = with_replies(model, task, [replace(r, correct=False) for r in records])
        for record, said in zip(records, asked, strict=True):
            assert record.correct == exact_match(said.reply, record.question.answer)
        if images == "own":
            assert 0 < sum(r.correct for r in records) < len(records)


def test_replies_are_generated_for_wrong_answers_alone(model: VisionLanguageModel, task: Task):
    """Guards against replies that land on another record's question."""
    records = with_replies(model, task, evaluate(model, task, "test", 6), batch_size=5)
    for record in records:
        assert exact_match(record.reply, record.question.answer) == record.correct


def test_replies_are_about_the_picture_that_was_shown(
    model: VisionLanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch
):
    """Guards against replies of the blind control that had the right picture after all."""
    prompts: list[Prompt] = []
    monkeypatch.setattr(
        VisionLanguageModel,
        "generate",
        lambda self, asked, **_: prompts.extend(asked) or ["?"] * len(asked),
    )
    shuffled = evaluate(model, task, "test", 3, images="shuffled")
    with_replies(model, task, [replace(record, correct=False) for record in shuffled])
    for record, prompt in zip(shuffled, prompts, strict=True):
        image, question = prompt.turns[0].content
        assert image.pixels.tobytes() == task.sample("test", record.shown).images[0].tobytes()
        assert question == record.question.text


def test_shuffling_changes_every_image_and_no_question(
    model: VisionLanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch
):
    """Guards against a control that lets a model see the picture, or asks it something else."""
    tiles: list[torch.Tensor] = []
    fuse = VisionLanguageModel.fuse
    monkeypatch.setattr(
        VisionLanguageModel,
        "fuse",
        lambda self, batch, *rest: tiles.append(batch.tiles) or fuse(self, batch, *rest),
    )
    own = evaluate(model, task, "test", 7, batch_size=4)
    shuffled = evaluate(model, task, "test", 7, batch_size=4, images="shuffled")
    assert [r.question for r in own] == [r.question for r in shuffled]
    assert [(r.index, r.content) for r in own] == [(r.index, r.content) for r in shuffled]
    contents = {record.index: record.content for record in own}
    assert all(contents[record.shown] != record.content for record in shuffled)
    assert sorted({r.shown for r in shuffled}) == list(range(7)), "every image is shown to one"

    seen_own, seen_shuffled = torch.cat(tiles[:2]), torch.cat(tiles[2:])
    assert not (seen_own == seen_shuffled).flatten(1).all(1).any()
    for record in shuffled:
        assert torch.equal(seen_shuffled[record.index], seen_own[record.shown])
    assert shuffled == evaluate(model, task, "test", 7, batch_size=7, images="shuffled"), "pure"


class Repeats(Task):
    """Charts of a finite test split, with the contents that it is given."""

    def __init__(self, contents: str) -> None:
        self.contents = contents

    def size(self, split: str) -> int:
        return len(self.contents) if split == "test" else 0

    def sample(self, split: str, index: int) -> Sample:
        drawn = Charts(size=32).sample("test", ord(self.contents[index]))
        return replace(drawn, content=self.contents[index], questions=drawn.questions[:1])

    def identity(self) -> str:
        return self.contents


def test_shuffling_avoids_samples_that_show_the_same(model: VisionLanguageModel):
    """Guards against duplicates: rolling by one would hand a sample its own picture again."""
    records = evaluate(model, Repeats("aabb"), "test", 100, images="shuffled")
    assert [record.shown for record in records] == [2, 3, 0, 1]
    with pytest.raises(UserError, match="evaluate more samples"):
        evaluate(model, Repeats("aaab"), "test", 4, images="shuffled")


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_another_order_moves_every_image(count: int):
    """Guards against frames that keep their place, and against orders that keep what they should
    destroy: all frames turned around, or the clip begun elsewhere.
    """
    orders = {tuple(reorder(count, f"{content:x}")) for content in range(200)}
    places = tuple(range(count))
    for order in orders:
        assert sorted(order) == list(places)
        assert all(place != old for place, old in zip(places, order, strict=True))
    rolled = {places[n:] + places[:n] for n in range(count)}
    assert len(orders) == (count - 1 if count < 4 else len(orders))
    assert len(orders) >= min(count - 1, 4)
    assert count < 4 or not orders & {places[::-1], *rolled}
    assert reorder(count, "ab12") == reorder(count, "ab12"), "the same in every process"
    assert reorder(1, "ab12") is None


@pytest.mark.parametrize(
    "ordered", [Pictures(images=[3]), Clips(frames=4)], ids=["labels", "times"]
)
def test_reordering_moves_images_and_nothing_else(
    model: VisionLanguageModel, ordered: Task, monkeypatch: pytest.MonkeyPatch
):
    """Guards against times or labels that move along with their images, which would change
    nothing, and against replies and predictions that had the true order after all.
    """
    tiles, prompts = list[torch.Tensor](), list[Prompt]()
    fuse = VisionLanguageModel.fuse
    monkeypatch.setattr(
        VisionLanguageModel,
        "fuse",
        lambda self, batch, *rest: tiles.append(batch.tiles) or fuse(self, batch, *rest),
    )
    monkeypatch.setattr(
        VisionLanguageModel,
        "generate",
        lambda self, asked, **_: prompts.extend(asked) or ["?"] * len(asked),
    )
    own = evaluate(model, ordered, "test", 5)
    moved = evaluate(model, ordered, "test", 5, images="reordered")
    assert [(r.question, r.index, r.shown) for r in own] == [
        (r.question, r.index, r.shown) for r in moved
    ]
    assert {r.images for r in own} == {"own"}
    assert {r.images for r in moved} == {"reordered"}
    first, second = (seen.unflatten(0, (5, -1)) for seen in tiles)
    for index in range(5):
        order = reorder(first.shape[1], ordered.sample("test", index).content)
        assert torch.equal(second[index], first[index, order])

    with_replies(model, ordered, [replace(record, correct=False) for record in moved])
    for record, prompt in zip(moved, prompts, strict=True):
        sample = ordered.sample("test", record.index)
        order = reorder(len(sample.images), sample.content)
        expected = [sample.images[place].tobytes() for place in order]
        said = prompt.turns[0].content
        if isinstance(said[0], Video):
            assert [frame.tobytes() for frame in said[0].frames] == expected
            assert tuple(said[0].times) == sample.times
        else:
            pictures = [part for part in said if isinstance(part, Image)]
            assert [picture.pixels.tobytes() for picture in pictures] == expected
            assert tuple(part for part in said[:-1] if isinstance(part, str)) == sample.labels


def test_samples_of_one_image_have_no_other_order(model: VisionLanguageModel):
    """Guards against a control that counts what it could not change."""
    assert evaluate(model, Charts(size=32), "test", 3, images="reordered") == []


def test_exchanged_pictures_go_by_the_names_that_the_question_uses(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
):
    """Guards against a blind control that asks for a letter which stands nowhere."""
    prompts: list[Prompt] = []
    monkeypatch.setattr(
        VisionLanguageModel,
        "generate",
        lambda self, asked, **_: prompts.extend(asked) or ["?"] * len(asked),
    )
    task = Pictures(images=[2], questions=["color"])
    shuffled = evaluate(model, task, "test", 4, images="shuffled")
    with_replies(model, task, [replace(record, correct=False) for record in shuffled])
    for record, prompt in zip(shuffled, prompts, strict=True):
        label, image, *_ = prompt.turns[0].content
        assert label == task.sample("test", record.index).labels[0]
        assert image.pixels.tobytes() == task.sample("test", record.shown).images[0].tobytes()


def test_an_empty_split_is_an_error(model: VisionLanguageModel):
    """Guards against an accuracy of nothing."""
    with pytest.raises(UserError, match="'val' has no sample"):
        evaluate(model, Repeats("ab"), "val", 4)


def test_evaluating_leaves_the_model_in_its_mode(model: VisionLanguageModel, task: Task):
    """Guards against training that goes on in eval mode after a look at validation."""
    for mode in (True, False):
        model.train(mode)
        evaluate(model, task, "test", 1)
        assert model.training is mode


def test_expert_load_counts_each_modality(model: VisionLanguageModel):
    """Guards against padding or the other modality in a modality's expert load."""
    task = Charts(size=32, questions_per_image=8)  # charts of few bars have fewer questions
    samples = [task.sample("val", index) for index in range(8)]
    load = expert_load(model, task, "val", 8)
    assert set(load) == {0, 1}
    batch = collate([model.prompts.encode_sample(sample) for sample in samples])
    with torch.inference_mode():
        routing = model(batch).routing
    assert batch.documents is not None, "there is padding"
    image = batch.patches[batch.documents >= 0]
    for layer in routing:
        for name, mask in (("image", image), ("text", ~image)):
            visits = layer.experts[mask, 0].bincount(minlength=3)
            assert load[layer.layer][name] == pytest.approx((visits / visits.sum()).tolist())


def test_expert_load_of_a_small_split_and_of_text(model: VisionLanguageModel):
    """Guards against samples beyond a split's end, and shares of tokens that are not there."""
    assert set(expert_load(model, Repeats("ab"), "test", 64)[0]) == {"image", "text"}
    assert set(expert_load(model, InWords(Charts(size=32)), "test", 2)[0]) == {"text"}
    with pytest.raises(UserError, match="'val' has no sample"):
        expert_load(model, Repeats("ab"), "val", 4)


def record(kind: str, correct: bool) -> Record:
    question = Question("Wie groß?", "é", kind, ("é", "ü"))
    return Record("test", 3, "ab12", 3, question, correct, reply="é" if correct else "ü")


def test_summary_separates_overall_and_macro():
    """Guards against a macro mean weighted by the number of questions, and lost types."""
    records = [record("value", True)] * 6 + [record("count", True), record("count", False)]
    summary = summarize(records)
    assert summary.overall.accuracy == pytest.approx(7 / 8)
    assert summary.macro == pytest.approx((1.0 + 0.5) / 2)
    assert {kind: score.n for kind, score in summary.by_kind.items()} == {"count": 2, "value": 6}
    assert summary.overall.low < 7 / 8 < summary.overall.high
    with pytest.raises(ValueError, match="no record"):
        summarize([])


def test_predictions_are_stored_whole(tmp_path):
    """Guards against results that cannot be scored again from the file."""
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [record("value", True), record("count", False)])
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first == {
        "split": "test",
        "index": 3,
        "content": "ab12",
        "shown": 3,
        "correct": True,
        "reply": "é",
        "images": "own",
        "question": "Wie groß?",
        "answer": "é",
        "kind": "value",
        "present": ["é", "ü"],
    }
    assert second["reply"] == "ü"
    assert not second["correct"]
