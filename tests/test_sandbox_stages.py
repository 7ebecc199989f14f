"""A ladder that runs: order, failures, what is skipped, what goes on, and the report at the end.

A script stands in for `sandbox fit` and `sandbox test`, which take seconds to start; the last test
runs the real ones.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from math import asin
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import cli
from sandbox.errors import UserError
from sandbox.evals.paired import Comparison, Difference
from sandbox.stages.plan import Ladder, plan
from sandbox.stages.process import Order, Process
from sandbox.stages.progress import time_left
from sandbox.stages.report import report, sentence
from sandbox.stages.run import Mark, run
from tests.ladders import STAND_IN, STUB, calls, hanging, ladder


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own, with the script in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path


def go(chosen: Ladder, out: str = "out", at_once: int = 1) -> tuple[dict[str, str], list[str]]:
    """What failed, and what was said."""
    said: list[str] = []
    program = STAND_IN
    failed = run(
        plan(chosen, Path(out)), Path(out), at_once=at_once, program=program, say=said.append
    )
    return failed, said


def findings(out: str) -> tuple[str, dict[str, Any]]:
    """The report and the results, but for the times."""
    text = (Path(out) / "report.md").read_text().split("## CPU time")[0]
    results = json.loads((Path(out) / "results.json").read_text())
    results.pop("stages")
    return text, results


def test_all_runs_once_in_order_and_a_second_call_runs_none() -> None:
    """A ladder that trains finished stages again takes hours for nothing, and may change them."""
    chosen = ladder().choose(seeds=[0, 2], arms=["plain", "tall"])
    failed, said = go(chosen)
    jobs = plan(chosen, Path("out"))
    assert not failed
    assert [line.split(" --")[0] for line in calls()] == [job.argv[0] for job in jobs]
    assert len(said) == 2 * len(jobs)
    assert said[0].endswith("seed-0/fresh started")
    assert said[-1].startswith(f"[{len(jobs)}/{len(jobs)} 0:00:")
    assert "finished in 0:00:00" in said[-1]
    assert "at work as" in Path("out/seed-2/joint.log").read_text()
    commands = Path("out/commands.txt").read_text().splitlines()
    assert len(commands) == len(jobs)
    assert "stub.py fit --out out/seed-0/fresh --config fresh.yaml" in commands[0]

    first = report(chosen, Path("out"))
    assert go(chosen)[0] == {}
    assert calls() == []
    assert report(chosen, Path("out")) == first
    assert Path("out/commands.txt").read_text().splitlines() == commands


def test_commands_of_a_smaller_choice_stay_listed() -> None:
    """One more seed, added later, must not wipe out how the first ones were made."""
    chosen = ladder()
    go(chosen.choose(seeds=[0], arms=["plain"]))
    go(chosen.choose(seeds=[1], arms=["plain"]))
    listed = Path("out/commands.txt").read_text()
    assert listed.count("\n") == 4
    assert "out/seed-0/fresh" in listed


def test_jobs_run_side_by_side_and_share_the_cores() -> None:
    """Two processes with as many threads as cores take turns instead of working."""
    cores = len(os.sched_getaffinity(0))
    chosen = ladder().choose(arms=["plain"])
    _, said = go(chosen, at_once=3)
    assert [line.split()[-1] for line in said[:3]] == ["started"] * 3
    running = [line.split()[-1] == "started" for line in said]
    assert max(2 * sum(running[:n]) - n for n in range(len(said))) == 3  # never more
    assert {line.split()[-1] for line in calls()} == {str(max(1, cores // 3))}
    go(chosen.choose(seeds=[0]), "alone")
    assert {line.split()[-1] for line in calls()} == {str(cores)}


def test_a_failure_stops_what_depends_on_it_and_nothing_else() -> None:
    """A typo in one stage must not cost a night of the others."""
    failed, said = go(ladder(align={"fails": "fit"}).choose(seeds=[1]))
    assert failed == {
        "seed-1/align": "exit code 3",
        "seed-1/joint": "needs seed-1/align",
        "seed-1/joint-test": "needs seed-1/joint",
        "seed-1/align-test": "needs seed-1/align",
    }
    shown = "\n".join(said)
    assert "the end of out/seed-1/align.log:\n    first" in shown
    assert "the last words" in shown
    assert shown.count("first") == 9
    assert (Path("out/seed-1/fresh-test") / "summary.json").exists()
    # Mended, it starts in a cleared directory: nothing of the failed attempt is in the result.
    calls()
    assert (Path("out/seed-1/align") / "config.yaml").exists() is False
    failed, _ = go(ladder().choose(seeds=[1]))
    assert not failed
    assert len(calls()) == 4


def test_a_process_that_is_killed_is_a_failure_with_its_signal() -> None:
    """Out of memory leaves no message in the log."""
    Path("hang").touch()
    job, _ = plan(ladder(fresh={"hangs": True}).choose(seeds=[0], arms=["plain"]), Path("out"))
    process = Process(Order((*STAND_IN, *job.argv), Path.cwd(), Path("log").absolute(), 1))
    os.kill(process.pid, signal.SIGKILL)
    while (end := process.end()) is None:
        time.sleep(0.01)
    assert end.failure == "killed by SIGKILL"
    process.kill()  # of what has ended: not an error, and no other process


def test_the_time_left_is_that_of_runs_of_the_same_kind() -> None:
    """A mean over tests of seconds and trainings of hours promises the end of the night at noon."""
    jobs = plan(ladder().choose(arms=["plain", "middle"]), Path("out"))
    work = {job.name: job for job in jobs}
    taken = {
        work["seed-0/fresh"]: 100.0,
        work["seed-1/fresh"]: 300.0,
        work["seed-0/fresh-test"]: 8.0,
        work["seed-0/align"]: 50.0,
    }
    one, two = work["seed-2/fresh"], work["seed-2/fresh-test"]
    assert time_left(taken, {}, [one], 1) == 200  # of its stage, whose seeds differ
    assert time_left(taken, {one: 30.0}, [], 4) == 170  # one run is not divided among four places
    assert time_left(taken, {one: 500.0}, [], 1) == 0  # it takes longer than any before
    assert time_left(taken, {one: 30.0}, [two], 4) == 178  # one behind the other
    assert time_left(taken, {one: 30.0}, [two, work["seed-2/align"]], 1) == 228
    assert time_left(taken, {one: 30.0}, [work["seed-2/align"]], 2) == 170
    assert time_left(taken, {}, [work["seed-1/pairs"]], 1) == 150  # none of its own: of all trained
    trained = {one: 10.0}
    assert time_left(trained, {}, [two], 1) is None  # no test has finished yet
    assert time_left(trained, {}, [], 1) == 0


def test_the_time_left_is_told_and_counts_what_finished_before() -> None:
    """Whoever comes back to a resumed sweep wants to know whether to wait."""
    chosen = ladder().choose(arms=["plain"])
    go(chosen.choose(seeds=[0]))
    for job in plan(chosen.choose(seeds=[0]), Path("out")):
        hours = 7200.0 if job.argv[0] == "fit" else 3600.0
        Mark(job.fingerprint, finished=True, seconds=hours).write(Path("out"), job.name)
    _, said = go(chosen.choose(seeds=[0, 1]))
    assert said[0] == "[2/4 0:00:00, about 3:00:00 left] out has 2 finished before"
    assert re.fullmatch(r"\[3/4 0:00:0\d, about 1:00:00 left\] seed-1/fresh finished .*", said[2])
    assert re.fullmatch(r"\[4/4 0:00:0\d\] seed-1/fresh-test finished .*", said[-1])


@pytest.mark.parametrize("saves", [True, False])
def test_kill_minus_nine_and_again_gives_the_same_report(saves: bool) -> None:
    """A half-trained stage taken for a finished one is a wrong number that nobody notices."""
    chosen = ladder(align={"saves": saves, "hangs": True}).choose(seeds=[0], arms=["plain", "tall"])
    assert not go(chosen, "whole")[0]
    report(chosen, Path("whole"))
    Path("hang").touch()
    script = (
        "import sys; from pathlib import Path\n"
        "from sandbox.stages.plan import Ladder, plan; from sandbox.stages.run import run\n"
        "ladder = Ladder.read(Path('ladder.yaml')).choose([0], ['plain', 'tall'])\n"
        "jobs = plan(ladder, Path('out'))\n"
        "run(jobs, Path('out'), program=(sys.executable, '-S', 'stub.py'))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL) as runner:
        for _ in count():
            if Path("hanging").exists() and (text := Path("hanging").read_text()):
                break
            assert runner.poll() is None
            time.sleep(0.02)
        runner.kill()
    child = int(text)
    if sys.platform == "linux":  # elsewhere the lock makes the next call wait
        for _ in range(200):
            if not Path(f"/proc/{child}").exists():
                break
            time.sleep(0.02)
        assert not Path(f"/proc/{child}").exists(), "the child trains on, unattended"
    mark = Mark.read(Path("out"), "seed-0/align")
    assert mark is not None and not mark.finished
    calls()
    Path("hang").unlink()
    failed, said = go(chosen)
    assert not failed
    first = calls()[0]
    if saves:
        assert first.startswith("fit --resume out/seed-0/align")
        assert any("seed-0/align resumed" in line for line in said)
        log = Path("out/seed-0/align.log").read_text()
        assert log.count("at work as") == 2
    else:
        assert first.startswith("fit --out out/seed-0/align --config align.yaml")
    report(chosen, Path("out"))
    assert findings("out") == findings("whole")
    resumed = json.loads(Path("out/results.json").read_text())["stages"]["align"]["seeds"]["0"]
    assert resumed["resumed"] == saves
    assert ("0:00:00+" in Path("out/report.md").read_text()) == saves


def test_an_interrupted_ladder_leaves_no_process_behind() -> None:
    """Ctrl-C that ends the ladder alone leaves its trainings running, unseen."""
    Path("hang").touch()
    chosen = ladder(fresh={"hangs": True}).choose(seeds=[0], arms=["plain"])
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(hanging())
        raise KeyboardInterrupt

    program = STAND_IN
    with pytest.raises(KeyboardInterrupt):
        run(plan(chosen, Path("out")), Path("out"), program=program, say=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_two_ladders_do_not_work_in_one_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command in two terminals would train every stage twice, into the same files."""
    monkeypatch.setattr("sandbox.stages.run.PATIENCE", 0.2)
    chosen = ladder()
    go(chosen.choose(seeds=[0], arms=["plain"]))

    def second(line: str) -> None:
        with pytest.raises(UserError, match="out: another process is at work in it"):
            go(chosen)
        raise KeyboardInterrupt

    program = STAND_IN
    with pytest.raises(KeyboardInterrupt):
        run(plan(chosen, Path("out")), Path("out"), program=program, say=second)
    assert not go(chosen.choose(seeds=[0]))[0]


