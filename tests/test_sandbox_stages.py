"""A ladder that runs: order, failures, what is skipped, what goes on, and the report at the end.

A script stands in for `sandbox fit` and `sandbox test`, which take seconds to start; the last test
runs the real ones.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import cli
from sandbox.errors import UserError
from sandbox.evals.paired import Difference
from sandbox.stages.plan import Ladder, plan
from sandbox.stages.report import report, sentence
from sandbox.stages.run import Mark, _Process, run

STUB = """
import json, os, random, sys, time
from pathlib import Path

command, *argv = sys.argv[1:]
with open("calls.txt", "a") as calls:
    print(*sys.argv[1:], os.environ["OMP_NUM_THREADS"], file=calls)
flags = dict(flag[2:].split("=", 1) for flag in argv if "=" in flag)
words = [word for word in argv if "=" not in word]
given = dict(zip(words[::2], words[1::2]))
out = Path(given.get("--out") or given["--resume"])
if "--resume" in given:
    config = json.loads((out / "config.yaml").read_text())
    print("resumed")
else:
    assert not out.exists() or not any(out.iterdir()), out
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads(Path(given["--config"]).read_text())
print("at work as", os.getpid())
if config.get("fails") and command == config["fails"]:
    print("first\\n" * 20, "the last words", flush=True)
    sys.exit(3)
if command == "fit":
    (out / "partial").touch()
    for key, value in flags.items():
        if value.count("/"):  # a run to start from
            assert (Path(value) / "checkpoints/last.ckpt").read_text() == "whole", value
    config["seed"] = int(flags.get("seed_everything", config.get("seed", -1)))
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "config.yaml").write_text(json.dumps(config))
    if config.get("saves"):
        (out / "checkpoints/last.ckpt").write_text("half")
    if Path("hang").exists() and config.get("hangs"):
        Path("hanging").write_text(str(os.getpid()))
        time.sleep(600)
    (out / "checkpoints/last.ckpt").write_text("whole")
else:
    run = Path(given["--ckpt_path"])
    assert (run / "checkpoints/last.ckpt").read_text() == "whole"
    rng = random.Random(f"{config['seed']} {config['name']}")
    records = [
        {"split": split, "index": i, "content": f"c{i}", "shown": (i + 1) % 30 if shuffled else i,
         "images": images, "question": "how many?", "kind": f"kind {n}", "answer": "1",
         "correct": rng.random() < (0.2 if shuffled else config["rate"])}
        for split, images in (("test", "own"), ("heldout", "own"), ("test", "shuffled"),
                              ("test", "reordered"))
        for shuffled in [images == "shuffled"]
        for i in range(30) for n in range(2)
    ]
    lines = "".join(json.dumps(record) + "\\n" for record in records)
    (out / "predictions.jsonl").write_text(lines)
    def rate(split, images="own", kind=""):
        found = [r["correct"] for r in records
                 if (r["split"], r["images"]) == (split, images) and kind in r["kind"]]
        return sum(found) / len(found)
    (out / "summary.json").write_text(json.dumps({
        "accuracy": rate("test"),
        "heldout_combination_accuracy": rate("heldout"),
        "shuffled_image_accuracy": rate("test", "shuffled"),
        "blind_majority_accuracy": 0.25,
        "by_question": {k: {"accuracy": rate("test", kind=k)} for k in ("kind 0", "kind 1")},
    }))
"""

STAND_IN = (sys.executable, "-S", "stub.py")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own, with the script in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path


def ladder(**stages: dict[str, Any]) -> Ladder:
    """Language model and pairs, then align, then joint, and a fresh arm; with changes by stage."""
    rates = {"text": 0.0, "pairs": 0.0, "align": 0.6, "joint": 0.9, "fresh": 0.5}
    sources = {"align": {"m.text": "text", "m.eye": "pairs"}, "joint": {"m.eye": "align"}}
    for name, rate in rates.items():
        config = {"name": name, "rate": rate, "data": {"init_args": {"batch_size": 4}}}
        config |= {"trainer": {"max_steps": 10}} | stages.get(name, {})
        Path(f"{name}.yaml").write_text(json.dumps(config))
    content = {
        "question": "Which way up?",
        "baseline": "plain",
        "seeds": [0, 1, 2],
        "stages": {
            name: {"config": f"{name}.yaml", "from": sources.get(name, {}), "once": name == "text"}
            for name in rates
        },
        "arms": {"plain": "fresh", "tall": "joint", "middle": "align"},
    }
    Path("ladder.yaml").write_text(json.dumps(content))
    return Ladder.read(Path("ladder.yaml"))


def go(chosen: Ladder, out: str = "out", at_once: int = 1) -> tuple[dict[str, str], list[str]]:
    """What failed, and what was said."""
    said: list[str] = []
    program = STAND_IN
    failed = run(
        plan(chosen, Path(out)), Path(out), at_once=at_once, program=program, say=said.append
    )
    return failed, said


def calls() -> list[str]:
    """The commands that were started, and forget them."""
    path = Path("calls.txt")
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


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
    assert "stub.py fit --config fresh.yaml --out out/seed-0/fresh" in commands[0]

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
    Path("out/seed-0").mkdir(parents=True)
    with Path("lock").open("w") as lock:
        process = _Process(job, "start", Path("out"), STAND_IN, 1, lock.fileno())
        os.kill(process._popen.pid, signal.SIGKILL)
        while not process.ended():
            time.sleep(0.01)
    assert process.failure == "killed by SIGKILL"
    assert not process.mark.finished


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
        assert first.startswith("fit --config align.yaml --out out/seed-0/align")
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
        while not (Path("hanging").exists() and Path("hanging").read_text()):
            time.sleep(0.02)
        pids.append(int(Path("hanging").read_text()))
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
    assert plain["difference"] is None
    assert tall["difference"]["mean"] == pytest.approx(tall["mean"] - plain["mean"])
    assert tall["difference"]["verdict"] == "higher"
    assert tall["difference"]["method"] == "t"

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
    assert "2 seeds: too few for a t interval" in text


def test_arms_of_different_questions_are_not_compared() -> None:
    """Accuracies of two tasks subtract without complaint."""
    chosen = ladder().choose(seeds=[1], arms=["plain", "tall"])
    go(chosen)
    path = Path("out/seed-1/joint-test/predictions.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"seed 1: .* got 59 and 60, of which 59 are the same"):
        report(chosen, Path("out"))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            Difference(0.02, 0.01, 0.03, 3, 0.95, "t", (0.0, 0.04)),
            "**a**: higher than b (+0.020, 95% interval +0.010 to +0.030, 3 seeds; bootstrap over "
            "seeds and images +0.000 to +0.040).",
        ),
        (
            Difference(-0.02, -0.05, 0.01, 1, 0.95, "bootstrap", (-0.05, 0.01)),
            "**a**: no difference shown from b (-0.020, 95% interval -0.050 to +0.010, 1 seed: too "
            "few for a t interval, so a bootstrap, which speaks of other images, not other seeds).",
        ),
    ],
)
def test_a_verdict_says_what_it_rests_on(found: Difference, says: str) -> None:
    """A verdict from one seed must not read like one from ten."""
    assert sentence("a", "b", found) == says


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
    assert results["arms"]["twice"]["difference"]["method"] == "bootstrap"
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
