"""Two processes train as one does: losses, gradients, weights, resumed runs, controls.

One pair of processes (gloo, on the CPU) runs everything that the quick tests look at.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from encoders.patches import Patches
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import KEY
from sandbox.data.batch import IGNORE, Batch, Example, collate
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.data.words import InWords
from sandbox.evals import controls, run
from sandbox.evals.controls import Controls
from sandbox.train.callbacks import Checkpoints, NonFiniteGuard, RunRecord
from sandbox.train.monitors import RoutingMonitor, Throughput
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain

Update = list[tuple[list[Example], list[Example]]]  # by micro-batch, the rows of each process

CONFIG = BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=32, nope_every=2)
BY_LOSS = replace(CONFIG, balance="loss", balance_rate=0.1, router_z_loss=0.01)
BOUND = 1e-5  # of the norm of what it is compared with
STEPS, EVERY, DIES_IN, BATCH = 4, 2, 3, 3  # of the runs that are resumed
SAMPLES = 40  # of the test split: two batches of 32
WORDS = 8  # the first of the samples that are told in words


def early(*widths: int) -> EarlyFusion:
    return EarlyFusion(*widths, shuffle=1)


def crossed(*widths: int) -> CrossAttention:
    """Adapters whose gates are open: shut ones would let no gradient through."""
    fusion = CrossAttention(*widths, layers=[1], heads=2, head_dim=16, hidden=16)
    torch.nn.init.ones_(fusion.adapters["1"].attention_gate)
    torch.nn.init.ones_(fusion.adapters["1"].ffn_gate)
    return fusion


def module(config: BackboneConfig = CONFIG, fusion: Callable[..., Any] = early) -> Pretrain:
    """A small model to train."""
    torch.manual_seed(0)
    optimizer = OptimizerConfig(warmup=2, weight_decay=0.1)
    return Pretrain(Patches(32, 16, 16), fusion, config, optimizer=optimizer)


def examples(pretrain: Pretrain) -> list[Example]:
    """Eight charts, and eight in words: 1, 2, 3 or 4 questions each."""
    found = []
    for index in range(2 * WORDS):
        charts = Charts(size=32, questions_per_image=1 + index % 4)
        task: Any = charts if index < WORDS else InWords(charts)
        found.append(pretrain.model.prompts.encode_sample(task.sample("train", index)))
    return found


def unlabelled(example: Example) -> Example:
    labels, answers = (torch.full((len(example),), n).numpy() for n in (IGNORE, -1))
    return replace(example, labels=labels, answers=answers, kinds=())


def plan(name: str, e: list[Example]) -> list[Update]:
    """What the processes read: a list of updates."""
    words = e[WORDS:]
    if name == "accumulated":  # windows of four, the last one cut short
        first = [([e[0]], [e[3], e[2]]), ([e[1], e[2]], [words[1]]), ([e[5]], [unlabelled(e[4])])]
        return [[*first, ([words[0]], [words[3]])], [([e[6], e[7]], [e[0]]), ([e[3]], [e[1]])]]
    return [
        [([e[0], e[4]], [e[3], e[7], e[2]])],  # 2 labelled answers and 11
        [([words[0], words[1]], [e[4], e[5]])],  # a process without images
        [([e[6]], [unlabelled(e[7]), unlabelled(e[0])])],  # one without labels
        [([words[2]], [words[3], words[5]])],  # no image at all
        [([e[1]], [e[2], unlabelled(e[3])])],
    ]


SCENARIOS: dict[str, dict[str, Any]] = {
    "bias": {},
    "loss": {"config": BY_LOSS},
    "adapters": {"fusion": crossed},
    "accumulated": {},
}


class Served:
    """Batches that are there; Lightning would take a list for several loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Watch(Callback):
    """Keeps losses and gradients of every update, and counts our collectives."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.collectives = 0
        self._all_reduce = dist.all_reduce

    def on_train_start(self, trainer: Any, module: Any) -> None:
        def counted(*args: Any, **options: Any) -> Any:
            self.collectives += 1
            return self._all_reduce(*args, **options)

        dist.all_reduce = counted

    def on_train_end(self, trainer: Any, module: Any) -> None:
        dist.all_reduce = self._all_reduce

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = {name: p.grad for name, p in module.named_parameters()}
        self.gradients.append({n: None if g is None else g.clone() for n, g in grads.items()})

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def trainer(folder: Path, world: int, **options: Any) -> Trainer:
    """A Trainer that writes nothing of its own, on one process or as one of two."""
    quiet = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **quiet | options,
    )


def train(name: str, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Run a scenario: as one of two processes, or as the one that reads the rows of both."""
    pretrain = module(**SCENARIOS[name])
    updates = plan(name, examples(pretrain))
    if world > 1:
        batches = [micro[rank] for update in updates for micro in update]
    else:
        batches = [[row for rows in chain(*update) for row in rows] for update in updates]
    watch, options = Watch(), dict[str, Any](callbacks=[])
    if name == "bias":  # whatever else takes part in collectives
        options["callbacks"] = [RoutingMonitor(), Throughput(), NonFiniteGuard(), RunRecord()]
        options["logger"] = CSVLogger(folder, version=name)
    if name == "accumulated" and world > 1:
        options["accumulate_grad_batches"] = 4
    options["callbacks"].append(watch)
    fit = trainer(folder, world, max_epochs=1, log_every_n_steps=1, **options)
    fit.fit(pretrain, Served([collate(rows, name=f"batch of {rank}") for rows in batches]))
    return {
        "losses": watch.losses,
        "gradients": watch.gradients,
        "weights": pretrain.state_dict(),
        "collectives": watch.collectives,
    }


