"""The page of an evaluation: what it chooses to show, and that it shows it as it is."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.evals import asking
from sandbox.evals.answering import Reply
from sandbox.evals.benchmark import evaluate_benchmark
from sandbox.evals.gallery import CARDS, sections
from sandbox.evals.predictions import Prediction
from tests.asked import Colours, mixture

ONE = Prediction(*("", "test", 0, 0, "", "", "own", 0, "", (), "", "", 0.5, "", ("x",), 1.0, 0))


def test_each_section_shows_what_it_says() -> None:
    """Guards against sections sorted the wrong way round, and twelve questions about one image."""
    rows = [(0, 0.9), (0, 0.3), (1, 0.2), (1, 0.8), (0, 0.6), (0, 0.95)]
    many = [
        replace(ONE, id=str(n), content=str(n), score=float(score), confidence=confidence)
        for n, (score, confidence) in enumerate(rows)
    ]
    many[5] = replace(many[5], content="0")  # of the same image as the first
    found = {s.title: [p.id for p in s.predictions] for s in sections(many)}
    assert found == {
        "Its surest mistakes": ["5", "4", "1"],
        "Its worst answers": ["1", "4", "0"],
        "Its best answers": ["3", "2"],
    }
    flawless = [replace(each, score=1.0) for each in many * 9]
    assert [s.title for s in sections(flawless)] == ["Its best answers"]
    crowd = [replace(ONE, content=str(n)) for n in range(99)]
    assert len(sections(crowd)[0].predictions) == CARDS


def test_the_page_is_whole_and_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against replies that become part of the page, half characters that stop it, and
    anything that is loaded from elsewhere.
    """
    said = "<script>alert(1)</script> \ud83d"
    monkeypatch.setattr(
        asking, "answer", lambda model, group, max_tokens: [Reply(said, 0.5) for _ in group]
    )
    evaluate_benchmark(mixture(), Colours(samples=5), out=tmp_path)
    page = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 5
    assert all(source.startswith("data:") for source in sources)
