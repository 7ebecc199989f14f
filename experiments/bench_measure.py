"""Measuring: contenders take turns in one process, and every figure keeps its spread.

A machine's speed drifts by more than the differences that matter, so nothing is timed alone: a
round times each contender once, and a ratio is taken within a round before the median over rounds.
"""

import gc
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Samples = tuple[float, ...]  # one figure a round: seconds, seconds per something, or bytes
Sampler = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Samples) -> "Spread":
        """The spread of one or more samples; of a single one, itself."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def ratios(above: Samples, below: Samples) -> Spread:
    """The spread of the quotients round by round."""
    return Spread.of(tuple(a / b for a, b in zip(above, below, strict=True)))


def scaled(samples: Samples, factor: float) -> Samples:
    """Every sample times a factor: a rate becomes a floor."""
    return tuple(factor * sample for sample in samples)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        section: the section that it belongs to.
        what: the case measured.
        ours: our samples, one a round.
        against: what they are compared with.
        peer: its samples, of the same rounds.
        unit: ``s``, ``s/step``, ``s/token`` or ``B``.
        gain: whether the ratio says how many times better ours is (``peer / ours``), so that a
            goal is a lower bound; otherwise how much it costs (``ours / peer``), an upper bound.
        goal: bound of the ratio, or None where nothing was promised.
        floor: samples of what the hardware allows at best, or None.
        length: tokens of the sequence, where the cost by length is the point.
        note: what else to know, e.g. what the floor counts.
    """

    section: str
    what: str
    ours: Samples
    against: str
    peer: Samples
    unit: str = "s"
    gain: bool = True
    goal: float | None = None
    floor: Samples | None = None
    length: int | None = None
    note: str = ""

    @property
    def ratio(self) -> Spread:
        """How many times better than the peer, or how many times its cost, see ``gain``."""
        return ratios(self.peer, self.ours) if self.gain else ratios(self.ours, self.peer)

    @property
    def relation(self) -> str:
        """How ours stands to the peer, in words."""
        return f"{'against' if self.gain else 'over'} {self.against}"

    @property
    def met(self) -> bool | None:
        """Whether the median ratio keeps the goal; None without one."""
        if self.goal is None:
            return None
        return self.ratio.median >= self.goal if self.gain else self.ratio.median <= self.goal

    @property
    def above_floor(self) -> Spread | None:
        """Ours in units of the floor."""
        return None if self.floor is None else ratios(self.ours, self.floor)


@dataclass(frozen=True)
class Skip:
    """A case that this machine cannot run, and why."""

    section: str
    what: str
    why: str


@dataclass(frozen=True)
class Bench:
    """Where and how thoroughly to measure.

    Attributes:
        device: where models and tensors live.
        rounds: how often every contender is sampled.
        quick: whether to run everything in miniature: a rehearsal, whose figures mean nothing.
        cpu_time: count the CPU seconds of this process, all its threads, not wall-clock ones: the
            fairer clock on a machine that others use too, for work on one thread.
        against: another checkout or a revision, for section ``step``.
    """

    device: torch.device
    rounds: int = 5
    quick: bool = False
    cpu_time: bool = False
    against: str | None = None

    def pick(self, full: Any, miniature: Any) -> Any:
        """The full size, or its miniature."""
        return miniature if self.quick else full

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call, the device's work included."""
        clock = time.process_time if self.cpu_time else time.perf_counter
        self.wait()
        start = clock()
        call()
        self.wait()
        return clock() - start

    def timer(self, call: Callable[[], object]) -> Sampler:
        """A sampler of the call's seconds."""
        return lambda: self.seconds(call)

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def interleave(self, *samplers: Sampler, warmup: int = 1) -> list[Samples]:
        """Sample in turn, A B C A B C ...: the samples of each, after rounds that do not count.

        Garbage is collected between samples and never within one.
        """
        taken: list[list[float]] = [[] for _ in samplers]
        collects = gc.isenabled()
        gc.collect()
        gc.freeze()  # what was there before is not searched again
        gc.disable()
        try:
            for turn in range(warmup + self.rounds):
                for samples, sampler in zip(taken, samplers, strict=True):
                    gc.collect()
                    value = sampler()
                    if turn >= warmup:
                        samples.append(value)
        finally:
            gc.unfreeze()
            if collects:
                gc.enable()
        return [tuple(samples) for samples in taken]

    def per_flop(self, dtype: torch.dtype = torch.float32) -> Sampler:
        """Seconds per floating-point operation of square matmuls, the best of eight.

        They are 1024 wide on a CPU, and 8192 on a GPU.
        """
        N = self.pick(8192 if self.device.type == "cuda" else 1024, 64)
        a, b = torch.randn(2, N, N, device=self.device).to(dtype)
        return lambda: min(self.seconds(lambda: a @ b) for _ in range(8)) / (2 * N**3)

    def per_byte(self) -> Sampler:
        """Seconds per byte read from memory: the sum of 256 MiB, the best of eight."""
        x = torch.randn(self.pick(64, 1) * 2**20, device=self.device)
        return lambda: min(self.seconds(x.sum) for _ in range(8)) / x.nbytes

    def lacks(self, need: float) -> str:
        """Why ``need`` bytes cannot be had on the device, or nothing if they can."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = _available()
        enough = need <= 0.95 * free
        return "" if enough else f"needs {need / 1e9:.1f} GB of free memory, has {free / 1e9:.1f}"


def _available() -> float:
    """Bytes that this machine can still give; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return float("inf")


def peak_memory(bench: Bench, call: Callable[[], object]) -> int:
    """Bytes that a call takes at its peak, beyond what was allocated before; 0 on a CPU."""
    if bench.device.type != "cuda":
        return 0
    bench.wait()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    call()
    bench.wait()
    return torch.cuda.max_memory_allocated(bench.device) - before


def waits(bench: Bench, call: Callable[[], object]) -> int:
    """How often a call makes the host wait for a CUDA device; 0 on a CPU, which never does."""
    if bench.device.type != "cuda":
        return 0
    bench.wait()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs within, such as a compilation, after some seconds; main thread only.

    Raises:
        TimeoutError: the time was over.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s, most likely to compile")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def agree(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Refuse to time two things that do not compute the same.

    Raises:
        RuntimeError: they differ by more than ``tolerance``, relative to the largest entry.
    """
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{what}: shape {tuple(ours.shape)} against {tuple(theirs.shape)}")
    scale = theirs.detach().abs().max().clamp(min=1e-30).float()
    error = float((ours.detach() - theirs.detach()).abs().max() / scale)
    if not error <= tolerance:  # NaN too
        raise RuntimeError(f"{what}: ours differs by {error:.1e}, more than {tolerance:.0e}")
