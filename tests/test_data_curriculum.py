"""The curriculum: when a stage begins, what is drawn in it, and that a resumed run agrees."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.data.batch import Batch
from sandbox.data.charts import Charts
from sandbox.data.clips import Clips
from sandbox.data.curriculum import Curriculum
from sandbox.data.mixture import Mixture
from sandbox.data.module import VQAData
from sandbox.data.pictures import Pictures
from sandbox.data.prompt import PromptEncoder
from sandbox.data.shapes import Shapes
from sandbox.data.stream import Draw
from sandbox.data.task import Task
from sandbox.data.words import InWords
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer
from sandbox.train.callbacks import Checkpoints, RunRecord
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain
from tests.checkpoints import differences, final

PROMPTS = PromptEncoder(Tokenizer.load("small"), tile_size=32, tokens_per_tile=4)
BATCH = 4
VALUES = [2, 3, None]


def charts(**options: Any) -> Charts:
    return Charts(size=32, **{"questions_per_image": 2, **options})


def curriculum(**options: Any) -> Curriculum:
    return Curriculum(**{"field": "most_items", "values": VALUES, "at": 0.6, "ahead": 2, **options})


def make(*, rank: int = 0, world: int = 1, workers: int = 0, **options: Any) -> VQAData:
    """Data of one process, with a trainer that has done nothing yet."""
    data = VQAData(charts(), BATCH, curriculum=curriculum(**options), workers=workers)
    data.prompts = PROMPTS
    total = SimpleNamespace(processed=0)
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(log=lambda *args, **kwargs: None),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))
        ),
    )
    return data


def trained(data: VQAData, batches: int) -> None:
    """Set the number of batches that have been trained on."""
    data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = batches


def answer(data: VQAData, batch: int, right: Sequence[bool], kind: str = "value") -> None:
    """Answer the questions of a batch, after all before it."""
    trained(data, batch)
    data.observe([kind] * len(right), torch.tensor(right))


def switches(data: VQAData) -> list[int]:
    """The places at which stages begin, after the first."""
    return [stage["from"] for stage in data.stages][1:]


# --- When a stage begins --------------------------------------------------------------------------


def test_the_next_stage_begins_a_fixed_number_of_batches_after_a_good_window():
    """Guards against a stage that begins in the middle of a batch, too early, or never."""
    data = make(window=2)
    for batch in range(6):
        # Windows: batches 0 and 1 (0.5), 2 and 3 (0.75). The next counts from batch 6 on.
        answer(data, batch, [True, batch > 1])
    assert switches(data) == [(4 + 2) * BATCH]
    assert [data.stage_at(place) for place in (0, 23, 24, 10**6)] == [0, 0, 1, 1]
    for batch in range(6, 12):
        answer(data, batch, [True, True])
    assert switches(data) == [6 * BATCH, (8 + 2) * BATCH]
    assert [stage["value"] for stage in data.stages] == VALUES
    for batch in range(12, 30):
        answer(data, batch, [True])
    assert len(data.stages) == 3


def test_answers_of_the_old_stage_do_not_count_for_the_new_one():
    """Guards against a stage that is left because the easier one before it was mastered."""
    data = make(window=1, ahead=5)
    answer(data, 0, [True])
    for batch in range(1, 6):  # drawn at the first stage
        answer(data, batch, [True])
    answer(data, 6, [False])
    answer(data, 7, [False])
    assert switches(data) == [6 * BATCH]


def test_question_types_can_be_left_out():
    """Guards against a stage that is mastered by its easiest question."""
    for kind, moves in (("value", True), ("count", False)):
        data = make(window=1, leave_out=("count",))
        answer(data, 0, [True], kind)
        answer(data, 1, [False])
        assert bool(switches(data)) is moves


@pytest.mark.parametrize("others", [[2, 2], [0, 2]])
def test_all_processes_decide_from_all_answers(others: list[int]):
    """Guards against ranks that draw from different stages, each by its own accuracy."""
    data = make(world=2, window=1)

    def reduce(counts: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return counts + torch.tensor(others)

    data.trainer.strategy.reduce = reduce
    answer(data, 0, [True, False])
    answer(data, 1, [False])
    # 3 of 4 answers are right, or 1 of 4.
    assert switches(data) == ([(1 + 2) * 2 * BATCH] if others[0] else [])
    trained(data, 2)  # the answers to batch 1 count where the stage is still the same
    mine = 0 if others[0] else 1
    assert data.state_dict()["curriculum"]["answers"] == others[1] + mine


def test_what_was_drawn_too_far_ahead_is_an_error():
    """Guards against a loader that prepares more than `ahead` covers, and so a stage too old."""
    data = make(window=1, ahead=2)
    list(islice(data._train_draws(), 4))
    answer(data, 0, [True])
    with pytest.raises(RuntimeError, match="before the stage of their place was known"):
        answer(data, 1, [True])


def test_workers_prepare_no_more_than_the_curriculum_waits_for():
    """Guards against many workers that hold batches of a stage that is over."""
    waits = {workers: curriculum(ahead=8).prefetch(workers) for workers in (0, 1, 2, 3, 4, 6)}
    assert waits == {0: None, 1: 2, 2: 2, 3: 2, 4: 1, 6: 1}
    with pytest.raises(UserError, match=r"curriculum\.ahead: 7 workers need 9 or more, got 8"):
        make(workers=7, ahead=8)


# --- What is drawn --------------------------------------------------------------------------------


def encoded(batch: Batch) -> list[list[Any]]:
    return [batch.tokens.tolist(), batch.tiles.tolist()]


def test_a_batch_depends_on_place_and_stage_alone():
    """Guards against samples that depend on which batches, or workers, came before."""
    data = make()
    draws = [Draw("train", place, place, stage) for place, stage in ((4, 0), (9, 2), (2, 1))]
    drawn = data.encoded()[draws]
    contents = [data.tasks[draw.stage].sample("train", draw.index) for draw in draws]
    fresh = VQAData(charts(), BATCH)
    alone = [PROMPTS.encode_sample(sample, loss="answer") for sample in contents]
    assert len(drawn.kinds) == sum(len(example.kinds) for example in alone)
    assert encoded(drawn) == encoded(make().encoded()[draws])
    assert contents[1].content == fresh.task.sample("train", 9).content
    assert contents[0].content == charts(most_items=2).sample("train", 4).content
    assert contents[2].content == charts(most_items=3).sample("train", 2).content


def test_workers_draw_the_stages_too():
    """Guards against worker processes that know of no stage but the one they were started in."""
    batches = []
    for workers in (0, 2):
        data = make(window=1, ahead=6, workers=workers)
        loader = iter(data.train_dataloader())
        drawn = []
        for batch in range(8):
            drawn.append(next(loader))
            answer(data, batch, [True])
        assert switches(data) == [7 * BATCH]
        batches.append([encoded(batch) for batch in drawn])
    for batch, drawn in enumerate(zip(*batches, strict=True)):
        places = range(BATCH * batch, BATCH * (batch + 1))
        draws = [Draw("train", place, place, stage=int(batch >= 7)) for place in places]
        assert all(one == encoded(data.encoded()[draws]) for one in drawn)
    draws = [Draw("train", place, place, stage=0) for place in range(28, 32)]
    assert encoded(data.encoded()[draws]) != batches[0][7]  # so that the above can fail


def test_evaluation_is_always_on_the_whole_task():
    """Guards against a validation that is easy because training still is."""
    data, plain = make(), VQAData(charts(), BATCH)
    plain.prompts = PROMPTS
    for split in ("val", "test", "heldout"):
        for of in (data, plain):
            of.limits[split] = 8
        pairs = zip(data.evaluation(split), plain.evaluation(split), strict=True)
        assert all(encoded(ours) == encoded(theirs) for ours, theirs in pairs)
    assert data.task.identity() == plain.task.identity()


def test_identity_names_the_curriculum():
    """Guards against two trainings on different charts that a record cannot tell apart."""
    variants = [
        VQAData(charts()),
        VQAData(charts(), curriculum=curriculum()),
        VQAData(charts(), curriculum=curriculum(values=[2, None])),
        VQAData(charts(), curriculum=curriculum(at=0.7)),
        VQAData(charts(), curriculum=curriculum(window=3)),
        VQAData(charts(), curriculum=curriculum(ahead=3)),
        VQAData(charts(), curriculum=curriculum(leave_out=("count",))),
    ]
    assert len({data.identity() for data in variants}) == len(variants)
    # As it was before there were curricula: checkpoints hold it.
    assert VQAData(Charts()).identity() == "2f4f37ac06368a51"


@pytest.mark.parametrize(
    ("task", "field", "values"),
    [
        (InWords(charts(), share=0.5), "task.most_items", [2, 5]),
        (InWords(charts(), share=0.5), "share", [0.8, 0.5]),
        (
            Mixture(
                {"bars": charts(), "pies": charts(charts=["pie"])}, {"bars": 1, "pies": 1}, "bars"
            ),
            "tasks.bars.most_items",
            [2, None],
        ),
        (Shapes(), "grid", [2, 3]),
        (Pictures(images=[2, 4]), "images", [[2], [2, 4]]),
        (Clips(), "frames", [4, 6]),
    ],
)
def test_any_task_can_be_made_easier(task: Task, field: str, values: list[Any]):
    """Guards against a curriculum for one task, or one that leaves a wrapped task as it was."""
    first, last = Curriculum(field, values).tasks(task)
    assert last is task
    drawn = [[t.sample("train", index) for index in range(8)] for t in (first, last)]
    seen = [[(len(s.images), s.questions) for s in samples] for samples in drawn]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"field": "most_item"}, r"^curriculum\.field: .* did you mean 'most_items'\?"),
        (
            {"field": "size.most_items"},
            r"^curriculum\.field: size\.most_items: 'size' is not a task",
        ),
        ({"values": [2]}, r"^curriculum\.values: needs at least two, got \[2\]"),
        ({"values": []}, r"^curriculum\.values: needs at least two"),
        ({"values": [1, None]}, r"^curriculum\.values: Charts refuses most_items=1: .* need 2"),
        ({"values": ["two", None]}, r"^curriculum\.values: Charts refuses most_items='two'"),
        ({"values": [2, 4]}, r"^curriculum\.values: the last must be the task's own most_items"),
        ({"at": 0.0}, r"^curriculum\.at: must be above 0 and at most 1, got 0\.0"),
        ({"at": 1.01}, r"^curriculum\.at: must be above 0 and at most 1, got 1\.01"),
        ({"window": 0}, r"^curriculum\.window: must be at least 1, got 0"),
        ({"ahead": 1}, r"^curriculum\.ahead: must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str):
    """Guards against a curriculum that never moves, or fails after minutes of training."""
    with pytest.raises(UserError, match=message) as caught:
        VQAData(charts(), curriculum=curriculum(**options))
    assert "\n" not in str(caught.value)


# --- Checkpoints ----------------------------------------------------------------------------------


def test_a_batch_that_was_not_trained_on_is_not_counted():
    """Guards against a checkpoint written during an update, whose batch is answered once more."""
    data = make(window=3)
    answer(data, 0, [True, False])
    answer(data, 1, [True])
    during = make(window=3)
    during.load_state_dict(data.state_dict())
    trained(data, 2)
    after = make(window=3)
    after.load_state_dict(data.state_dict())
    counted = [of.state_dict()["curriculum"] for of in (during, after)]
    assert [(c["right"], c["answers"], c["batches"]) for c in counted] == [(1, 2, 1), (2, 3, 2)]


def test_the_counts_of_all_processes_are_taken_over_once():
    """Guards against a resumed run in which every rank adds the sums of all of them."""
    state = make(window=3).state_dict()
    state["curriculum"] |= {"right": 5, "answers": 8, "batches": 1}
    ranks = [make(rank=rank, world=2, window=3) for rank in range(2)]
    for data in ranks:
        data.load_state_dict(state)
    assert [data._mastery.counts() for data in ranks] == [(5, 8), (0, 0)]


class Known(VQAData):
    """Answers all but every fourth batch: weights learn nothing in so few steps."""

    def observe(self, kinds: Sequence[str], right: Tensor) -> None:
        super().observe(kinds, torch.full([len(kinds)], self._progress().batches % 4 < 3))


class Killed(BaseException):
    pass


class Watch(Callback):
    """Notes what is trained on, and ends the run in the middle of an update."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies
        self.seen: list[Any] = []
        self.stages: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((batch.name, int(batch.tiles.long().sum())))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.dies and trainer.global_step == 5:
            raise Killed

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.stages.append(float(trainer.callback_metrics["curriculum/stage"]))


