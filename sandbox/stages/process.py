"""One run as a process of this machine: started, waited for, ended with all that it has started.

POSIX only.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

POLL = 0.02  # seconds between two looks at the processes
PATIENCE = 10.0  # seconds for what was killed to die, data workers included
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl(2)


@dataclass(frozen=True)
class Order:
    """What is to be run, wherever that is.

    Attributes:
        command: the program and its arguments.
        folder: where it runs, absolute: paths in the command and in its files may be relative.
        log: the file behind whose end its output goes, absolute.
        threads: how many it may use.
        gpus: the value of ``CUDA_VISIBLE_DEVICES``; None leaves the variable as it is.
    """

    command: tuple[str, ...]
    folder: Path
    log: Path
    threads: int
    gpus: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that it adds."""
        found = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        return found if self.gpus is None else found | {"CUDA_VISIBLE_DEVICES": self.gpus}


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        failure: why it failed; empty if it did not.
        seconds, cpu_seconds: what it took, on the clock and on all cores.
    """

    failure: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Work(Protocol):
    """A run at work."""

    def end(self) -> End | None:
        """How it ended; None while it has not."""

    def kill(self) -> None:
        """End it and all that it has started."""


class Launcher(Protocol):
    """Where runs are started."""

    def places(self, at_once: int) -> int:
        """How many of the wanted runs have room side by side."""

    def threads(self, at_once: int) -> int:
        """The threads of each of this many runs side by side."""

    def start(self, order: Order, lock: int) -> Work:
        """Start a run. ``lock`` is a file descriptor that is to stay open as long as it runs."""


class Process:
    """A run as a process, in a group of its own: Ctrl-C reaches this program alone.

    It dies with the thread that started it, however that ends.
    """

    def __init__(self, order: Order, keep: Sequence[int] = ()) -> None:
        """Start it.

        Args:
            order: what to run.
            keep: file descriptors that it inherits.
        """
        self._started = time.monotonic()
        with order.log.open("ab") as log:
            self._popen = subprocess.Popen(
                order.command,
                cwd=order.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | order.variables,
                pass_fds=keep,
                process_group=0,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._popen.pid

    def end(self) -> End | None:
        """How it ended; None while it has not."""
        # Not Popen.poll: it does not tell the CPU time of this one process and its workers.
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        code = self._popen.returncode = os.waitstatus_to_exitcode(status)
        failure = f"exit code {code}" if code else ""
        if code < 0:
            failure = f"killed by {signal.Signals(-code).name}"
        seconds = time.monotonic() - self._started
        return End(failure, seconds, usage.ru_utime + usage.ru_stime)

    def kill(self) -> None:
        """End it and all that it has started."""
        if self._popen.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()


class Local:
    """Runs as processes of this machine, which share its cores evenly.

    Where there are places with GPUs, a run holds one of them from its start to its end.
    """

    def __init__(self, places: Sequence[str] = ()) -> None:
        """Runs in these places, each the value of ``CUDA_VISIBLE_DEVICES``; none: anywhere.

        A place that is listed twice takes two runs. See ``sandbox.stages.gpus``.
        """
        self._places = len(places)
        self._free = list(places)

    def places(self, at_once: int) -> int:
        """As many as have GPUs, where any do."""
        return min(at_once, self._places or at_once)

    def threads(self, at_once: int) -> int:
        """The threads of each of this many processes."""
        return max(1, cores() // at_once)

    def start(self, order: Order, lock: int) -> Work:
        """Start a run. The lock outlives this program if a run does."""
        if not self._places:
            return Process(order, keep=[lock])
        gpus = self._free.pop(0)
        try:
            return _Placed(Process(replace(order, gpus=gpus), keep=[lock]), self._free, gpus)
        except BaseException:
            self._free.append(gpus)
            raise


class _Placed:
    """A process that gives its place back when it has ended, however it did."""

    def __init__(self, process: Process, free: list[str], place: str) -> None:
        self._process = process
        self._free = free
        self._place: str | None = place

    def end(self) -> End | None:
        """How it ended; None while it has not."""
        if end := self._process.end():
            self._release()
        return end

    def kill(self) -> None:
        """End it and all that it has started."""
        self._process.kill()
        self._release()

    def _release(self) -> None:
        if self._place is not None:
            self._free.append(self._place)
            self._place = None


LOCAL = Local()


def cores() -> int:
    """The cores of this machine that this program may use."""
    able = getattr(os, "sched_getaffinity", None)
    return len(able(0)) if able else os.cpu_count() or 1


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """In a new process on Linux: be killed when this program dies, even by kill -9."""
    assert _libc is not None
    _libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