class Killed(BaseException):
    pass


class Names(Callback):
    """Notes the batches, and may end the run in the middle of an update."""

    def __init__(self, dies: bool) -> None:
        self.names: list[str] = []
        self.dies = dies

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, *_: Any) -> None:
        self.names.append(batch.name)

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if self.dies and trainer.global_step == DIES_IN:
            raise Killed


class Noisy(Pretrain):
    """Lets each process's own generator decide on the weights."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        result["loss"] = result["loss"] * (1 + torch.rand(()))
        return result


def resumable(folder: Path, world: int, dies: bool = False, checkpoint: Any = None) -> list[str]:
    """Train from the stream, half of whose samples are in words, with checkpoints."""
    pretrain = module()
    pretrain.__class__ = Noisy
    names = Names(dies)
    options: dict[str, Any] = {"callbacks": [Checkpoints(EVERY), names], "max_steps": STEPS}
    options |= {"enable_checkpointing": True, "val_check_interval": 2}
    fit = trainer(folder, world, **options)
    lightning.seed_everything(fit.global_rank if checkpoint is None else 99, verbose=False)
    data = VQAData(InWords(Charts(size=32), share=0.5), BATCH, val_samples=8)
    with suppress(Killed):
        fit.fit(pretrain, data, ckpt_path=checkpoint, weights_only=True)
    return names.names


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def scored(folder: Path, world: int) -> int:
    """Run a test with its controls; returns how many batches this process has read."""
    batches, read = run._batch, 0

    def counted(*args: Any, **options: Any) -> Batch:
        nonlocal read
        read += 1
        return batches(*args, **options)

    before = controls.LEARNED
    run._batch, controls.LEARNED = counted, 200
    data = VQAData(Charts(size=32), BATCH, test_samples=4)
    trainer(folder, world, callbacks=[Controls(SAMPLES)]).test(module(), data, verbose=False)
    run._batch, controls.LEARNED = batches, before
    return read


def work(folder: Path, rank: int) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: train(name, folder, rank, 2) for name in SCENARIOS}
    whole, stopped = folder / "whole", folder / "stopped"
    found["whole"] = resumable(whole, 2)
    resumable(stopped, 2, dies=True)
    found["resumed"] = resumable(stopped, 2, checkpoint=last(stopped))
    resumable(folder / "fewer", 2, dies=True)
    (folder / "test").mkdir(exist_ok=True)
    found["read"] = scored(folder / "test", 2)
    torch.save(found, folder / f"rank-{rank}.pt")


# --- The tests ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the two processes, and what each has found."""
    folder = tmp_path_factory.mktemp("pair")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            env=os.environ | common | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, told, strict=True):
        assert process.returncode == 0, text[-3000:]
    return folder, [torch.load(folder / f"rank-{r}.pt", weights_only=False) for r in (0, 1)]


