"""The runs of a ladder as processes: side by side, and on from where they stopped.

Beside a run's directory ``OUT/seed-0/NAME`` stand its output, ``NAME.log``, and its mark,
``NAME.json``: what was started there, and whether it has finished. POSIX only.
"""

import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

from sandbox.errors import UserError
from sandbox.runs import resume_point
from sandbox.stages.plan import Job

PROGRAM = (sys.executable, "-m", "sandbox.cli")
COMMANDS = "commands.txt"
LOCK = ".lock"
POLL = 0.02  # seconds between two looks at the processes
PATIENCE = 10.0  # seconds for what a killed ladder has left to die, data workers included
TAIL = 10  # lines of a failed run's log that are shown
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl(2)

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


def script(jobs: Sequence[Job], at_once: int = 1, program: Sequence[str] = PROGRAM) -> list[str]:
    """The jobs as lines for a shell, each behind those it needs."""
    threads = _threads(at_once)
    return [f"OMP_NUM_THREADS={threads} {shlex.join([*program, *job.argv])}" for job in jobs]


def run(
    jobs: Sequence[Job],
    out: Path,
    *,
    at_once: int = 1,
    program: Sequence[str] = PROGRAM,
    say: Callable[[str], None] = _say,
) -> dict[str, str]:
    """Run what has not finished yet, each job when those it needs have.

    The processes share the cores evenly. They die with this one, however it ends.

    Args:
        jobs: each behind those it needs.
        out: the output directory.
        at_once: how many run side by side.
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
        _note_commands(out / COMMANDS, script(jobs, at_once, program))
        done = {name for name, step in steps.items() if step == "skip"}
        failed: dict[str, str] = {}
        started = time.monotonic()

        def tell(name: str, what: str) -> None:
            over = timedelta(seconds=round(time.monotonic() - started))
            say(f"[{len(done)}/{len(jobs)} {over}] {name} {what}")

        if done:
            tell(out.name, f"has {len(done)} finished before")
        waiting = [job for job in jobs if job.name not in done]
        running: list[_Process] = []
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
                        running.append(_Process(job, step, out, program, _threads(at_once), lock))
                        tell(job.name, "resumed" if step == "resume" else "started")
                ended = [process for process in running if process.ended()]
                for process in ended:
                    running.remove(process)
                    name = process.job.name
                    if reason := process.failure:
                        failed[name] = reason
                        tell(name, f"failed ({reason}); the end of {process.log}:")
                        say(_tail(process.log))
                    else:
                        done.add(name)
                        process.mark.write(out, name)
                        taken = timedelta(seconds=round(process.mark.seconds))
                        tell(name, f"finished in {taken}")
                if running and not ended:
                    time.sleep(POLL)
        finally:
            for process in running:
                process.kill()
    return failed


class _Process:
    """A job at work, in a process group of its own: Ctrl-C reaches this program alone."""

    def __init__(
        self, job: Job, step: Step, out: Path, program: Sequence[str], threads: int, lock: int
    ) -> None:
        self.job = job
        self.log = out / f"{job.name}.log"
        self.mark = Mark(job.fingerprint, resumed=step == "resume")
        self.mark.write(out, job.name)
        argv = job.argv
        if step == "resume":
            argv = ("fit", "--resume", str(out / job.name))
        else:
            shutil.rmtree(out / job.name, ignore_errors=True)
        command = [*program, *argv]
        self._started = time.monotonic()
        with self.log.open("ab" if step == "resume" else "wb") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
                pass_fds=[lock],  # so that the lock outlives this program if a child does
                process_group=0,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def ended(self) -> bool:
        """Whether it has; the mark then has what it took."""
        # Not Popen.poll: it does not tell the CPU time of this one process and its workers.
        pid, status, usage = os.wait4(self._popen.pid, os.WNOHANG)
        if pid == 0:
            return False
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        self.mark = replace(
            self.mark,
            finished=self._popen.returncode == 0,
            seconds=time.monotonic() - self._started,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
        )
        return True

    @property
    def failure(self) -> str:
        """Why it failed; empty if it did not."""
        code = self._popen.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}" if code else ""

    def kill(self) -> None:
        """End it and all that it has started."""
        os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """In a new process on Linux: be killed when this program dies, even by kill -9."""
    assert _libc is not None
    _libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


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


def _threads(at_once: int) -> int:
    """The threads of one process of several."""
    able = getattr(os, "sched_getaffinity", None)
    return max(1, (len(able(0)) if able else os.cpu_count() or 1) // at_once)


def _note_commands(path: Path, lines: Sequence[str]) -> None:
    """Add the lines that the file lacks: it tells of every run in the directory."""
    known = path.read_text().splitlines() if path.exists() else []
    path.write_text("\n".join(dict.fromkeys([*known, *lines])) + "\n")


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-TAIL:])
