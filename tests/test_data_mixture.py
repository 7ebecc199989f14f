"""Several tasks as one: whose turn it is, what a pass shows, and what is refused."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from sandbox.data.mixture import Mixture
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

ROOT = Path(__file__).parents[1]


class Named(Task):
    """Samples that say which they are; of ``train`` so many, or without end."""

    def __init__(self, name: str, train: int | None = None) -> None:
        self.name = name
        self.train = train

    def size(self, split: Split) -> int | None:
        return self.train if split == "train" else {"val": 3, "test": 5, "heldout": 0}[split]

    def sample(self, split: Split, index: int) -> Sample:
        image = PILImage.new("RGB", (8, 8))
        return Sample((image,), self.questions_of(split, index), f"{self.name} {split} {index}")

    def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
        size = self.size(split)
        if not 0 <= index < (1_000_000 if size is None else size):
            raise IndexError(f"{self.name} has no {index}")
        return (Question(f"{self.name} {split} {index}?", "yes", self.name),)

    def identity(self) -> str:
        return f"{self.name} {self.train}"


def mixture(weights: dict[str, float], sizes: dict[str, int | None], **more: Any) -> Mixture:
    tasks: dict[str, Task] = {name: Named(name, size) for name, size in sizes.items()}
    return Mixture(tasks, weights, **{"evaluate_on": next(iter(sizes)), **more})


def drawn(task: Mixture, count: int) -> list[tuple[str, int]]:
    """Of the first training samples, the name of each one's task and its index there."""
    told = [task.sample("train", index).content.split() for index in range(count)]
    return [(name, int(index)) for name, _, index in told]


def test_the_documented_example() -> None:
    """Guards against a task without end that skips samples of its own, or repeats them."""
    found = drawn(mixture({"a": 3, "b": 1}, {"a": None, "b": None}), 8)
    expected = "a0 a1 b0 a2 a3 a4 b1 a5"
    assert " ".join(f"{name}{index}" for name, index in found) == expected


@pytest.mark.parametrize(
    "weights", [{"a": 0.7, "b": 0.3}, {"a": 1, "b": 2, "c": 4}, {"a": 0.05, "b": 0.9, "c": 0.05}]
)
def test_every_prefix_keeps_the_proportions(weights: dict[str, float]) -> None:
    """Guards against a mixture by chance or in blocks, whose short runs see other shares."""
    found = drawn(mixture(weights, dict.fromkeys(weights)), 400)
    total = sum(weights.values())
    for length in range(1, 401):
        counts = Counter(name for name, _ in found[:length])
        for name, weight in weights.items():
            assert abs(counts[name] - length * weight / total) < 1, (name, length)


def test_each_pass_over_a_finite_task_shows_all_of_it_in_a_new_order() -> None:
    """Guards against samples left out or shown twice in a pass, as where two passes share a round,
    and against the order of the files, in which neighbours are alike.
    """
    task = mixture({"a": 0.7, "b": 0.3}, {"a": 11, "b": None})
    found = drawn(task, 200)
    shown = [index for name, index in found if name == "a"]
    passes = [shown[start : start + 11] for start in range(0, 132, 11)]
    assert all(sorted(each) == list(range(11)) for each in passes)
    assert len({tuple(each) for each in [*passes, list(range(11))]}) == 13, "orders repeat"
    assert [index for name, index in found if name == "b"] == list(range(60))
    other = mixture({"a": 0.7, "b": 0.3}, {"a": 11, "b": None}, seed=1)
    assert [index for name, index in drawn(other, 15) if name == "a"] != passes[0]


def test_a_sample_depends_on_its_index_alone() -> None:
    """Guards against a resumed run, or a worker's copy, that sees other samples because it did not
    see those before.
    """
    weights, sizes = {"a": 2, "b": 5, "c": 1}, {"a": 7, "b": 4, "c": None}
    whole = drawn(mixture(weights, sizes), 60)
    fresh = pickle.loads(pickle.dumps(mixture(weights, sizes)))
    for index in (59, 3, 41, 0):
        name, place = whole[index]
        assert fresh.sample("train", index).content == f"{name} train {place}"
        assert fresh.questions_of("train", index) == fresh.sample("train", index).questions


