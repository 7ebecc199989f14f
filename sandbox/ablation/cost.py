"""What a step of an arm costs, counted before any arm runs, and the steps that a budget pays."""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import yaml
from lightning import Trainer

from sandbox.ablation.plan import Budget
from sandbox.data.batch import Batch
from sandbox.errors import UserError
from sandbox.lightning_cli import SandboxCLI
from sandbox.meta import without_memory
from sandbox.params import parameter_counts
from sandbox.train.flops import step_flops

BATCHES = 8  # that a cost is the mean of: they differ by their longest row
ALIKE = 0.05  # how far active parameters may lie from the number that they should match


@dataclass(frozen=True)
class Cost:
    """Of one step on all processes; parameters of the whole model.

    Attributes:
        flops: forward and backward pass (see ``step_flops``).
        tokens: that the decoder reads, without padding.
        samples: of the task, such as a picture with its questions.
        params_total, params_active, params_trained: all of them; those that a token visits; those
            that are not frozen.
        varies: whether a curriculum changes what a step reads while training.
    """

    flops: float
    tokens: float
    samples: int
    params_total: int
    params_active: int
    params_trained: int
    varies: bool = False


def resolve(argv: Sequence[str]) -> dict[str, Any]:
    """The whole configuration of a `sandbox fit` with these arguments, as plain values.

    Raises:
        UserError: what `sandbox fit` would say of it.
    """
    with _told():
        cli = _Unrun(argv, build=False)
        text = cli._parser("fit").dump(cli.config["fit"], skip_unset=False)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def measure(argv: Sequence[str]) -> Cost:
    """What a step of a `sandbox fit` with these arguments costs, by its first training batches.

    Raises:
        UserError: what `sandbox fit` would say of it.
    """
    with _told():
        cli = _Unrun(argv, build=True)
    trainer, objective, data = cli.trainer, cli.model, cli.datamodule
    batches = trainer.world_size * trainer.accumulate_grad_batches
    trainer.strategy.connect(objective)
    data.trainer = trainer
    data.setup("fit")
    first = list(islice(data.train_dataloader(), BATCHES))
    counts = parameter_counts(objective.model)
    return Cost(
        flops=batches * fmean(step_flops(objective, batch) for batch in first),
        tokens=batches * fmean(map(_tokens, first)),
        samples=batches * data.batch_size,
        varies=getattr(data, "curriculum", None) is not None,
        **{f"params_{name}": number for name, number in counts.items()},
    )


def solve(budget: Budget, cost: Cost, pace: float | None, given: int) -> int:
    """The steps that the budget pays an arm, rounded to the nearest.

    Args:
        budget: of a run.
        cost: of a step of the arm.
        pace: seconds a step, where the clock is matched.
        given: the steps that its configuration has, which stay where parameters are matched.

    Raises:
        UserError: the budget does not pay for a step, the arm is of another size, or its steps
            have no fixed cost.
    """
    if cost.varies and budget.match in ("flops", "tokens"):
        raise UserError(
            f"data.curriculum changes how many {budget.match} a step takes, when is not known "
            "before training: set it to null, or match samples or wall"
        )
    if budget.match == "params_active":
        if abs(cost.params_active / budget.amount - 1) > ALIKE:
            raise UserError(
                f"{cost.params_active:,} active parameters, where the budget says "
                f"{budget.amount:,.0f} (within {ALIKE:.0%}): change its sizes, or the budget"
            )
        if given < 1:
            raise UserError("a budget of params_active needs the steps in trainer.max_steps")
        return given
    each = pace if budget.match == "wall" else getattr(cost, budget.match)
    if not each:
        raise UserError(f"its steps take no {budget.match}, so nothing can be matched")
    steps = round(budget.amount / each)
    if steps < 1:
        raise UserError(
            f"a step takes {each:.3g} {budget.match}, more than the budget of {budget.amount:.3g}"
        )
    return steps


def _tokens(batch: Any) -> int:
    if not isinstance(batch, Batch):
        return 0  # a decoder does not read pairs for contrastive training
    return batch.real_tokens


class _Unrun(SandboxCLI):
    """Parses and, if wanted, builds; trains nothing and writes nothing."""

    def __init__(self, argv: Sequence[str], *, build: bool) -> None:
        self.build = build
        super().__init__("fit", argv)

    def _set_seed(self) -> None:
        """What is counted does not hang on random weights, and a caller's draws are its own."""

    def instantiate_classes(self) -> None:
        """Build model and data, or nothing; weights without memory where the model allows it."""
        if not self.build:
            return
        try:
            with without_memory():
                super().instantiate_classes()
        except RuntimeError:  # a part computes with its tensors at once
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer of as many processes, which leaves no directory behind."""
        given = self._get(self.config_init, "trainer")
        names = ("accelerator", "devices", "num_nodes", "accumulate_grad_batches")
        chosen = {name: given[name] for name in names}
        return Trainer(**chosen, max_steps=1, logger=False, enable_checkpointing=False)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the parser prints before it exits becomes an error that can be told with its place.

    What Lightning says of the machine's devices is for those who train on them.
    """
    said, talker = io.StringIO(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = talker.level
    talker.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        raise UserError(said.getvalue().strip().removeprefix("error: ")) from None
    finally:
        talker.setLevel(level)
