"""The report of a sweep: what it says is what the files say, and it is one page for a person."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sandbox.ablation.charts import curves, forest, gates, loads, quantity
from sandbox.ablation.examples import SHOWN, disagreements
from sandbox.ablation.report import write_report
from sandbox.ablation.results import CONTROLS, Results, read_results
from sandbox.ablation.tables import chance, machine, tables, verdicts
from sandbox.data.charts import Charts
from tests.sweeps import ARMS, FLOPS, STEPS, TASK, write_json, write_sweep

VOID = {"meta", "link", "img", "br", "polyline", "polygon"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Spare the 0.1 s that statsmodels' Holm takes at every call: it collects garbage."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gc.collect", lambda: 0)
        yield


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms of three seeds, one of which failed, and their report."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    write_report(write_sweep(out, failed=[("cross-attention", 1)]))
    return out


@pytest.fixture(scope="module")
def results(sweep: Path) -> Results:
    """What was read of it."""
    return read_results(sweep)


class Page(HTMLParser):
    """Checks that tags close in order; collects text, ids and what would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.said: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said += data.split()


def test_the_page_is_whole_and_loads_nothing(sweep: Path) -> None:
    """Moved or mailed, a page that loads a style sheet or a picture is a ruin."""
    text = (sweep / "report.html").read_text()
    page = Page(text)
    assert all(address.startswith("data:") for address in page.loads)
    assert not re.search(r"url\((?!'data:)|@import|<script", text)
    assert len(page.ids) == len(set(page.ids))


def test_the_same_files_give_the_same_reports(sweep: Path) -> None:
    """A report with a date, a hash order or a random draw in it cannot be compared with git."""
    names = ("report.html", "report.md", "results.json")
    before = [(sweep / name).read_bytes() for name in names]
    write_report(sweep)
    assert [(sweep / name).read_bytes() for name in names] == before


def test_page_and_markdown_tell_the_same(sweep: Path, results: Results) -> None:
    """Two reports of one sweep that differ: which is right?"""
    said = " ".join(Page((sweep / "report.html").read_text()).said).replace(" : ", ": ")
    text = " ".join((sweep / "report.md").read_text().split())
    for verdict in verdicts(results, "accuracy"):
        assert f"{verdict.arm}: {verdict.sentence}" in said
        assert f"- **{verdict.arm}**: {verdict.sentence}" in text
    for table in tables(results):
        for row in table.rows:
            assert " ".join(row[table.labels - 1 :]) in said
            assert f"| {' | '.join(row)} |" in text
    assert "see seed-1/arm-1.log" in said
    assert "see seed-1/arm-1.log" in text


def test_every_table_of_accuracies_holds_the_blind_controls(results: Results) -> None:
    """Without them, an accuracy may be what a blind model gets."""
    found = tables(results)
    assert len(found) == 4
    for table in found:
        assert set(CONTROLS) <= set(table.header) or "best blind control" in table.header
        assert all(len(row) == len(table.header) for row in table.rows)
    costs = found[2]
    blind = costs.header.index("best blind control")
    arm = results.arms["early"]
    best = max(value for key, _ in CONTROLS.values() if (value := arm.mean(key)) is not None)
    assert costs.rows[0][blind] == f"{best:.3f}"


def test_the_verdict_says_what_the_comparison_bears_out(tmp_path: Path) -> None:
    """An arm was called better because its mean was."""
    rates = {"early": 0.5, "high": 0.98, "low": 0.02, "same": 0.5, "gone": 0.9}
    failed = [("gone", seed) for seed in (0, 1, 2)]
    out = write_sweep(tmp_path / "out", rates, failed=failed, samples=30)
    told = write_report(out)
    results = read_results(out)
    assert {v.arm: v.outcome for v in verdicts(results, "accuracy")} == {
        "high": "higher",
        "low": "lower",
        "same": "no difference shown",
        "gone": "not compared",
    }
    high, low, same, gone = [line for line in told.splitlines() if line.startswith("- **")]
    found = results.comparisons["accuracy"]
    for line, word, name in ((high, "higher than", "high"), (low, "lower than", "low")):
        d = found[name].difference
        assert f"{word} early: {d.mean:+.3f} (95% interval {d.low:+.3f} to {d.high:+.3f})" in line
        assert f"Cohen’s h {found[name].effect:+.2f}, 3 seeds." in line
        assert "true difference" not in line
    assert found["high"].difference.mean > 0.3
    assert f"true difference of {found['same'].minimum_detectable:.3f} would be shown" in same
    assert "no seed of it" in gone