def test_a_finished_stage_that_has_changed_is_an_error_before_anything_starts() -> None:
    """Results of two configurations under one name are compared as if they were of one."""
    go(ladder().choose(seeds=[0], arms=["tall"]))
    calls()
    changed = ladder(align={"rate": 0.7})
    with pytest.raises(UserError, match=r"seed-0/align: .* has changed .* use another --out"):
        go(changed)
    assert calls() == []
    assert not go(changed.choose(arms=["plain"]))[0]  # which the change does not reach


def test_a_directory_of_somebody_else_is_not_cleared() -> None:
    """--out pointed at the wrong place must not cost what lies there."""
    precious = Path("out/seed-0/fresh/precious.txt")
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(UserError, match="out/seed-0/fresh: not empty, and not made by"):
        go(ladder())
    assert precious.exists()


def test_a_run_that_was_deleted_is_made_again() -> None:
    """A mark without its run would leave out what the next stage starts from."""
    chosen = ladder().choose(seeds=[0], arms=["plain"])
    go(chosen)
    calls()
    shutil.rmtree("out/seed-0/fresh")
    assert not go(chosen)[0]
    assert [line.split()[0] for line in calls()] == ["fit"]


# --- The report -----------------------------------------------------------------------------------


def test_the_report_tells_what_the_tests_found() -> None:
    """Columns that are swapped, or a mean over the wrong seeds, look as good as the right ones."""
    chosen = ladder(text={"trainer": {"max_steps": 100, "accumulate_grad_batches": 2}})
    chosen = chosen.choose(arms=["plain", "tall"])
    go(chosen)
    text = report(chosen, Path("out"))
    assert text is not None
    results = json.loads(Path("out/results.json").read_text())
    tall = results["arms"]["tall"]
    summaries = [
        json.loads(Path(f"out/seed-{seed}/joint-test/summary.json").read_text())
        for seed in range(3)
    ]
    own = [summary["accuracy"] for summary in summaries]
    assert list(tall["accuracy"].values()) == own
    assert tall["mean"] == pytest.approx(sum(own) / 3)
    for key in ("heldout_combination_accuracy", "shuffled_image_accuracy"):
        assert tall[key] == pytest.approx(sum(summary[key] for summary in summaries) / 3)
    assert tall["samples"] == 4 * (200 + 10 + 10 + 10)
    assert results["arms"]["plain"]["samples"] == 4 * 10
    plain = results["arms"]["plain"]
    assert plain["comparison"] is None
    compared = tall["comparison"]
    assert compared["difference"]["mean"] == pytest.approx(tall["mean"] - plain["mean"])
    assert (compared["difference"]["seeds"], compared["difference"]["images"]) == (3, 30)
    assert compared["verdict"] == "higher"
    assert compared["p_adjusted"] < 0.05
    h = 2 * asin(tall["mean"] ** 0.5) - 2 * asin(plain["mean"] ** 0.5)
    assert compared["effect"] == pytest.approx(h)
    assert compared["minimum_detectable"] > 0

    row = next(line for line in text.splitlines() if line.startswith("| tall |"))
    numbers = [f"{value:.3f}" for value in (*own, tall["mean"])]
    numbers += [f"{tall[key]:.3f}" for key in ("heldout_combination_accuracy",)]
    numbers += [f"{tall['shuffled_image_accuracy']:.3f}", "0.250", "920"]
    assert row.split(" | ")[1:] == [*numbers[:-1], "920 |"]
    header = next(line for line in text.splitlines() if line.startswith("| arm | seed 0"))
    assert "held out | exchanged | majority | samples" in header
    assert "**tall**: higher than plain (+" in text
    assert "| text | 0:00:00 | - | - | 800 |" in text
    assert Path("out/report.png").stat().st_size > 5000


