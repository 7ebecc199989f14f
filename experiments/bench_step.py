"""The quickstart's training step against that of another checkout of this repository.

Each side is a process of its own that lives through all rounds, since one process cannot hold two
versions of a package. Both run the same script (``bench_step_worker``), one with this checkout on
PYTHONPATH and one with the other, on the same samples and from the same weights; they take turns,
and what is counted are CPU seconds of their one thread. Rows of a batch are laid out by each side's
own code, so that padding it spares counts.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import yaml

from experiments.bench_measure import Bench, Row, Samples, Skip
from sandbox.data.charts import Charts
from sandbox.errors import UserError
from sandbox.train.pretrain import Pretrain

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "sandbox" / "quickstart.yaml"
WORKER = Path(__file__).with_name("bench_step_worker.py")
TOLERANCE = 1e-4  # relative, of the first two losses: the second shows that both updated alike
PARTS = ("collate", "forward", "backward", "update")


def step(bench: Bench) -> Iterator[Row | Skip]:
    """Quickstart step on Charts: collate, forward, backward, clip, optimizer; CPU seconds."""
    if bench.against is None:
        yield Skip(
            "step", "all cases", "name what to compare with: --against REVISION or DIRECTORY"
        )
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        other = stack.enter_context(checkout(bench.against))
        samples = folder / "samples.pickle"
        samples.write_bytes(pickle.dumps(plain_samples(bench)))
        start = {"recipe": str(RECIPE), "samples": str(samples), "weights": str(folder / "weights")}
        peer = stack.enter_context(Side(other, **start, compile=False))
        ways = [False, True] if "compile" in signature(Pretrain).parameters else [False]
        sides = [stack.enter_context(Side(ROOT, **start, compile=way)) for way in ways]
        yield from compare(bench, sides, peer)


def compare(bench: Bench, sides: list["Side"], peer: "Side") -> Iterator[Row]:
    """Rows of our sides, eager and perhaps compiled, against the peer.

    Raises:
        RuntimeError: the sides do not compute the same.
    """
    everyone = [*sides, peer]
    masks = [side.ask("masks") for side in everyone]
    first = [side.ask("steps") for side in everyone]  # the warm-up; a compiled side compiles here
    for side, result in zip(sides, first, strict=False):
        check(side, result["losses"], peer, first[-1]["losses"])
    rounds: list[list[dict[str, Any]]] = [[] for _ in everyone]
    for _ in range(bench.rounds):
        for side, results in zip(everyone, rounds, strict=True):
            results.append(side.ask("steps"))
    theirs = totals(rounds[-1])
    for place, side in enumerate(sides):
        note = "; ".join(
            f"{name}: {described(parts, mask)}"
            for name, parts, mask in (
                ("compiled" if side.compiled else "ours", rounds[place], masks[place]),
                (bench.against, rounds[-1], masks[-1]),
            )
        )
        if side.compiled:
            note += (
                f"; the first pass, compilation included: {sum_of(first[place]):.1f} CPU s a step"
            )
        what = f"quickstart step, 16 charts, fp32{', compiled' if side.compiled else ''}"
        ours = totals(rounds[place])
        yield Row("step", what, ours, str(bench.against), theirs, "s/step", note=note)


def check(side: "Side", losses: list[float], peer: "Side", theirs: list[float]) -> None:
    """Refuse to compare sides that learn from other labels, or whose losses differ."""
    if side.facts["labels"] != peer.facts["labels"]:
        raise RuntimeError(
            f"step: {side.facts['labels']} labels, but {peer.facts['labels']} in {peer.root}"
        )
    for number, (our, their) in enumerate(zip(losses[:2], theirs[:2], strict=True)):
        if not abs(our - their) <= TOLERANCE * abs(their):
            raise RuntimeError(f"step {number}: loss {our:.7g}, but {their:.7g} in {peer.root}")


def sum_of(result: dict[str, Any]) -> float:
    """CPU seconds of a step, all parts."""
    return sum(result[part] for part in PARTS)


def totals(results: list[dict[str, Any]]) -> Samples:
    """CPU seconds of a step, one figure a round."""
    return tuple(map(sum_of, results))


def described(results: list[dict[str, Any]], masks: dict[str, int]) -> str:
    """Medians of the parts, and what masks take."""
    parts = ", ".join(
        f"{part} {1e3 * median(result[part] for result in results):.1f}" for part in PARTS
    )
    return (
        f"{parts} ms; largest mask {masks['largest'] / 1e3:.0f} kB, "
        f"saved for backward {masks['saved'] / 1e3:.0f} kB, "
        f"of segments {masks['segments'] / 1e3:.0f} kB"
    )


def plain_samples(bench: Bench) -> list[list[dict[str, Any]]]:
    """Batches of training charts, as the recipe draws them, in values that any version can read."""
    data = yaml.safe_load(RECIPE.read_text())["data"]["init_args"]
    charts = Charts(**data["task"].get("init_args", {}))
    size, batches = data["batch_size"], bench.pick(8, 2)
    samples = [charts.sample("train", index) for index in range(size * batches)]
    values = [
        {
            "images": [np.asarray(image) for image in sample.images],
            "questions": [(q.text, q.answer, q.kind) for q in sample.questions],
            "content": sample.content,
        }
        for sample in samples
    ]
    return [values[start : start + size] for start in range(0, len(values), size)]


@contextmanager
def checkout(against: str) -> Iterator[Path]:
    """The directory of another checkout, or a temporary export of a revision of this one.

    Raises:
        UserError: it is neither.
    """
    if (Path(against) / "sandbox" / "__init__.py").is_file():
        yield Path(against).resolve()
        return
    git = ["git", "-C", str(ROOT)]
    commit = [*git, "rev-parse", "--quiet", "--verify", "--end-of-options", f"{against}^{{commit}}"]
    found = subprocess.run(commit, capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(
            f"--against {against}: neither a directory with a `sandbox` package nor a revision of "
            f"the repository in {ROOT}"
        )
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            [*git, "archive", found.stdout.strip()], capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


class Side:
    """A process that runs the step by the code of one checkout.

    Args:
        root: the checkout.
        compile: whether its objective compiles.
        start: what the worker needs, see ``bench_step_worker.Side``.

    Attributes:
        facts: what it said at the start.

    Raises:
        RuntimeError: the process failed; its own error stands before.
    """

    def __init__(self, root: Path, *, compile: bool, **start: Any) -> None:
        self.root, self.compiled = root, compile
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
        self.facts = self.ask("start", compile=compile, **start)
        if self.facts["root"] != str(root):
            raise RuntimeError(f"step: the code of {self.facts['root']} ran instead of {root}'s")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"step: the process on {self.root} ended at `{do}`")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
