"""A ladder whose runs are tasks of Ray: a local one, started once, which takes its time."""

import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sandbox import cli
from sandbox.errors import UserError
from sandbox.stages.on_ray import OnRay, share
from sandbox.stages.plan import Job, plan
from sandbox.stages.run import Mark, run
from tests.ladders import STAND_IN, STUB, calls, hanging, ladder

OUT = Path("out")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own, with the script in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path


@pytest.fixture(scope="module")
def on_ray() -> Iterator[OnRay]:
    """A Ray of two cores on this machine; its sockets need a short path."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as short:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", short)
        patch.setattr("sandbox.stages.on_ray.cores", lambda: 2)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one at home
        yield OnRay()
        import ray

        ray.shutdown()


def go(jobs: list[Job], launch: OnRay, watch: Callable[[str], None] = str) -> dict[str, str]:
    """What failed, of two jobs at a time; ``watch`` sees each line that is said."""
    return run(jobs, OUT, at_once=2, launch=launch, program=STAND_IN, say=watch)


def gone(pid: int) -> bool:
    """Whether a process ends within seconds."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_runs_on_ray_come_in_order_and_once(on_ray: OnRay) -> None:
    """A task in another folder, or without its result, would train into nowhere, or twice."""
    jobs = plan(ladder().choose(seeds=[0, 2], arms=["plain", "tall"]), OUT)
    said: list[str] = []
    assert not go(jobs, on_ray, said.append)
    made = calls()
    assert len(made) == len(jobs)
    assert {line.split()[-1] for line in made} == {"1"}  # two cores for two runs
    for job in jobs:
        mark = Mark.read(OUT, job.name)
        assert mark is not None and mark.finished
        assert 0 < mark.cpu_seconds <= mark.seconds < 60
        log = (OUT / f"{job.name}.log").read_text()
        assert log.startswith(f"$ {STAND_IN[0]} -S stub.py {job.argv[0]} --")
        assert "at work as" in log
    words = [line.partition("] ")[2].split() for line in said]
    at = {(name, what): i for i, (name, what, *_) in enumerate(words)}
    for job in jobs:
        assert all(at[need, "finished"] < at[job.name, "started"] for need in job.needs)
    assert not go(jobs, on_ray)
    assert calls() == []


@pytest.mark.slow
def test_failures_on_ray_lose_only_what_needs_them(on_ray: OnRay) -> None:
    """One run that breaks, or one node that dies, must not cost a night of the others."""
    Path("hang").touch()
    chosen = ladder(align={"fails": "fit"}, fresh={"saves": True, "hangs": True})
    jobs = plan(chosen.choose(seeds=[1], arms=["plain", "middle"]), OUT)
    children: list[int] = []

    def kill_worker(line: str) -> None:
        if line.endswith("seed-1/fresh started"):
            children.append(hanging())
            status = Path(f"/proc/{children[0]}/status").read_text()
            worker = int(status.partition("PPid:")[2].split()[0])
            assert worker != os.getpid()
            os.kill(worker, signal.SIGKILL)

    failed = go(jobs, on_ray, kill_worker)
    assert failed.pop("seed-1/fresh").startswith("WorkerCrashedError: The worker died")
    assert failed == {
        "seed-1/align": "exit code 3",
        "seed-1/fresh-test": "needs seed-1/fresh",
        "seed-1/align-test": "needs seed-1/align",
    }
    assert gone(children[0]), "the child trains on, unattended"
    assert {line.split()[0] for line in calls()} == {"fit"}
    # Given again, the one goes on from its checkpoint, and finished ones stay.
    Path("hang").unlink()
    assert set(go(jobs, on_ray)) == {"seed-1/align", "seed-1/align-test"}
    lines = calls()
    assert sum("--resume out/seed-1/fresh" in line for line in lines) == 1
    assert not [line for line in lines if "--out out/seed-1/pairs " in line]
    assert (OUT / "seed-1/fresh.log").read_text().count("at work as") == 2


@pytest.mark.slow
def test_an_interrupted_ladder_leaves_nothing_behind_on_ray(on_ray: OnRay) -> None:
    """Ctrl-C that ends the command alone leaves its trainings running on the cluster, unseen."""
    Path("hang").touch()
    jobs = plan(ladder(fresh={"hangs": True}).choose(arms=["plain"]), OUT)
    logs = [OUT / f"seed-{seed}/fresh.log" for seed in range(3)]
    children: list[str] = []

    def interrupt(line: str) -> None:
        if line.endswith("seed-2/fresh started"):
            while len(children) < 2:  # the two cores are taken: the third waits inside Ray
                time.sleep(0.02)
                found = [re.findall(r"at work as (\d+)", log.read_text()) for log in logs]
                children[:] = [pid for pids in found for pid in pids]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(jobs, OUT, at_once=3, launch=on_ray, program=STAND_IN, say=interrupt)
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert len(calls()) == 2
    Path("hang").unlink()
    assert not go(jobs, on_ray)  # no core is left taken


@pytest.mark.slow
def test_a_program_that_a_node_lacks_is_a_failure_of_the_run(on_ray: OnRay) -> None:
    """Folders that are not shared are the commonest mistake: the message has to say what lacks."""
    jobs = plan(ladder().choose(seeds=[0], arms=["plain"]), OUT)
    failed = run(jobs, OUT, launch=on_ray, program=("nowhere/python",), say=str)
    assert failed["seed-0/fresh"].startswith("FileNotFoundError: ")
    assert "nowhere/python" in failed["seed-0/fresh"]


@pytest.mark.slow
def test_more_gpus_than_any_node_has_are_refused(on_ray: OnRay) -> None:
    """Ray waits for such a node for ever, without a word."""
    with pytest.raises(UserError, match=r"--gpus-per-run 99: the nodes of this Ray have"):
        OnRay(gpus=99)


@pytest.mark.parametrize(
    ("cores_of", "at_once", "threads"),
    [([8], 1, 8), ([8], 3, 2), ([8, 8], 3, 4), ([8, 8, 1], 2, 8), ([2], 9, 1), ([], 2, 1)],
)
def test_runs_share_the_cores_of_the_nodes(cores_of: list[int], at_once: int, threads: int) -> None:
    """A run that asks for more cores than a node has left waits while others work."""
    assert share(cores_of, at_once) == threads


def test_an_address_where_nothing_listens_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray tries such an address for more than ten minutes before it gives up."""
    ray = ModuleType("ray")
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.socket() as taken:  # bound, but it does not listen: nobody else can either
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(UserError, match=r"no Ray lets us in at RAY_ADDRESS=127\..*Errno"):
            OnRay()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--launcher", "ray"], "Ray is not installed; `uv sync --extra ray` or `pip install"),
        (["--gpus-per-run", "0.5"], "--gpus-per-run 0.5: torch sees 0 GPUs on this machine"),
    ],
)
def test_what_is_missing_is_told_before_anything_starts(
    flags: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback out of an import does not tell which package to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # which is set here, and so taken back
    ladder()
    assert cli.main(["stages", "ladder.yaml", "--out", "out", *flags]) == 1
    assert says in capsys.readouterr().err
    assert not OUT.exists()