def test_the_order_in_a_file_changes_nothing() -> None:
    """Guards against a run that goes on from its saved configuration, which may list the tasks in
    another order, with other samples or another identity.
    """
    one = mixture({"a": 1, "b": 1}, {"a": 5, "b": None}, evaluate_on="b")
    other = mixture({"b": 4, "a": 4}, {"b": None, "a": 5}, evaluate_on="b")
    assert drawn(one, 30) == drawn(other, 30)
    assert one.identity() == other.identity()


def test_evaluation_is_that_of_one_task() -> None:
    """Guards against validation charts of one task scored among those of another."""
    task = mixture({"a": 1, "b": 1}, {"a": None, "b": 9}, evaluate_on="b")
    splits: tuple[Split, ...] = ("train", "val", "test", "heldout")
    assert [task.size(split) for split in splits] == [None, 3, 5, 0]
    assert task.sample("test", 4).content == "b test 4"
    assert task.questions_of("val", 2)[0].text == "b val 2?"
    with pytest.raises(IndexError):
        task.sample("test", 5)
    with pytest.raises(IndexError, match="0 or more, got -1"):
        task.sample("train", -1)


def test_the_identity_changes_with_the_data() -> None:
    """Guards against two runs on other data that claim the same."""
    weights, sizes = {"a": 1, "b": 1}, {"a": None, "b": 9}
    told = {
        mixture(weights, sizes).identity(),
        mixture({"a": 2, "b": 1}, sizes).identity(),
        mixture(weights, {"a": None, "b": 8}).identity(),
        mixture(weights, sizes, evaluate_on="b").identity(),
        mixture(weights, sizes, seed=1).identity(),
    }
    assert len(told) == 5


def test_a_task_without_train_split_is_named() -> None:
    """Guards against a training that fails at its first step, far from the task that is to blame,
    and against one that quietly goes without it. Who wants that says so by a weight of 0.
    """
    sizes = {"real": 0, "made": None}
    with pytest.raises(UserError, match=r"real \(Named\) has no train split"):
        mixture({"real": 0.7, "made": 0.3}, sizes)
    task = mixture({"real": 0, "made": 0.3}, sizes)
    assert {name for name, _ in drawn(task, 20)} == {"made"}
    assert task.sample("val", 0).content == "real val 0"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, "a weight for each, got tasks a, b and weights for a"),
        ({"a": 1, "b": 1, "c": 1}, "a weight for each"),
        ({"a": 1, "b": -0.5}, "the weight of b must be 0 or more, got -0.5"),
        ({"a": 1, "b": float("nan")}, "the weight of b must be 0 or more, got nan"),
        ({"a": 0, "b": 0}, "at least one weight must be above 0"),
        ({"a": 1 / 3, "b": 0.5}, "too fine"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: dict[str, float], message: str) -> None:
    """Guards against a mixture of other proportions than those that were meant."""
    with pytest.raises(UserError, match=message):
        mixture(weights, {"a": None, "b": None})


def test_what_cannot_be_evaluated_on_is_refused() -> None:
    """Guards against a traceback where a name is misspelt, or nothing is mixed."""
    with pytest.raises(UserError, match="did you mean 'charts'"):
        mixture({"charts": 1}, {"charts": None}, evaluate_on="chart")
    with pytest.raises(UserError, match="needs tasks"):
        Mixture({}, {}, "a")


def test_one_value_of_one_task_can_be_given_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against the command in the configuration's header, which has to reach into the
    mixture and leave all else as it is.
    """
    from sandbox.lightning_cli import SandboxCLI

    monkeypatch.setattr(SandboxCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(SandboxCLI, "_run_subcommand", lambda self, subcommand: None)
    path = ROOT / "experiments/chartqa.yaml"
    told = path.read_text().split("sandbox fit --config experiments/chartqa.yaml ")[1]
    flag = told.split()[0]

    def task(*options: str) -> dict[str, Any]:
        parsed = SandboxCLI("fit", ["--config", str(path), *options]).config.fit
        return parsed.data.as_dict()["init_args"]["task"]["init_args"]

    plain, given = task(), task(flag, "elsewhere")
    assert given["tasks"]["chartqa"]["init_args"].pop("root") == "elsewhere"
    del plain["tasks"]["chartqa"]["init_args"]["root"]
    assert given == plain
