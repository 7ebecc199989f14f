"""Runs as tasks of Ray: on the machines of a cluster, or on this one.

Each task starts the same process as ``sandbox.stages.process`` does, on the node that Ray chose:
the nodes share a file system, on which this program, its folder and the output have the same paths.
Ray is an optional package, imported when it is asked for.
"""

import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from sandbox.errors import UserError
from sandbox.stages.process import PATIENCE, POLL, End, Order, Process, cores

OBJECTS = 100 * 2**20  # bytes of a local Ray's object store: only exit codes pass through it


class OnRay:
    """Runs as tasks of the Ray at ``RAY_ADDRESS``, or else of one on this machine alone.

    Ray queues what finds no free node. A task is never tried again: its run is resumed when the
    command is given again.
    """

    def __init__(self, gpus: float | None = None) -> None:
        """Connect, or start Ray; it ends with this program.

        Args:
            gpus: of each run, a part of one too; by default one, where a node has any.

        Raises:
            UserError: Ray is not installed or does not answer, or no node has so many GPUs.
        """
        _connect()
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        self._gpus = min(1.0, most) if gpus is None else gpus
        if self._gpus > most:
            raise UserError(
                f"--gpus-per-run {gpus:g}: the nodes of this Ray have {most:g} at most, so no run "
                "would ever start"
            )
        self._cores = [int(node.get("CPU", 0)) for node in nodes]
        self._task = ray.remote(max_retries=0)(_work)

    def places(self, at_once: int) -> int:
        """All of them: Ray queues what has no room."""
        return at_once

    def threads(self, at_once: int) -> int:
        """The threads of each of so many runs side by side: see ``share``."""
        return share(self._cores, at_once)

    def start(self, order: Order, lock: int) -> "_Task":
        """Start a run. Ray ends it when this program ends, so it does not need the lock."""
        task = self._task.options(num_cpus=order.threads, num_gpus=self._gpus, name=order.log.stem)
        return _Task(task.remote(order))


def share(cores_of: Sequence[int], at_once: int) -> int:
    """The most cores for each of so many runs for which the nodes hold them all; at least 1.

    >>> share([8, 8], 3)  # 5 would leave one run waiting
    4
    """
    for threads in range(max(cores_of, default=1), 1, -1):
        if sum(cores // threads for cores in cores_of) >= at_once:
            return threads
    return 1


def _connect() -> None:
    address = os.environ.get("RAY_ADDRESS")
    if not address:  # a local Ray listens on all interfaces: only who knows its token may use it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise UserError(
            "--launcher ray: Ray is not installed; `uv sync --extra ray` or "
            "`pip install 'early-fusion-sandbox[ray]'` installs it"
        ) from None
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {"include_dashboard": False, "num_cpus": cores(), "object_store_memory": OBJECTS}
    try:
        if address:
            _knock(address)
        ray.init(address=address or "local", **options)
    except (OSError, RuntimeError, ValueError) as error:
        what = "Ray did not start (its files go to RAY_TMPDIR, whose path has to be short)"
        if address:
            what = f"no Ray lets us in at RAY_ADDRESS={address} (RAY_AUTH_MODE=token, if it asks)"
        raise UserError(f"--launcher ray: {what}: {error}") from error


def _knock(address: str) -> None:
    """Find out whether anything listens there: Ray itself goes on trying for a quarter of an hour.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdecimal():  # not a word such as `auto`
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


def _work(order: Order) -> End:
    """On a node: run it to its end. A cancelled task is interrupted here, and ends it."""
    process = Process(order)
    try:
        while (end := process.end()) is None:
            time.sleep(POLL)
        return end
    finally:
        process.kill()


class _Task:
    """A run as a task of Ray."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._future = reference.future()

    def end(self) -> End | None:
        """How it ended; None while it has not."""
        from ray.exceptions import RayError

        if not self._future.done():
            return None
        try:
            return self._future.result()
        except RayError as error:  # its worker or node is gone, or could not start the process
            cause = getattr(error, "cause", None) or error
            return End(f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}")

    def kill(self) -> None:
        """End it and all that it has started, and wait for that."""
        import ray

        for force in (False, True):
            ray.cancel(self._reference, force=force)
            if ray.wait([self._reference], timeout=PATIENCE)[0]:
                return
