"""The runs of a ladder: side by side, and on from where they stopped.

Beside a run's directory ``OUT/seed-0/NAME`` stand its output, ``NAME.log``, and its mark,
``NAME.json``: what was started there, and whether it has finished. POSIX only.
"""

import fcntl
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from sandbox.errors import UserError
from sandbox.runs import resume_point
from sandbox.stages.plan import Job
from sandbox.stages.process import LOCAL, PATIENCE, POLL, Launcher, Order, Work
from sandbox.stages.progress import time_left

PROGRAM = (sys.executable, "-m", "sandbox.cli")
COMMANDS = "commands.txt"
LOCK = ".lock"
TAIL = 10  # lines of a failed run's log that are shown

Step = Literal["skip", "resume", "start"]


@dataclass(frozen=True)
class Mark:
    """What was started in a run's directory.

    Attributes:
        fingerprint: of the job, see there.
        finished: it ended well.
        seconds, cpu_seconds: what it took, on the clock and on all cores.
        resumed: it went on from a checkpoint, so that both lack what came before.
    """

    fingerprint: str
    finished: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resumed: bool = False

    @classmethod
    def read(cls, out: Path, name: str) -> "Mark | None":
        """The mark of a run; None if it never started."""
        try:
            return cls(**json.loads((out / f"{name}.json").read_text()))
        except FileNotFoundError:
            return None

    def write(self, out: Path, name: str) -> None:
        """Write the mark whole or not at all."""
        path = out / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(path)


def _say(line: str) -> None:
    print(line, flush=True)  # at once, also where the output is a file that somebody watches


def next_step(job: Job, out: Path) -> Step:
    """What is left to do for a job.

    Raises:
        UserError: its directory holds what another command or configuration has made.
    """
    mark, run = Mark.read(out, job.name), out / job.name
    if not run.exists() or not any(run.iterdir()):
        return "start"
    if mark is None:
        raise UserError(f"{run}: not empty, and not made by this command: use another --out")
    try:
        resumable = job.argv[0] == "fit" and resume_point(run) is not None
    except UserError:  # it has saved no checkpoint yet
        resumable = False
    if mark.fingerprint != job.fingerprint and (mark.finished or resumable):
        raise UserError(
            f"{job.name}: its command or configuration has changed since it ran in {run}: use "
            "another --out, or delete that directory"
        )
    if mark.finished:
        return "skip"
    return "resume" if resumable else "start"


def script(jobs: Sequence[Job], threads: int, program: Sequence[str] = PROGRAM) -> list[str]:
    """The jobs as lines for a shell, each behind those it needs."""
    return [f"OMP_NUM_THREADS={threads} {shlex.join([*program, *job.argv])}" for job in jobs]


def run(
    jobs: Sequence[Job],
    out: Path,
    *,
    at_once: int = 1,
    launch: Launcher = LOCAL,
    program: Sequence[str] = PROGRAM,
    say: Callable[[str], None] = _say,
) -> dict[str, str]:
    """Run what has not finished yet, each job when those it needs have.

    They die with this process, however it ends.

    Args:
        jobs: each behind those it needs.
        out: the output directory.
        at_once: how many run side by side.
        launch: where they run.
        program: what stands before a job's arguments.
        say: prints a line.

    Returns:
        The jobs that failed or could not start, and why.

    Raises:
        UserError: see ``next_step``; or another process is at work in ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out) as lock:
        steps = {job.name: next_step(job, out) for job in jobs}  # all, before anything starts
        at_once = launch.places(at_once)
        threads = launch.threads(at_once)
        _note_commands(out / COMMANDS, script(jobs, threads, program))
        done = {name for name, step in steps.items() if step == "skip"}
        taken = _taken([job for job in jobs if job.name in done], out)
        failed: dict[str, str] = {}
        waiting = [job for job in jobs if job.name not in done]
        running: dict[Job, Work] = {}
        began: dict[Job, float] = {}
        started = time.monotonic()

        def tell(name: str, what: str) -> None:
            now = time.monotonic()
            left = time_left(taken, {job: now - began[job] for job in running}, waiting, at_once)
            about = f", about {_clock(left)} left" if left else ""
            say(f"[{len(done)}/{len(jobs)} {_clock(now - started)}{about}] {name} {what}")

        if done:
            tell(out.name, f"has {len(done)} finished before")
        try:
            while waiting or running:
                for job in list(waiting):
                    if missing := [need for need in job.needs if need in failed]:
                        waiting.remove(job)
                        failed[job.name] = f"needs {missing[0]}"
                        tell(job.name, f"left out: it needs {missing[0]}")
                    elif len(running) < at_once and done.issuperset(job.needs):
                        waiting.remove(job)
                        step = steps[job.name]
                        began[job] = time.monotonic()
                        running[job] = launch.start(_order(job, step, out, program, threads), lock)
                        tell(job.name, "resumed" if step == "resume" else "started")
                ended = {job: end for job, work in running.items() if (end := work.end())}
                for job, end in ended.items():
                    del running[job]
                    if end.failure:
                        failed[job.name] = end.failure
                        log = out / f"{job.name}.log"
                        tell(job.name, f"failed ({end.failure}); the end of {log}:")
                        say(_tail(log))
                    else:
                        done.add(job.name)
                        resumed = steps[job.name] == "resume"
                        times = (end.seconds, end.cpu_seconds)
                        Mark(job.fingerprint, True, *times, resumed).write(out, job.name)
                        if not resumed:
                            taken[job] = end.seconds
                        tell(job.name, f"finished in {_clock(end.seconds)}")
                if running and not ended:
                    time.sleep(POLL)
        finally:
            # The last first: what still waits for a core must not get that of another killed run.
            for work in reversed(running.values()):
                work.kill()
    return failed


def _taken(jobs: Sequence[Job], out: Path) -> dict[Job, float]:
    """The seconds of those that finished before, where they are known in full."""
    marks = {job: Mark.read(out, job.name) for job in jobs}
    return {job: mark.seconds for job, mark in marks.items() if mark and not mark.resumed}


def _order(job: Job, step: Step, out: Path, program: Sequence[str], threads: int) -> Order:
    """What starts a run, once it is marked, its log begun, and its directory made empty.

    A run that goes on keeps what is in its directory and in its log.
    """
    Mark(job.fingerprint, resumed=step == "resume").write(out, job.name)
    argv = job.argv
    if step == "resume":
        argv = ("fit", "--resume", str(out / job.name))
    else:
        shutil.rmtree(out / job.name, ignore_errors=True)
    command = (*program, *argv)
    log = out / f"{job.name}.log"
    with log.open("ab" if step == "resume" else "wb") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
    return Order(command, Path.cwd(), log.absolute(), threads)


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Hold ``out`` against other processes; the lock's file descriptor, for children to inherit.

    Raises:
        UserError: another process holds it.
    """
    with (out / LOCK).open("w") as file:
        for _ in range(round(PATIENCE / POLL)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL)
        else:
            raise UserError(f"{out}: another process is at work in it; wait for it, or end it")
        yield file.fileno()


def _note_commands(path: Path, lines: Sequence[str]) -> None:
    """Add the lines that the file lacks: it tells of every run in the directory."""
    known = path.read_text().splitlines() if path.exists() else []
    path.write_text("\n".join(dict.fromkeys([*known, *lines])) + "\n")


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-TAIL:])
