"""How long the runs that are left may take."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from sandbox.stages.plan import Job


def time_left(
    taken: Mapping[Job, float], running: Mapping[Job, float], waiting: Sequence[Job], at_once: int
) -> float | None:
    """Seconds until all have finished; None while too few have to tell.

    A run is expected to take what others of its kind took on average: those of the same stage or
    arm with other seeds, or else, which is less sure, those of the same command. What is left then
    takes as long as the longest chain of runs that need each other, and as all of them shared
    evenly among those at once; the longer of both is the estimate.

    Args:
        taken: the seconds of those that have finished.
        running: the seconds so far of those at work.
        waiting: the others, each behind those it needs.
        at_once: how many run side by side.
    """
    total, chains = 0.0, dict[str, float]()
    for job in (*running, *waiting):
        expected = _expected(job, taken)
        if expected is None:
            return None
        rest = max(0.0, expected - running.get(job, 0.0))
        total += rest
        chains[job.name] = rest + max((chains.get(need, 0.0) for need in job.needs), default=0.0)
    return max(total / at_once, max(chains.values(), default=0.0))


def _expected(job: Job, taken: Mapping[Job, float]) -> float | None:
    kinds: list[Callable[[Job], str]] = [_stage, _command]
    for kind in kinds:
        if alike := [seconds for other, seconds in taken.items() if kind(other) == kind(job)]:
            return fmean(alike)
    return None


def _stage(job: Job) -> str:
    return job.name.rpartition("/")[2]


def _command(job: Job) -> str:
    return job.argv[0]
