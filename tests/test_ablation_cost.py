"""What a step of an arm is said to cost, and the steps that a budget then pays for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.ablation.cost import Cost, measure, resolve, solve
from sandbox.ablation.plan import Budget
from sandbox.errors import UserError

COST = Cost(
    flops=4e6, tokens=50.0, samples=8, params_total=900, params_active=103, params_trained=70
)
CONFIG: dict[str, Any] = {
    "trainer": {"max_steps": 2, "accelerator": "cpu", "accumulate_grad_batches": 3},
    "model": {
        "class_path": "sandbox.train.pretrain.Pretrain",
        "init_args": {
            "encoder": {
                "class_path": "encoders.patches.Patches",
                "init_args": {"tile_size": 32, "patch_size": 8, "width": 32},
            },
            "fusion": {"class_path": "fusion.early.EarlyFusion", "init_args": {"hidden": 16}},
            "backbone": {
                "width": 32, "layers": 2, "heads": 2, "head_dim": 16, "dense_hidden": 32,
                "expert_hidden": 16,
            },
        },
    },
    "data": {
        "class_path": "sandbox.data.module.VQAData",
        "init_args": {
            "task": {"class_path": "sandbox.data.charts.Charts", "init_args": {"size": 32}},
            "batch_size": 2,
        },
    },
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a tiny model."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.mark.parametrize(
    ("match", "amount", "steps"),
    [
        ("flops", 4.1e7, 10),
        ("flops", 4.3e7, 11),
        ("tokens", 1000.0, 20),
        ("samples", 100.0, 12),
        ("wall", 100.0, 40),
        ("params_active", 100.0, 7),
    ],
)
def test_steps_use_the_budget_up(match: Any, amount: float, steps: int) -> None:
    """Arms that are cut off, not rounded, all get less, and the costliest by the largest share."""
    assert solve(Budget(match, amount), COST, pace=2.5, given=7) == steps


@pytest.mark.parametrize(
    ("match", "amount", "given", "message"),
    [
        ("flops", 1e6, 7, r"a step takes 4e\+06 flops, more than the budget of 1e\+06"),
        ("params_active", 110.0, 7, "103 active parameters, where the budget says 110"),
        ("params_active", 100.0, -1, "needs the steps in trainer.max_steps"),
    ],
)
def test_a_budget_that_cannot_be_matched_is_refused(
    match: Any, amount: float, given: int, message: str
) -> None:
    """An arm that quietly got one step, or other parameters, would stand in the table as equal."""
    with pytest.raises(UserError, match=message):
        solve(Budget(match, amount), COST, pace=None, given=given)


def test_an_arm_without_tokens_matches_none() -> None:
    """Contrastive training reads no decoder tokens: a division by zero says nothing."""
    pairs = Cost(1e6, 0, 8, 9, 9, 9)
    with pytest.raises(UserError, match="its steps take no tokens"):
        solve(Budget("tokens", 1000.0), pairs, pace=None, given=7)


def test_a_curriculum_has_no_fixed_cost(config: Path) -> None:
    """Steps of easy samples are cheap: arms that leave them at other times would not be equal."""
    moves = "{field: most_items, values: [2, null]}"
    cost = measure(["--config", str(config), f"--data.init_args.curriculum={moves}"])
    for match in ("flops", "tokens"):
        with pytest.raises(UserError, match=r"^data\.curriculum changes how many"):
            solve(Budget(match, 1e12), cost, pace=None, given=7)
    assert solve(Budget("samples", 60.0), cost, pace=None, given=7) == 10


def test_what_a_step_costs(config: Path, tmp_path: Path) -> None:
    """Gradients that accumulate belong to one step, and frozen parts cost no weight gradients.

    And counting must leave nothing behind: no run directory, no logs.
    """
    before = sorted(tmp_path.rglob("*"))
    cost = measure(["--config", str(config)])
    assert cost.samples == 2 * 3
    assert cost.params_total == cost.params_trained > cost.params_active
    one = measure(["--config", str(config), "--trainer.accumulate_grad_batches=1"])
    assert cost.flops == 3 * one.flops
    assert cost.tokens == 3 * one.tokens
    frozen = measure(["--config", str(config), '--model.init_args.freeze=["backbone"]'])
    assert frozen.flops < 0.9 * cost.flops
    assert frozen.params_trained < cost.params_trained
    assert frozen.params_total == cost.params_total
    assert sorted(tmp_path.rglob("*")) == before


def test_a_configuration_is_resolved_or_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown key of the third arm must be told before the first one has trained for an hour."""
    found = resolve(["--config", str(config), "--model.init_args.backbone.layers=3"])
    backbone = found["model"]["init_args"]["backbone"]
    assert (backbone["layers"], backbone["top_k"]) == (3, 1)  # given, and filled in
    with pytest.raises(UserError, match="unknown key 'layrs'; did you mean 'layers'"):
        resolve(["--config", str(config), "--model.init_args.backbone.layrs=3"])
    assert "layrs" not in capsys.readouterr().err
