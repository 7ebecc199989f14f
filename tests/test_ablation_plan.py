"""The file of an ablation: what is refused before anything runs, and which runs it becomes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.ablation.plan import Ablation, changes, slug
from sandbox.errors import UserError
from sandbox.stages.plan import plan

Write = Callable[[Any], Path]


def content(**others: Any) -> dict[str, Any]:
    """An ablation of two arms, one of which starts from a stage."""
    return {
        "question": "Which?",
        "base": "base.yaml",
        "baseline": "plain",
        "seeds": [3, 5],
        "budget": {"match": "flops", "amount": 1e9},
        "set": {"data.seed": "{seed}", "model.width": 8},
        "stages": {"text": {"config": "text.yaml", "once": True}},
        "from": {"model.language": "text"},
        "arms": {
            "plain": {},
            "wide, cold": {"set": {"model.width": 16, "model.language": None}},
            "eye": {"from": {"model.eye": "text"}},
        },
    } | others


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the file and the configurations that it names."""

    def to_file(found: Any) -> Path:
        for name in ("base.yaml", "text.yaml"):
            (tmp_path / name).write_text("{}")
        path = tmp_path / "which.yaml"
        path.write_text(found if isinstance(found, str) else yaml.safe_dump(found, sort_keys=False))
        return path

    return to_file


def test_arms_become_runs(write: Write) -> None:
    """An arm that loses what all arms set, or keeps what it takes back, is another experiment."""
    ablation = Ablation.read(write(content()))
    ladder = ablation.ladder({"plain": 40, "wide, cold": 7, "eye": 9})
    jobs = {job.name: job for job in plan(ladder, Path("OUT"))}
    assert list(jobs) == [
        "seed-3/text",
        "seed-3/plain", "seed-3/plain-test", "seed-3/wide-cold", "seed-3/wide-cold-test",
        "seed-3/eye", "seed-3/eye-test",
        "seed-5/plain", "seed-5/plain-test", "seed-5/wide-cold", "seed-5/wide-cold-test",
        "seed-5/eye", "seed-5/eye-test",
    ]  # fmt: skip
    base = ("--config", str(ablation.file.parent / "base.yaml"), "--seed_everything=5")
    assert jobs["seed-5/plain"].options == (
        *base, "--data.seed=5", "--model.width=8",
        "--trainer.max_steps=40", "--trainer.val_check_interval=4",
        "--trainer.check_val_every_n_epoch=null", "--model.language=OUT/seed-3/text",
    )  # fmt: skip
    assert jobs["seed-5/wide-cold"].options == (
        *base, "--data.seed=5", "--model.width=16", "--model.language=null",
        "--trainer.max_steps=7", "--trainer.val_check_interval=1",
        "--trainer.check_val_every_n_epoch=null",
    )  # fmt: skip
    links = ("--model.language=OUT/seed-3/text", "--model.eye=OUT/seed-3/text")
    assert jobs["seed-5/eye"].options[-2:] == links
    assert jobs["seed-5/wide-cold"].needs == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"questoin": "Why?"}, "unknown key 'questoin'; did you mean 'question'"),
        ({"seeds": [0, 0]}, "seeds: must be different whole numbers"),
        ({"baseline": "plane"}, "baseline: unknown arm 'plane'; did you mean 'plain'"),
        ({"base": "bass.yaml"}, r"base: .*bass.yaml: no such file"),
        ({"budget": {"match": "flop", "amount": 1}}, "unknown budget 'flop'; did you mean 'flops'"),
        ({"budget": {"match": "flops"}}, "budget: 'amount' is missing"),
        ({"budget": {"match": "wall", "amount": -3}}, "must be a number above 0, got -3"),
        ({"budget": {"match": "wall", "amount": "much"}}, "must be a number above 0, got 'much'"),
        ({"budget": {"match": "wall", "amount": True}}, "must be a number above 0, got True"),
        ({"metrics": ["acuracy"]}, "metrics: unknown metric 'acuracy'; there are accuracy"),
        ({"metrics": []}, "metrics: there is none"),
        ({"arms": {}}, "arms: there is none"),
        ({"arms": {"plain": {"sett": {}}}}, "arms.plain: unknown key 'sett'; did you mean 'set'"),
        ({"arms": {"plain": {"set": {"out": "x"}}}}, "'out' is not for a stage to set"),
        ({"arms": {"plain": {"from": {"a.b": "txt"}}}}, "unknown stage 'txt'; did you mean 'text'"),
        ({"arms": {"plain": {}, "a b": {}, "a-b": {}}}, "two names would share a directory"),
        ({"arms": {"plain": {}, "text": {}}}, "'text' is both an arm and a stage"),
        ({"arms": {"plain": {}, "../up": {}}}, "is no name that can be used here"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(
    write: Write, changed: dict[str, Any], message: str
) -> None:
    """A sweep that fails on a typing error after an hour has cost that hour."""
    with pytest.raises(UserError, match=message) as error:
        Ablation.read(write(content(**changed)))
    assert "which.yaml" in str(error.value)


def test_an_amount_may_be_written_as_people_do(write: Write) -> None:
    """YAML takes 2e13 for a text, since it has neither point nor sign."""
    text = yaml.safe_dump(content()).replace("1000000000.0", "2e13")
    assert "2e13" in text
    assert Ablation.read(write(text)).budget.amount == 2e13


def test_what_an_arm_changes() -> None:
    """A report whose list of changes lacks one claims that something else made the difference."""
    base = {"a": {"b": 1, "c": [1, 2], "gone": {"x": 1}}, "same": {}, "nothing": None}
    arm = {"a": {"b": 1, "c": [1, 3], "new": None}, "same": {}, "kind": {"y": 0}}
    assert changes(base, arm) == {
        "a.c": ([1, 2], [1, 3]),
        "a.gone.x": (1, None),
        "kind.y": (None, 0),
    }
    assert changes(base, base) == {}


def test_directories_of_arms_have_plain_names() -> None:
    """A space in a path breaks the commands that a report tells to repeat."""
    assert slug("dense, as active") == "dense-as-active"
    assert slug("4 experts + shared") == "4-experts-shared"
