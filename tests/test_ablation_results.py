"""Reading a sweep: what counts, which seeds are compared, and what is missing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.ablation.results import read_results, write_results
from sandbox.errors import UserError
from tests.sweeps import STEPS, write_json, write_sweep

RATES = {"early": 0.9, "cross-attention": 0.3, "linear": 0.9}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Spare the 0.1 s that statsmodels' Holm takes at every call: it collects garbage."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gc.collect", lambda: 0)
        yield


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "out", RATES, failed=[("cross-attention", 1)])


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    write_json(path, json.loads(path.read_text()) | changes)


def test_a_failed_run_is_missing_and_its_arm_compared_on_the_other_seeds(sweep: Path) -> None:
    """One run out of memory took the report of a night's runs with it."""
    results = read_results(sweep)
    arm = results.arms["cross-attention"]
    assert list(arm.runs) == [0, 2]
    assert arm.missing == {1: "the training failed or was stopped: see seed-1/arm-1.log"}
    found = results.comparisons["accuracy"]
    assert {name: c.difference.seeds for name, c in found.items()} == {
        "cross-attention": 2,
        "linear": 3,
    }
    assert found["cross-attention"].verdict == "lower"
    by_seed = results.differences("accuracy", "cross-attention")
    mean = found["cross-attention"].difference.mean
    assert sum(by_seed) / 2 == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "gone", "why"),
    [
        ("arm-2-test.json", True, "the test has not started"),
        ("arm-2-test.json", False, "the test failed or was stopped: see seed-0/arm-2-test.log"),
        ("arm-2.json", True, "the training has not started"),
        ("arm-2-test/summary.json", True, "the test wrote no summary.json: its data module asks"),
    ],
)
def test_a_missing_run_says_how_far_it_came(sweep: Path, name: str, gone: bool, why: str) -> None:
    """Told "missing" alone, the reader has to go through all logs."""
    path = sweep / "seed-0" / name
    path.unlink() if gone else edit(path, finished=False)
    assert read_results(sweep).arms["linear"].missing[0].startswith(why)


def test_without_the_baseline_nothing_is_compared(tmp_path: Path) -> None:
    """The arm that failed was the baseline: what the others scored is still worth reading."""
    failed = [("early", seed) for seed in (0, 1, 2)]
    results = read_results(write_sweep(tmp_path / "out", RATES, failed=failed))
    assert results.comparisons == {}
    assert results.incomparable["accuracy"] == "no seed of the baseline has a result"
    assert results.arms["linear"].score("accuracy") is not None


def test_arms_with_other_questions_are_not_compared(sweep: Path) -> None:
    """Answers to different questions, subtracted, look like a finding."""
    path = sweep / "seed-0/arm-2-test/predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    results = read_results(sweep)
    assert "same questions on both sides" in results.incomparable["accuracy"]
    assert "heldout" in results.comparisons  # of which nothing is gone


def test_each_metric_is_over_its_questions(sweep: Path) -> None:
    """A count asks for no held-out combination: counted in, it lifts what is called held out."""
    records = [
        json.loads(line)
        for line in (sweep / "seed-0/arm-0-test/predictions.jsonl").read_text().splitlines()
    ]
    own = [record for record in records if record["images"] == "own"]
    expected = {
        "accuracy": [r for r in own if r["split"] == "test"],
        "accuracy/count": [r for r in own if r["split"] == "test" and r["kind"] == "count"],
        "heldout": [r for r in own if r["split"] == "heldout" and r["present"]],
        "heldout/count": [r for r in own if r["split"] == "heldout" and r["kind"] == "count"],
    }
    run = read_results(sweep).arms["early"].runs[0]
    for metric, asked in expected.items():
        assert list(run.answers(metric).values()) == [record["correct"] for record in asked], metric
    assert 0 < len(expected["heldout"]) < sum(r["split"] == "heldout" for r in own)


def test_a_question_asked_twice_counts_twice(sweep: Path) -> None:
    """Under one key, the second answer would replace the first."""
    paths = [sweep / f"seed-{s}/arm-{a}-test/predictions.jsonl" for s in (0, 2) for a in (0, 1)]
    before = len(read_results(sweep).arms["early"].runs[0].answers("accuracy"))
    for path in paths:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], *lines]))
    assert len(read_results(sweep).arms["early"].runs[0].answers("accuracy")) == before + 1


def test_the_curve_is_joined_over_resumes(sweep: Path) -> None:
    """A resumed run logs into a further file; alone, the first ends where the run was killed."""
    run = sweep / "seed-0/arm-0"
    (run / "metrics/metrics.csv").write_text("step,val/accuracy\n9,0.1\n14,\n19,0.2\n")
    (run / "metrics-2").mkdir()
    (run / "metrics-2/metrics.csv").write_text("val/accuracy,step\n0.25,19\n0.3,29\n")
    curve = read_results(sweep).arms["early"].runs[0].curve
    assert curve == [(10, 0.1), (20, 0.25), (30, 0.3)]


def test_what_a_resumed_run_took_counts_all_sessions(sweep: Path) -> None:
    """The last session alone makes a run that was resumed near its end look almost free."""

    def took(steps: int, seconds: float, memory: int | None) -> dict[str, Any]:
        return {
            "steps": steps,
            "samples": steps * 16,
            "tokens": steps * 900,
            "seconds": seconds,
            "tokens_per_s": steps * 900 / seconds,
            "peak_memory": memory,
        }

    stopped = {"step": 0, "trained": took(35, 50.0, 7)}
    resumed = {"step": 30, "trained": took(50, 40.0, None)}
    again = {"step": STEPS, "trained": took(0, 1.0, 5)}  # killed between training and its mark
    killed = {"step": 0}
    for seed, sessions in enumerate(([stopped, resumed, again], [killed, resumed], [killed])):
        write_json(sweep / f"seed-{seed}/arm-0/run.json", {"sessions": sessions})
    runs = read_results(sweep).arms["early"].runs
    assert runs[0].cost == took(80, 40.0, 7) | {"seconds": 91.0, "tokens_per_s": 50 * 900 / 40}
    assert runs[1].cost == took(80, 40.0, None) | {"seconds": None, "tokens_per_s": 50 * 900 / 40}
    assert runs[2].cost == {}


def test_results_are_plain_json(sweep: Path) -> None:
    """NaN or a Python object in the file, and no other program reads the figures."""
    results = read_results(sweep)
    write_results(results, sweep / "results.json")
    read = json.loads((sweep / "results.json").read_text(), parse_constant=pytest.fail)
    arm = read["arms"]["cross-attention"]
    assert arm["missing"] == {"1": results.arms["cross-attention"].missing[1]}
    blind = results.arms["cross-attention"].runs[2].summary["no_image_accuracy"]
    assert arm["runs"]["2"]["summary"]["no_image_accuracy"] == blind
    assert read["comparisons"]["accuracy"]["cross-attention"]["verdict"] == "lower"
    assert set(read["arms"]["early"]["scores"]) == {"accuracy", "heldout", "accuracy/value"}


def test_a_directory_without_a_plan_is_no_sweep(tmp_path: Path) -> None:
    """A mistyped directory must not end in a traceback."""
    with pytest.raises(UserError, match=r"no plan\.json"):
        read_results(tmp_path)
