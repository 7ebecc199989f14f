"""The report: one page that says what the figures bear out, and loads nothing."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.data.charts import Charts
from sandbox.data.task import Question, Sample, Task
from sandbox.evals.controls import Blind
from sandbox.evals.run import Record, Score, Summary, evaluate, with_replies
from sandbox.model import VisionLanguageModel
from sandbox.report.gather import architecture, gallery, swap
from sandbox.report.page import (
    LABEL_HEIGHT,
    Card,
    Curve,
    Facts,
    Gallery,
    _apart,
    _spread,
    verdict,
    write_report,
)
from sandbox.tokenizer import Tokenizer

VOID = {"meta", "link", "img", "br", "polyline"}


@pytest.fixture(scope="module")
def task() -> Task:
    return Charts(size=32, questions_per_image=4)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("small")
    config = BackboneConfig(tokenizer.vocab_size, width=32, layers=2, heads=2, experts=3)
    return VisionLanguageModel(Patches(32, 8, width=32), EarlyFusion, config, tokenizer)


def score(right: int, n: int) -> Score:
    return Score.of([True] * right + [False] * (n - right))


@pytest.fixture
def facts(model: VisionLanguageModel, task: Task) -> Facts:
    picture = PILImage.new("RGB", (32, 32), "red")
    right = Card(picture, "How <b>many</b>?", "3", "3", True)
    wrong = Card(PILImage.new("RGB", (400, 300)), "Which one?", "red", "", False)
    summary = Summary(score(90, 100), {"count": score(90, 100)}, 0.9)
    blind = Summary(score(20, 100), {"count": score(20, 100)}, 0.2)
    return Facts(
        title="A test",
        run={"seed": "0"},
        own=summary,
        heldout=replace(summary, by_kind={}),
        shuffled=blind,
        no_image=replace(blind, overall=score(17, 100)),
        blind=Blind(0.25, {"count": 0.25}, 0.3),
        swap=(right, wrong),
        architecture=architecture(model, task.sample("test", 0)),
        curve=Curve([10, 20], {"all": [0.5, 0.9], "count": [0.6, 0.9]}),
        experts={0: {"image": [1.0, 0.0, 0.0], "text": [0.5, 0.5, 0.0]}},
        galleries=[Gallery("Pictures", "One of each.", [right, wrong])],
        commands=[("Ask", "sandbox ask 'How many?'")],
        provenance={"torch": torch.__version__},
    )


class Page(HTMLParser):
    """Checks nesting as it reads, and remembers what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(tmp_path: Path, facts: Facts) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(path, facts)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_loads_nothing_and_nests(tmp_path: Path, facts: Facts):
    """Guards against a page that breaks offline or after it is moved, and against open tags."""
    text, page = read(tmp_path, facts)
    assert text.startswith("<!DOCTYPE html>")
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert all(url.strip("'\"").startswith("data:") for url in re.findall(r"url\((.*?)\)", text))


def test_pictures_have_words_and_words_are_no_markup(tmp_path: Path, facts: Facts):
    """Guards against pictures that a screen reader passes over, and questions that inject tags."""
    _, page = read(tmp_path, facts)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(image["alt"] for image in images)
    assert any("Which one? The true answer is red." in image["alt"] for image in images)
    assert all(a.get("aria-label") for _, a in page.tags if a.get("role") == "img")
    assert "How <b>many</b>?" in page.text
    assert [image.get("class") for image in images] == ["small", None] * 2, "photos stay smooth"


def test_page_tells_the_wrong_from_the_right(tmp_path: Path, facts: Facts):
    """Guards against a gallery that hides its errors."""
    _, page = read(tmp_path, facts)
    assert page.text.count("✗ wrong") == 1
    assert page.text.count("✓ right") == 1
    assert "truth: red" in page.text
    assert "(no answer)" in page.text


def test_page_does_without_what_a_run_lacks(tmp_path: Path, facts: Facts):
    """Guards against a crash where there are no experts, no curve, no swap, or no wrong answer."""
    bare = replace(facts, experts={}, curve=Curve([], {}), swap=None, galleries=[])
    _, page = read(tmp_path, bare)
    assert "too short to draw" in page.text
    assert "Who reads pictures" not in page.text
    read(tmp_path, replace(facts, experts={0: {"text": [0.5, 0.5]}}))