def train(
    folder: Path,
    data: VQAData,
    dies: bool = False,
    checkpoint: Path | None = None,
    steps: int = 12,
    **options: Any,
) -> Watch:
    """Train for a few steps, a checkpoint after the third."""
    lightning.seed_everything(0 if checkpoint is None else 99, verbose=False)
    module = Pretrain(
        Patches(32, 16, 16),
        EarlyFusion,
        BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=32, nope_every=2),
        optimizer=OptimizerConfig(warmup=2),
    )
    watch = Watch(dies)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Checkpoints(3), watch, RunRecord()],
        max_steps=steps,
        val_check_interval=2,
        limit_val_batches=1,
        **options,
    )
    with suppress(Killed):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return watch


@pytest.mark.parametrize(
    ("window", "workers", "begins"),
    [
        (2, 0, [6, 14]),  # the checkpoint lies between the decision and the new stage
        (3, 0, [7, 14]),  # at the end of a window that nothing was decided from yet
        (4, 0, [8]),  # in a window that does not suffice without its first batches
        (2, 2, [6, 14]),
        (4, 2, [8]),
    ],
)
def test_killed_run_resumes_bit_identically(
    tmp_path: Path, window: int, workers: int, begins: list[int]
):
    """Guards against a stage that begins elsewhere because the run was stopped, or had workers."""

    def data(workers: int) -> Known:
        moves = curriculum(window=window, ahead=4)
        return Known(charts(), BATCH, curriculum=moves, val_samples=4, workers=workers)

    whole = data(workers=0)
    watched = train(tmp_path / "whole", whole)
    assert switches(whole) == [batch * BATCH for batch in begins]
    assert watched.stages == [sum(batch >= begin for begin in begins) for batch in range(12)]
    killed = tmp_path / "killed"
    train(killed, data(workers), dies=True)
    resumed = data(workers)
    last = killed / "checkpoints" / "last.ckpt"
    assert train(killed, resumed, checkpoint=last).seen == watched.seen[3:]
    assert differences(final(tmp_path / "whole"), final(killed)) == []
    assert resumed.stages == whole.stages
    *_, session = json.loads((killed / "run.json").read_text())["sessions"]
    assert session["trained"]["stages"] == whole.stages


