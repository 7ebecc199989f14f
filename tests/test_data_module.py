"""The data module: what a batch holds on every rank and worker, and where a resumed run starts."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from sandbox.data.batch import Batch
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.data.prompt import PromptEncoder
from sandbox.data.task import Sample, Split, Task
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer

PROMPTS = PromptEncoder(Tokenizer.load("small"), tile_size=32, tokens_per_tile=4)
POOL = 10


class Finite(Task):
    """The first few charts of each split, and none held out."""

    def __init__(self, questions: int = 2) -> None:
        self.charts = Charts(size=32, questions_per_image=questions)

    def size(self, split: Split) -> int:
        return 0 if split == "heldout" else POOL

    def sample(self, split: Split, index: int) -> Sample:
        return self.charts.sample(split, index)

    def identity(self) -> str:
        return self.charts.identity()


def charts(**options: int) -> Charts:
    return Charts(size=32, **{"questions_per_image": 2, **options})


def make(task: Task, *, rank: int = 0, world: int = 1, done: int = 0, **options: int) -> VQAData:
    """Data of one process, with a trainer that has done so many batches."""
    data = VQAData(task, **{"batch_size": 4, **options})
    data.prompts = PROMPTS
    total = SimpleNamespace(processed=done)
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        max_steps=100,
        limit_train_batches=1.0,
        lightning_module=SimpleNamespace(model=SimpleNamespace(prompts=PROMPTS)),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))
        ),
    )
    return data


def names(data: VQAData, count: int) -> list[str]:
    return [batch.name for batch in islice(data.train_dataloader(), count)]


def indices(data: VQAData, count: int) -> list[int]:
    """Sample numbers of the first batches, in order."""
    found: list[int] = []
    for draws in islice(data._train_draws(), count):
        found += [draw.index for draw in draws]
    return found


def same(a: Batch, b: Batch) -> bool:
    return a.name == b.name and torch.equal(a.tokens, b.tokens) and torch.equal(a.tiles, b.tiles)


def test_endless_task_is_read_in_order():
    """Guards against batches that cannot be traced back to their samples."""
    assert names(make(charts()), 3) == [
        "train samples 0..3",
        "train samples 4..7",
        "train samples 8..11",
    ]
    assert names(make(charts(), done=40), 1) == ["train samples 160..163"]


@pytest.mark.parametrize("task", [charts(), Finite()])
def test_ranks_share_one_stream(task):
    """Guards against processes that train on the same samples, or leave some out."""
    alone = indices(make(task, batch_size=8), 3)
    ranks = [indices(make(task, rank=rank, world=2), 3) for rank in range(2)]
    together = [ranks[r][4 * step + i] for step in range(3) for r in range(2) for i in range(4)]
    assert together == alone


def test_finite_task_is_permuted_anew_for_each_pass():
    """Guards against a short last batch, a sample seen twice in a pass, and one fixed order."""
    order = indices(make(Finite()), 5)  # two passes; the first ends within the third batch
    first, second = order[:POOL], order[POOL:]
    assert sorted(first) == sorted(second) == list(range(POOL))
    assert first != second
    assert indices(make(Finite(), seed=1), 5) != order
    assert indices(make(Finite(), done=2), 3) == order[8:]


def test_workers_see_the_same_batches():
    """Guards against workers that each start their own stream, or repeat each other's samples."""
    for task in (charts(), Finite()):
        plain = islice(make(task, questions_per_sample=1).train_dataloader(), 5)
        worked = islice(make(task, questions_per_sample=1, workers=2).train_dataloader(), 5)
        assert all(map(same, plain, worked))