def test_a_report_of_what_there_is() -> None:
    """A seed or an arm that failed must not hide the others, nor be counted as zero."""
    chosen = ladder()
    assert report(chosen, Path("out")) is None
    go(chosen.choose(arms=["plain"]))
    text = report(chosen, Path("out"))
    assert text is not None
    assert "| tall |" not in text
    assert "Nothing to compare" in text
    go(chosen.choose(seeds=[0, 2], arms=["tall"]))
    text = report(chosen, Path("out"))
    assert text is not None
    row = next(line for line in text.splitlines() if line.startswith("| tall |"))
    assert row.split(" | ")[2] == "-"
    assert "2 seeds, 30 images)." in text


def test_arms_of_different_questions_are_not_compared() -> None:
    """Accuracies of two tasks subtract without complaint."""
    chosen = ladder().choose(seeds=[1], arms=["plain", "tall"])
    go(chosen)
    path = Path("out/seed-1/joint-test/predictions.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"seed 1: .* got 59 and 60, of which 59 are the same"):
        report(chosen, Path("out"))


@pytest.mark.parametrize(
    ("found", "compared", "says"),
    [
        (
            (0.02, 0.01, 0.03, 0.001, 0.003, 8.0, 3, 1200, 0.95, (0.0, 0.04)),
            (0.004, 0.05),
            "**a**: higher than b (+0.020, 95% interval +0.010 to +0.030, adjusted *p* = 0.004, "
            "*h* = +0.05; bootstrap +0.000 to +0.040; 3 seeds, 1,200 images).",
        ),
        (
            (-0.02, -0.03, -0.01, 0.0001, 0.004, 40.0, 1, 50, 0.95, (-0.03, -0.01)),
            (0.0002, -0.1),
            "**a**: lower than b (-0.020, 95% interval -0.030 to -0.010, adjusted *p* < 0.001, "
            "*h* = -0.10; bootstrap -0.030 to -0.010; 1 seed, 50 images). With one seed it speaks "
            "of other images, not of other seeds.",
        ),
        (  # the detectable difference: noncentral t, by the tables about 5.65 standard errors
            (0.1, 0.0140, 0.1860, 0.04, 0.02, 2.0, 3, 1, 0.95, (0.05, 0.15)),
            (0.08, 0.2),
            "**a**: no difference shown from b (+0.100, 95% interval +0.014 to +0.186, adjusted "
            "*p* = 0.080, *h* = +0.20; bootstrap +0.050 to +0.150; 3 seeds, 1 image). With one "
            "image it speaks of other seeds, not of other images. A true difference of 0.113 would "
            "have been shown with a power of 80%.",
        ),
    ],
)
def test_a_verdict_says_what_it_rests_on(
    found: tuple[Any, ...], compared: tuple[float, float], says: str
) -> None:
    """A verdict from one seed must not read like one from ten."""
    assert sentence("a", "b", Comparison(Difference(*found), *compared)) == says


# --- The real thing -------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 1,
    },
    "model": {
        "class_path": "sandbox.train.pretrain.Pretrain",
        "init_args": {
            "encoder": {
                "class_path": "encoders.patches.Patches",
                "init_args": {"tile_size": 32, "patch_size": 8, "width": 32},
            },
            "fusion": {"class_path": "fusion.early.EarlyFusion", "init_args": {"hidden": 16}},
            "backbone": {
                "width": 32, "layers": 2, "heads": 2, "head_dim": 16, "dense_hidden": 32,
                "expert_hidden": 16,
            },
            "optimizer": {"name": "adamw"},
        },
    },
    "data": {
        "class_path": "sandbox.data.module.VQAData",
        "init_args": {
            "task": {"class_path": "sandbox.data.charts.Charts", "init_args": {"size": 32}},
            "batch_size": 2,
            "val_samples": 2,
            "test_samples": 4,
        },
    },
}  # fmt: skip