def test_another_run_starts_with_the_first_stage(tmp_path: Path):
    """Guards against a data module that takes the stages of one run into the next."""
    data = Known(charts(), BATCH, curriculum=curriculum(window=1), val_samples=4)
    first = train(tmp_path / "first", data, steps=5)
    assert first.stages[-1] > 0
    assert train(tmp_path / "second", data, steps=5).seen == first.seen


# --- Two processes --------------------------------------------------------------------------------


class Apart(VQAData):
    """The first process answers everything; the second nothing before its fifth batch."""

    def observe(self, kinds: Sequence[str], right: Tensor) -> None:
        rank, _ = self._place()
        known = rank == 0 or self._progress().batches >= 4
        super().observe(kinds, torch.full([len(right)], known))


def two(folder: Path) -> None:
    """One of two processes: train, and write down what was seen."""
    data = Apart(charts(), BATCH, curriculum=curriculum(window=2, at=0.75), val_samples=4)
    watch = train(folder, data, steps=9, devices=2, strategy="ddp")
    state = data.state_dict()["curriculum"]
    rank = os.environ.get("LOCAL_RANK", "0")
    told = {"switches": switches(data), "stages": watch.stages, "seen": watch.seen, "state": state}
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


@pytest.mark.slow
def test_two_processes_move_on_together(tmp_path: Path):
    """Guards against ranks that wait for each other in different batches, or train apart."""
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, tmp_path],
        check=False,
        env=env,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    # The first process alone would have moved on after its second batch.
    assert ranks[0]["switches"] == ranks[1]["switches"] == [(6 + 2) * 2 * BATCH]
    assert ranks[0]["stages"] == ranks[1]["stages"] == [0.0] * 8 + [1.0]
    assert not {name for name, _ in ranks[0]["seen"]} & {name for name, _ in ranks[1]["seen"]}
    saved = final(tmp_path)["Apart"]["curriculum"]
    assert saved == ranks[0]["state"] == ranks[1]["state"]
    assert saved["batches"] == 1 and saved["right"] == saved["answers"] > BATCH


if __name__ == "__main__":
    two(Path(sys.argv[1]))


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        (("cuont",), "unknown curriculum.leave_out 'cuont': did you mean 'count'"),
        (("value", "extremum", "count"), "names every question type"),
    ],
)
def test_question_types_left_out_exist(leave_out: tuple[str, ...], message: str) -> None:
    """Guards against a misspelt type that counts after all, and a curriculum that never moves."""
    with pytest.raises(UserError, match=message):
        VQAData(charts(), curriculum=curriculum(leave_out=leave_out))