@pytest.mark.parametrize(
    ("p", "told"), [(0.0004, "< 0.001"), (0.0497, "0.0497"), (0.0501, "0.0501"), (0.5, "0.500")]
)
def test_p_values_do_not_round_onto_their_threshold(p: float, told: str) -> None:
    """A p of 0.050 beside the word higher reads as a contradiction."""
    assert chance(p) == told


def test_names_and_replies_cannot_break_the_report(tmp_path: Path) -> None:
    """A reply is whatever a model says, and a model says anything."""
    out = write_sweep(tmp_path / "out", {"early": 0.95, "late": 0.1}, samples=6)
    nasty = "<b>|`no"
    for path in out.glob("seed-*/*-test/predictions.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if not record["correct"]:
                record["reply"] = nasty
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    plan = json.loads((out / "plan.json").read_text())
    plan["question"] = "Is <i>late</i> | late?"
    write_json(out / "plan.json", plan)
    write_report(out)
    page = (out / "report.html").read_text()
    Page(page)
    assert "<b>|" not in page
    assert "&lt;b&gt;|`no" in page
    assert "<i>late" not in page


def test_nothing_finished_is_told_and_breaks_nothing(tmp_path: Path) -> None:
    """The report of a sweep whose runs all failed is read first of all."""
    failed = [(name, seed) for name in ARMS for seed in (0, 1)]
    out = write_sweep(tmp_path / "out", seeds=(0, 1), failed=failed)
    told = write_report(out)
    assert told.count("the training failed") == len(failed)
    assert "not compared" in told
    Page((out / "report.html").read_text())


def test_one_seed_of_two_arms_is_enough(tmp_path: Path) -> None:
    """The first look at a sweep is at one seed."""
    out = write_sweep(tmp_path / "out", {"early": 0.9, "late": 0.2}, seeds=(3,), samples=8)
    told = write_report(out)
    assert "lower than early" in told
    assert "1 seed. A single seed speaks of other images, not of other seeds." in told
    Page((out / "report.html").read_text())


# --- Disagreements --------------------------------------------------------------------------------


def test_disagreements_are_where_majorities_differ(results: Results) -> None:
    """A question that a single seed got wrong shows that seed's luck, not the arm's."""
    found = disagreements(results, "cross-attention")
    assert found.better + found.worse >= len(found.shown) > 0
    assert sum(example.gain > 0 for example in found.shown) <= SHOWN
    for example in found.shown:
        shares = [
            sum(reply.correct for reply in each.values()) / len(each)
            for each in (example.arm, example.baseline)
        ]
        assert set(example.arm) == set(example.baseline) == {0, 2}  # what both have
        assert shares[0] - shares[1] == example.gain
        assert min(shares) < 0.5 < max(shares)
        assert {r.question for r in example.arm.values()} == {example.asked.question}
    pictures = [e.asked.content for e in found.shown if e.gain < 0]
    assert len(set(pictures)) == len(pictures)


def test_a_disagreement_shows_its_own_picture(results: Results) -> None:
    """A question beside another sample's picture makes any reply look wrong."""
    found = disagreements(results, "cross-attention")
    task = Charts(**TASK)  # type: ignore[arg-type]
    for example in found.shown:
        picture = task.sample("test", example.asked.index).images[0]
        assert example.picture is not None
        assert example.picture.tobytes() == picture.tobytes()


@pytest.mark.parametrize("change", ["seed: 1", "size: -1", "nonsense: 1", ""])
def test_without_the_same_task_there_is_no_picture(
    sweep: Path, tmp_path: Path, change: str
) -> None:
    """Data that moved or changed since must cost the pictures, not show others, nor the report."""
    out = write_sweep(tmp_path / "out", {"early": 0.95, "late": 0.1}, samples=8)
    for path in out.glob("seed-*/*/config.yaml"):
        path.write_text(path.read_text().replace("size: 32", change) if change else "")
    found = disagreements(read_results(out), "late")
    assert found.shown
    assert all(example.picture is None for example in found.shown)
    write_report(out)
    assert "cannot be drawn again" in (out / "report.html").read_text()


# --- Charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (2e13, "FLOP", "20 TFLOP"),
        (1_151_234, "", "1.15 M"),
        (512, "", "512"),
        (999_600, "B", "1000 kB"),
        (0, "", "0"),
        (None, "", "-"),
    ],
)
def test_quantities_are_short(value: float | None, unit: str, told: str) -> None:
    """1e+03 k, or a row of digits to count, is no figure to read."""
    assert quantity(value, unit) == told


