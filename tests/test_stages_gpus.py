"""Sweeps on the GPUs of one machine, which are faked: each run holds its own until it ends."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from sandbox.errors import UserError
from sandbox.stages.command import add_launcher, launcher
from sandbox.stages.gpus import places, visible
from sandbox.stages.plan import Job, plan
from sandbox.stages.process import Local, Order
from sandbox.stages.run import run
from tests.ladders import ladder

SPY = """
import os, sys, time
where = os.environ.get("CUDA_VISIBLE_DEVICES", "anywhere")
with open("spied.txt", "a") as file:
    print("start", where, os.environ["OMP_NUM_THREADS"], file=file)
time.sleep(0.15)
with open("spied.txt", "a") as file:
    print("end", where, file=file)
if "seed-1" in str(sys.argv) and "fit" in sys.argv:
    os.kill(os.getpid(), 9) if os.path.exists("deadly") else sys.exit(3)
"""
PROGRAM = (sys.executable, "-S", "spy.py")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own, with the script in it, and no GPU chosen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "spy.py").write_text(SPY)
    return tmp_path


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def jobs() -> list[Job]:
    """Trainings and tests of three seeds."""
    return plan(ladder().choose(arms=["plain"]), Path("out"))


def spied() -> list[list[str]]:
    return [line.split() for line in Path("spied.txt").read_text().splitlines()]


@pytest.mark.parametrize("deadly", [False, True])
def test_each_run_has_a_gpu_of_its_own_until_it_ends_or_dies(deadly: bool) -> None:
    """Guards against all runs on cuda:0 while the others idle, and against a GPU that is lost with
    the run that died on it: then the sweep would end with an empty list, or never.
    """
    if deadly:
        Path("deadly").touch()
    launch = Local(places(["GPU-aa", "GPU-bb"], at_once=2))
    failed = run(jobs(), Path("out"), at_once=2, launch=launch, program=PROGRAM, say=str)
    cause = "killed by SIGKILL" if deadly else "exit code 3"
    assert failed == {"seed-1/fresh": cause, "seed-1/fresh-test": "needs seed-1/fresh"}
    taken: set[str] = set()
    for what, where, *_ in spied():
        assert (where in taken) == (what == "end")
        taken ^= {where}
    assert {where for _, where, *_ in spied()} == {"GPU-aa", "GPU-bb"}
    assert sorted(launch._free) == ["GPU-aa", "GPU-bb"]


def test_gpus_limit_the_runs_side_by_side() -> None:
    """Guards against a third run that finds no free GPU and crashes, or shares one unasked."""
    launch = Local(["0", "1"])
    assert (launch.places(5), Local().places(5)) == (2, 5)
    assert not {"seed-0/fresh"} & set(
        run(jobs(), Path("out"), at_once=5, launch=launch, program=PROGRAM, say=str)
    )
    cores = len(os.sched_getaffinity(0))
    assert {line[2] for line in spied() if line[0] == "start"} == {str(max(1, cores // 2))}


def test_an_interrupted_sweep_gives_its_gpus_back() -> None:
    """Guards against an ablation whose second round of runs finds the GPUs of the first taken."""
    launch = Local(["0", "1"])

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(jobs(), Path("out"), at_once=2, launch=launch, program=PROGRAM, say=interrupt)
    assert sorted(launch._free) == ["0", "1"]
    with pytest.raises(FileNotFoundError):
        launch.start(Order(("no-such-program",), Path.cwd(), Path("log").absolute(), 1), lock=2)
    assert sorted(launch._free) == ["0", "1"]


def test_a_killed_run_gives_its_gpu_back_once(workplace: Path) -> None:
    """Guards against a GPU that is in the list twice: two runs would then share it unasked."""
    launch = Local(["0"])
    (workplace / "sleep.py").write_text("import time; time.sleep(60)")
    command = (sys.executable, "-S", "sleep.py")
    work = launch.start(Order(command, Path.cwd(), Path("log").absolute(), 1), lock=2)
    assert launch._free == []
    os.kill(work._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    while (end := work.end()) is None:
        time.sleep(0.01)
    assert end.failure == "killed by SIGKILL"
    work.kill()
    assert launch._free == ["0"]


@pytest.mark.parametrize(
    ("gpus", "at_once", "per_run", "expected"),
    [
        ("0 1 2 3", 4, None, ["0", "1", "2", "3"]),
        ("0 1 2 3", 1, None, ["0,1,2,3"]),
        ("0 1 2 3 4 5 6 7", 3, None, ["0,1", "2,3", "4,5"]),
        ("0 1", 5, None, ["0", "1"]),
        ("0 1", 5, 0.5, ["0", "1", "0", "1"]),
        ("0 1", 2, 0.5, ["0", "1"]),
        ("0 1 2", 3, 2.0, ["0,1"]),
        ("0 1", 3, 0.0, ["", "", ""]),
        ("MIG-a MIG-b", 2, 1.0, ["MIG-a", "MIG-b"]),
        ("", 3, None, []),
        ("", 3, 0.0, []),
    ],
)
def test_places(gpus: str, at_once: int, per_run: float | None, expected: list[str]) -> None:
    """Guards against places that overlap, that nobody asked to share, or that idle GPUs."""
    assert places(gpus.split(), at_once, per_run) == expected


@pytest.mark.parametrize(
    ("gpus", "per_run", "says"),
    [
        ("", 1.0, "--gpus-per-run 1: torch sees 0 GPUs on this machine"),
        ("", 0.5, "--gpus-per-run 0.5: torch sees 0 GPUs on this machine"),
        ("0 1", 3.0, "--gpus-per-run 3: torch sees 2 GPUs on this machine"),
        ("0 1", 1.5, "--gpus-per-run 1.5: must be a whole number, or a share below 1"),
    ],
)
def test_gpus_that_are_not_there_are_refused(gpus: str, per_run: float, says: str) -> None:
    """Guards against a sweep that trains on the CPU for a night although GPUs were asked for."""
    with pytest.raises(UserError) as caught:
        places(gpus.split(), 2, per_run)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("count", "given", "expected"),
    [
        (2, None, ["0", "1"]),
        (0, None, []),
        (0, "0,1", []),  # the variable is set on a machine without GPUs
        (0, "", []),
        (2, "3, 5", ["3", "5"]),
        (2, "GPU-8f,GPU-21", ["GPU-8f", "GPU-21"]),
        (1, "2,-1,3", ["2"]),
        (2, "4,5,77", ["4", "5"]),  # of which CUDA knows two
        (1, "MIG-a,MIG-b", ["MIG-a", "MIG-b"]),  # of which it shows a process one
    ],
)
def test_an_existing_choice_of_gpus_is_respected(
    count: int, given: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against runs on a colleague's GPUs, and against UUIDs read as numbers."""
    machine(monkeypatch, count)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible() == expected


def test_the_command_line_shares_out_and_tells_what_it_caps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against `--jobs 3` on two GPUs that runs two without a word."""
    machine(monkeypatch, 2)
    parser = argparse.ArgumentParser()
    add_launcher(parser)

    def room(*argv: str) -> int:
        return launcher(parser.parse_args(argv)).places(3)

    assert (room("--jobs", "3"), room("--jobs", "2")) == (2, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--jobs 3: 2 at a time, which have GPU 0 / 1; ")
    assert room("--jobs", "3", "--gpus-per-run", "0.5") == 3
    machine(monkeypatch, 0)
    assert room("--jobs", "3") == 3
    assert capsys.readouterr().out == ""


def test_runs_without_gpus_keep_the_environment() -> None:
    """Guards against `CUDA_VISIBLE_DEVICES` that appears where nothing was shared out."""
    order = Order(("x",), Path.cwd(), Path("log"), 3)
    assert order.variables == {"OMP_NUM_THREADS": "3", "PYTHONUNBUFFERED": "1"}
    assert not run(jobs()[:2], Path("out"), program=PROGRAM, say=str)
    assert {line[1] for line in spied()} == {"anywhere"}