def distance(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest relative distance between tensors; None equals None alone."""
    assert [x is None for x in found] == [x is None for x in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(name: str, pair: Any, tmp_path: Path):
    """Guards against a mean of means where labels are unequal, by rank or in accumulated batches;
    a rank that waits for one without images or labels, or moves parts that no image has met; and
    experts balanced by the load of one process.
    """
    both = [found[name] for found in pair[1]]
    one = train(name, tmp_path)
    assert len(one["losses"]) == len(plan(name, examples(module())))
    for two in both:
        assert two["losses"] == pytest.approx(one["losses"], rel=BOUND)
        for found, expected in zip(two["gradients"], one["gradients"], strict=True):
            assert found.keys() == expected.keys()
            assert distance([*found.values()], [*expected.values()]) < BOUND
        names = one["weights"].keys()
        weights = [[each["weights"][n] for n in names] for each in (two, one)]
        assert distance(*weights) < BOUND
    first, second = (each["weights"] for each in both)
    assert all(first[n].equal(second[n]) for n in first), "the processes stay the same"


def test_an_update_takes_few_collectives(pair: Any):
    """Guards against one all-reduce a layer, and counts that every micro-batch waits for."""
    counts = {name: pair[1][0][name]["collectives"] for name in SCENARIOS if name != "bias"}
    # Where the loss balances: loads, then tokens, before the backward pass, and once after it.
    assert counts == {"adapters": 5, "loss": 3 * 5, "accumulated": 2}


def nested(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states are not the same, bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in nested(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, type(a)) and len(a) == len(b):
        return [d for i in range(len(a)) for d in nested(a[i], b[i], f"{path}/{i}")]
    same = a.equal(b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


def test_two_processes_resume_bit_identically(pair: Any):
    """Guards against random states or places in the stream of one process alone, and against a
    batch that is skipped or repeated.
    """
    folder, both = pair
    for rank, found in enumerate(both):
        firsts = [(2 * step + rank) * BATCH for step in range(STEPS)]
        assert found["whole"] == [f"train samples {n}..{n + BATCH - 1}" for n in firsts]
        assert found["resumed"] == found["whole"][EVERY:]
    states = [torch.load(last(folder / run), weights_only=True) for run in ("whole", "stopped")]
    for state in states:
        del state["callbacks"], state[KEY]["seed"]
    assert nested(*states) == []


def test_one_process_goes_on_where_two_stood(pair: Any):
    """Guards against samples that are skipped or repeated when the number of processes changes."""
    fewer = pair[0] / "fewer"
    saved = torch.load(last(fewer), weights_only=True)
    names = resumable(fewer, 1, checkpoint=last(fewer))
    firsts = [2 * EVERY * BATCH + step * BATCH for step in range(STEPS - EVERY)]
    assert names == [f"train samples {n}..{n + BATCH - 1}" for n in firsts]
    ended = torch.load(last(fewer), weights_only=True)
    assert (saved["global_step"], ended["global_step"]) == (EVERY, STEPS)


def test_controls_share_the_work(pair: Any, tmp_path: Path):
    """Guards against a process that waits for minutes until another has asked everything, and
    against answers that depend on how many asked.
    """
    folder, both = pair
    read = scored(tmp_path, 1)
    shares = [found["read"] for found in both]
    extra = 1  # the first process reads one more batch, for the load of its experts
    assert sum(shares) == read
    assert shares[0] - extra == shares[1] > 0
    for name in ("summary.json", "predictions.jsonl"):
        assert (folder / "test" / name).read_text() == (tmp_path / name).read_text()


def test_monitors_know_of_all_processes(pair: Any):
    """Guards against a record or a monitor that stops where there are several processes."""
    folder, _ = pair
    (session,) = json.loads((folder / "run.json").read_text())["sessions"]
    assert session["processes"] == 2
    assert session["trained"]["steps"] == len(plan("bias", examples(module())))
    logged = (folder / "lightning_logs" / "bias" / "metrics.csv").read_text()
    for key in ("routing/load/layer0/image", "throughput/tokens_per_s", "train/grad_norm"):
        assert key in logged


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A configuration for two processes, one sample each: half of the time one has no image."""
    part = lambda path, **given: {"class_path": path, "init_args": given}  # noqa: E731
    charts = part("sandbox.data.charts.Charts", size=32)
    monitors = ["RoutingMonitor", "SampleImages", "Throughput"]
    config = {
        "model": part(
            "sandbox.train.pretrain.Pretrain",
            encoder=part("encoders.patches.Patches", tile_size=32, patch_size=16, width=16),
            fusion=part("fusion.early.EarlyFusion", shuffle=1),
            backbone={"width": 32, "layers": 2, "heads": 2, "head_dim": 16, "expert_hidden": 32},
        ),
        "data": part(
            "sandbox.data.module.VQAData",
            task=part("sandbox.data.words.InWords", task=charts, share=0.5),
            batch_size=1,
            val_samples=8,
            test_samples=40,
        ),
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "max_steps": 24,
            "gradient_clip_val": 1.0,
            "accumulate_grad_batches": 2,
            "val_check_interval": 20,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 5,
            "callbacks": [
                part("sandbox.train.callbacks.Checkpoints", every=10),
                *({"class_path": f"sandbox.train.monitors.{name}"} for name in monitors),
            ],
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def sandbox(*arguments: Any) -> subprocess.Popen[bytes]:
    """Start the command, in a process group of its own."""
    command = [sys.executable, "-m", "sandbox.cli", *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, start_new_session=True, env=one_thread
    )


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_bit_identically(recipe: Path, tmp_path: Path):
    """Guards against processes that Lightning starts itself and that differ from ours: callbacks
    that wait for each other, a run that is killed for good, a test that one process evaluates.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert sandbox("fit", "--config", recipe, "--out", whole).wait(timeout=300) == 0
    process = sandbox("fit", "--config", recipe, "--out", killed)
    while not last(killed).exists():
        assert process.poll() is None, "it died by itself"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert torch.load(last(killed), weights_only=True)["global_step"] < 24
    assert sandbox("fit", "--resume", killed).wait(timeout=300) == 0
    states = [torch.load(last(folder), weights_only=True) for folder in (whole, killed)]
    for state in states:
        del state["callbacks"], state[KEY]["seed"]
    assert nested(*states) == []
    assert list(whole.glob("events.out.tfevents*")), "with pictures"

    several, alone = tmp_path / "several", tmp_path / "alone"
    common = ("test", "--config", recipe, "--ckpt_path", whole, "--out")
    assert sandbox(*common, several).wait(timeout=300) == 0
    assert sandbox(*common, alone, "--trainer.devices", 1).wait(timeout=300) == 0
    for name in ("summary.json", "predictions.jsonl"):
        assert (several / name).read_text() == (alone / name).read_text()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