def test_curves_run_over_flops(results: Results) -> None:
    """Over steps, the arm with the dearer step looks like the better learner."""
    lines = curves(results).lines
    assert [line.name for line in lines] == list(ARMS)
    most = FLOPS * STEPS
    for number, line in enumerate(lines):
        steps = STEPS // (1 + number)
        arm = results.arms[line.name]
        last = line.points.split()[-1].split(",")
        assert float(last[0]) == pytest.approx(steps * FLOPS * (1 + number) / most, abs=1e-4)
        ends = [run.curve[-1][1] for run in arm.runs.values()]
        assert float(last[1]) == pytest.approx(1 - sum(ends) / len(ends), abs=1e-4)
        heights = [1 - float(point.split(",")[1]) for point in line.area.split()]
        assert len(heights) == 2 * len(line.points.split())
        assert max(heights) == pytest.approx(max(ends), abs=1e-4)


def test_marks_stay_on_their_axes(results: Results) -> None:
    """An interval that leaves the plot covers the names beside it."""
    found = forest(results)
    assert [row.name for row in found.rows] == list(ARMS)
    assert [row.difference is None for row in found.rows] == [True, False, False]
    tracks = [t for row in found.rows for t in (row.accuracy, row.difference) if t]
    for track in tracks:
        assert 0 <= track.low <= track.mean <= track.high <= 1
        assert all(0 <= dot <= 1 for dot in track.dots)
    assert 0 < found.zero < 1
    assert found.zero in [place for place, name in found.differences.ticks if name == "0"]
    assert 2 <= len(found.differences.ticks) <= 8


def test_gates_and_experts_are_those_of_the_arm(results: Results) -> None:
    """A mean over seeds of expert 1, which is another expert in each, is no figure."""
    arms = results.arms
    assert not gates(arms["early"])
    assert not loads(arms["cross-attention"])
    rows = gates(arms["cross-attention"])
    assert [row.name for row in rows] == ["layer 4 attention", "layer 4 ffn"]
    inside = [run.summary["inside"] for run in arms["cross-attention"].runs.values()]
    opened = [each["gates"]["3"]["attention"] for each in inside]
    assert rows[0].dots == [(1 + gate) / 2 for gate in opened]
    assert rows[0].size == pytest.approx(sum(map(abs, opened)) / len(opened))
    inside = [run.summary["inside"]["expert_load"] for run in arms["early"].runs.values()]
    found = loads(arms["early"])
    assert [row.layer for row in found] == [2, 3]
    assert found[0].shares == inside[0]["1"]
    apart = [sum(abs(share - 0.25) for share in each["1"]["image"]) / 2 for each in inside]
    assert found[0].apart == pytest.approx(sum(apart) / 3)


def test_machines_that_differ_are_all_named(results: Results) -> None:
    """Tokens a second of two machines, told as of one."""
    arm = results.arms["early"]
    run = replace(arm.runs[2], session={**arm.runs[2].session, "device": "NVIDIA H100"})
    other = replace(results, arms={"early": replace(arm, runs={**arm.runs, 2: run})})
    assert machine(other)["device"] == "cpu, NVIDIA H100"
    assert machine(other)["commit"] == "0123456789ab"