@pytest.mark.parametrize(
    ("own", "shuffled", "majority", "says"),
    [
        (90, 20, 0.2, "It looks at the picture."),
        (40, 20, 0.2, "It has begun to look"),
        (22, 20, 0.2, "It does not look"),
        (90, 90, 0.2, "It does not look"),
        (40, 10, 0.5, "It does not look"),
    ],
)
def test_verdict_is_what_the_scores_bear_out(own: int, shuffled: int, majority: float, says: str):
    """Guards against praise for a model that scores as well on exchanged pictures, or blind."""
    assert verdict(score(own, 100), score(shuffled, 100), majority).startswith(says)


def test_labels_of_the_curve_do_not_overlap():
    """Guards against line names printed over each other, or off the plot."""
    placed = _spread({"a": 0.02, "b": 0.0, "c": 0.01, "d": 0.5, "e": 1.0, "f": 0.99})
    heights = sorted(placed.values())
    gaps = [b - a for a, b in pairwise(heights)]
    assert min(gaps) >= LABEL_HEIGHT - 1e-9
    assert heights[0] >= 0
    assert heights[-1] <= 1
    assert placed["d"] == 0.5
    assert placed["b"] < placed["c"] < placed["a"]


def test_apart_is_the_share_that_would_have_to_move():
    """Guards against a difference of loads counted twice."""
    assert _apart({"image": [1.0, 0.0], "text": [0.0, 1.0]}) == 1.0
    assert _apart({"image": [0.5, 0.5], "text": [0.25, 0.75]}) == 0.25
    assert _apart({"text": [0.5, 0.5]}) is None


def test_architecture_counts_the_model(model: VisionLanguageModel, task: Task):
    """Guards against figures in the diagram that are not the model's."""
    design = architecture(model, task.sample("test", 0))
    assert design.params_total == sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert design.params_active == design.params_total - routed * 2 // 3
    assert [layer.experts for layer in design.layers] == [3, 3]
    assert design.prompt.tokens.count(None) == model.fusion.tokens_per_tile == 4
    assert design.prompt.grid == 2
    words = "".join(token or "" for token in design.prompt.tokens)
    assert task.sample("test", 0).questions[0].text in words


def test_pieces_of_a_tiled_picture_are_those_of_its_tiles(model: VisionLanguageModel, monkeypatch):
    """Guards against a drawing that cuts the tokens of a tile from the picture as a whole."""
    picture = PILImage.effect_noise((60, 30), 90)
    sample = Sample((picture,), (Question("How many?", "3", "count"),), "content")
    assert architecture(model, sample).prompt.picture.size == (32, 32)
    monkeypatch.setattr(model, "max_tiles", 2)
    design = architecture(model, sample)
    assert design.prompt.tokens.count(None) == 3 * model.fusion.tokens_per_tile
    assert design.prompt.picture.size == (32, 3 * 32)
    first = np.asarray(design.prompt.picture)[:30, :, 0]
    assert (first == np.asarray(picture)[:, :32]).all()
    assert "up to 2 tiles" in design.stages[0].detail


def test_gallery_shows_wrong_and_right_answers(model: VisionLanguageModel, task: Task):
    """Guards against a gallery of one picture, of right answers alone, or with a false count."""
    records = with_replies(model, task, evaluate(model, task, "test", 8), max_tokens=2)
    half = [replace(record, correct=record.index >= 2) for record in records]
    shown = gallery(task, half, title="T", size=6)
    assert [card.correct for card in shown.cards] == [False] * 2 + [True] * 4
    assert len({card.picture.tobytes() for card in shown.cards}) == 6
    wrong = sum(not record.correct for record in half)
    assert shown.note.startswith(f"2 of its {wrong} wrong answers, and 4 of its")
    all_wrong = gallery(task, [replace(r, correct=False) for r in records], title="T", size=6)
    assert len(all_wrong.cards) == 6


def test_swap_asks_what_both_pictures_answer(model: VisionLanguageModel, task: Task):
    """Guards against a swap whose second picture cannot answer, and a flattering choice."""
    own = evaluate(model, task, "test", 8)
    shuffled = evaluate(model, task, "test", 8, images="shuffled")
    pair = swap(model, task, own, shuffled)
    assert pair is not None
    before, after = pair
    assert before.question == after.question
    assert before.answer != after.answer
    assert before.picture.tobytes() != after.picture.tobytes()

    def truths(record: Record) -> set[str]:
        asked = task.sample("test", record.shown).questions
        return {q.answer for q in asked if q.text == record.question.text}

    answerable = [
        (a, b) for a, b in zip(own, shuffled, strict=True) if truths(b) - {a.question.answer}
    ]
    assert before.question == answerable[0][0].question.text, "the first, whatever was replied"
    assert after.answer in truths(answerable[0][1])
    assert swap(model, task, own[:0], shuffled[:0]) is None