def test_iterating_leaves_random_numbers_alone():
    """Guards against dataloaders that draw a seed, so that a validation changes the training."""
    before = torch.get_rng_state()
    names(make(charts()), 2)
    list(make(charts(), val_samples=4).val_dataloader()[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_resumes_with_another_batch_size():
    """Guards against a position counted in batches, which another batch size would misread."""
    stopped = make(charts(), done=6, world=2)  # 6 batches of 4 on 2 processes: 48 samples
    resumed = make(charts(), batch_size=16)
    resumed.load_state_dict(stopped.state_dict())
    assert names(resumed, 1) == ["train samples 48..63"]
    resumed.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 7
    assert names(resumed, 1) == ["train samples 64..79"]
    resumed.teardown("fit")
    resumed.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 0
    assert names(resumed, 1) == ["train samples 0..15"]


def test_warns_when_resumed_on_other_data():
    """Guards against a silent change of data under a run."""
    with pytest.warns(UserWarning, match="other data"):
        make(charts()).load_state_dict(make(Finite()).state_dict())


def test_identity_follows_what_the_model_sees():
    """Guards against two different data sets that a report calls the same."""
    variants = [
        make(charts()),
        make(charts(seed=1)),
        make(Finite()),
        make(charts(), seed=1),
        make(charts(), questions_per_sample=1),
        make(charts(), loss="text"),
    ]
    assert len({data.identity() for data in variants}) == len(variants)
    assert make(charts()).identity() == make(charts(), batch_size=2, workers=1).identity()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_is_evaluated_once(world):
    """Guards against metrics over padded or dropped samples, and ranks that wait for each other."""
    loaders = [make(Finite(), rank=rank, world=world).val_dataloader()[0] for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    assert sum(len(loader) for loader in loaders) == len(batches)
    seen = [place for b in batches for place in range(len(b.tokens))]
    assert len(seen) == POOL
    assert len({b.name for b in batches}) == len(batches)
    assert all(len(batch.tokens) <= 4 for batch in batches)


def test_too_few_samples_for_the_processes():
    """Guards against empty batches."""
    with pytest.raises(UserError, match="10 samples, too few for 11"):
        make(Finite(), world=11).val_dataloader()


def test_held_out_split_is_second_where_there_is_one():
    """Guards against a held-out figure reported under another name."""
    data = make(charts(), test_samples=4)
    assert data.test_splits == ("test", "heldout")
    first = [next(iter(loader)).name for loader in data.test_dataloader()]
    assert first == ["test samples 0..3", "heldout samples 0..3"]
    assert make(Finite()).test_splits == ("test",)


def test_questions_are_capped_anew_in_each_pass():
    """Guards against questions that no epoch ever asks."""
    data = make(Finite(questions=6), questions_per_sample=2, batch_size=POOL)
    passes = list(islice(data.train_dataloader(), 2))
    asked = [len(batch.kinds) for batch in passes]
    assert asked == [2 * POOL, 2 * POOL]
    assert sorted(passes[0].tokens.flatten().tolist()) != sorted(
        passes[1].tokens.flatten().tolist()
    )


def test_limits_bound_endless_splits_alone():
    """Guards against controls and predictions that pass over the rest of a finite split."""
    data = make(Finite(), test_samples=3)
    assert data.size("test") == POOL
    assert make(charts(), test_samples=3).size("test") == 3


def test_question_types_take_turns_under_a_cap():
    """Guards against a seldom asked type that the cap drowns."""
    data = make(charts(questions_per_image=8), questions_per_sample=2, batch_size=40)
    batch = next(iter(data.train_dataloader()))
    two = [batch.kinds[i : i + 2] for i in range(0, len(batch.kinds), 2)]
    assert all(len(set(pair)) == 2 for pair in two)
    assert {kind for pair in two for kind in pair} == {"value", "extremum", "count"}


def test_question_types_start_when_they_are_told_to():
    """Guards against a type that leaks in early, or a late one that evaluation leaves out."""
    data = make(charts(questions_per_image=8), starts={"value": 8, "extremum": 16, "count": 0})
    kinds = [set(batch.kinds) for batch in islice(data.train_dataloader(), 6)]
    assert kinds[:2] == [{"count"}, {"count"}]
    assert kinds[2] | kinds[3] == {"count", "value"}
    assert kinds[4] | kinds[5] == {"count", "value", "extremum"}
    assert set(next(iter(data.val_dataloader()[0])).kinds) == {"count", "value", "extremum"}
    late = make(charts(questions_per_image=8), starts=dict.fromkeys(kinds[4] | kinds[5], 8))
    with pytest.raises(UserError, match=r"train samples 0\.\.3: no question is asked so early"):
        next(iter(late.train_dataloader()))


def test_without_an_end_or_an_encoder():
    """Guards against a run that never stops, and an obscure error in a notebook."""
    data = make(charts())
    data.setup("fit")
    data.trainer.max_steps = -1
    with pytest.raises(UserError, match=r"set trainer\.max_steps"):
        data.setup("fit")
    data.trainer.limit_train_batches = 10
    data.setup("fit")
    data.prompts = None
    with pytest.raises(UserError, match=r"data\.prompts"):
        next(iter(data.train_dataloader()))