@pytest.mark.slow
def test_a_real_ladder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages' commands, the run directories and the summaries have to fit each other."""
    Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    content = {
        "question": "Does a second stage help?",
        "baseline": "once",
        "seeds": [0],
        "stages": {
            "first": {"config": "tiny.yaml", "set": {"data.init_args.seed": "{seed}"}},
            "second": {
                "config": "tiny.yaml",
                "from": {"model.init_args.init_from.encoder": "first"},
                "set": {"trainer.max_steps": 3, "model.init_args.freeze": ["encoder"]},
            },
        },
        "arms": {"once": "first", "twice": "second"},
    }
    Path("two.yaml").write_text(yaml.safe_dump(content))
    code = cli.main(["stages", "two.yaml", "--out", "out"])
    shown = capsys.readouterr()
    assert code == 0, shown
    assert "report: out/report.md" in shown.out
    results = json.loads(Path("out/results.json").read_text())
    assert results["arms"]["twice"]["samples"] == 2 * 2 + 3 * 2
    compared = results["arms"]["twice"]["comparison"]["difference"]
    assert (compared["seeds"], compared["images"]) == (1, 4)
    assert results["stages"]["first"]["seeds"]["0"]["cpu_seconds"] > 0.5

    # Killed after its last checkpoint, before the mark: the stage goes on, and ends at once.
    before = findings("out")
    mark = Mark.read(Path("out"), "seed-0/second")
    assert mark is not None
    Mark(mark.fingerprint).write(Path("out"), "seed-0/second")
    assert cli.main(["stages", "two.yaml", "--out", "out"]) == 0
    assert "seed-0/second resumed" in capsys.readouterr().out
    assert findings("out") == before
    assert cli.main(["test", "--config", "tiny.yaml", "--out", "out"]) == 1
    assert "--out out: not empty" in capsys.readouterr().err
