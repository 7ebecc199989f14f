"""The file of an ablation, checked, and the ladder of runs that it becomes.

    question: Does early fusion beat a cross-attention adapter?
    base: base.yaml                     # a configuration of `sandbox fit`, relative to the file
    baseline: early                     # an arm
    seeds: [0, 1, 2]
    budget: {match: flops, amount: 2e13}
    set: {data.init_args.task.init_args.seed: "{seed}"}      # of the base, in every arm
    arms:                               # each with what it varies, and nothing else
      early: {}
      cross-attention:
        set: {model.init_args.fusion: {class_path: fusion.cross_attention.CrossAttention}}

``set`` and ``from`` are those of ``sandbox stages`` (see ``sandbox.stages.plan``), and so are
``stages``: trainings that arms start from, done before and outside the budget. ``budget`` gives
every arm the steps that use it up: ``flops``, ``tokens`` (padding does not count) or ``samples``,
each of a whole run; ``wall``, its seconds on this machine; or ``params_active``, which leaves the
steps as they are and refuses arms of another size. ``metrics``, the first of which decides:
``accuracy`` or ``heldout`` (combinations that training never showed), or either of one question
type, as in ``accuracy/value``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sandbox.errors import UserError
from sandbox.stages.checks import fields, known, named, read_yaml, seed_list
from sandbox.stages.plan import NAME, Ladder, Stage, existing, read_stage, varied

Match = Literal["flops", "tokens", "samples", "params_active", "wall"]

REQUIRED = {
    "question": str,
    "base": str,
    "baseline": str,
    "seeds": list,
    "budget": dict,
    "arms": dict,
}
KEYS = REQUIRED | {"metrics": list, "stages": dict, "set": dict, "from": dict}
PLAN = "plan.json"  # what came of the file, in the sweep's directory
VALIDATIONS = 10  # of a run, at the same shares of every arm's budget


@dataclass(frozen=True)
class Budget:
    """What every arm may use: so much (``amount``) of what is named (``match``)."""

    match: Match
    amount: float


@dataclass(frozen=True)
class Ablation:
    """What the file says.

    Attributes:
        file: it.
        question: a sentence.
        baseline: the arm that the others are compared with.
        seeds: of every arm.
        budget: of every arm and seed.
        metrics: what is compared; the first decides.
        stages: trainings that arms start from, by name.
        arms: by name, the training of an arm: the base, what all arms set, and what it varies.
        base: the training of an arm that varies nothing.
    """

    file: Path
    question: str
    baseline: str
    seeds: tuple[int, ...]
    budget: Budget
    metrics: tuple[str, ...]
    stages: Mapping[str, Stage]
    arms: Mapping[str, Stage]
    base: Stage

    @classmethod
    def read(cls, file: Path) -> "Ablation":
        """Read and check a file; what is inside a configuration, only `sandbox fit` knows.

        Raises:
            UserError: it is missing or no YAML, a key or a name is unknown, a value is of the wrong
                type, or a configuration does not exist.
        """
        found = fields(str(file), read_yaml(file), KEYS, required=REQUIRED)
        stages = {
            name: read_stage(f"{file}: stages.{name}", file.parent, value)
            for name, value in named(f"{file}: stages", found.get("stages", {}), NAME, empty=True)
        }
        base = Stage(
            existing(f"{file}: base", file.parent, found["base"]), *varied(str(file), found)
        )
        arms = {
            name: _arm(f"{file}: arms.{name}", base, value)
            for name, value in named(f"{file}: arms", found["arms"], r"\w[\w ,.+-]*(?<!-test)")
        }
        ablation = cls(
            file,
            found["question"],
            found["baseline"],
            seed_list(f"{file}: seeds", found["seeds"]),
            _budget(f"{file}: budget", found["budget"]),
            _metrics(f"{file}: metrics", found.get("metrics", ["accuracy"])),
            stages,
            arms,
            base,
        )
        if doubled := {slug(name) for name in arms} & stages.keys():
            raise UserError(f"{file}: '{min(doubled)}' is both an arm and a stage: rename one")
        if len({slug(name) for name in arms}) < len(arms):
            raise UserError(f"{file}: arms: two names would share a directory: rename one")
        ablation.ladder().check()
        return ablation

    def choose(
        self, seeds: Sequence[int] | None = None, arms: Sequence[str] | None = None
    ) -> "Ablation":
        """The ablation with some of its seeds and arms only; None = all.

        Raises:
            UserError: the file has no such seed or arm, or the baseline is left out.
        """
        chosen = self.ladder().choose(seeds, arms)
        if self.baseline not in chosen.arms:
            raise UserError(f"--arms leaves out the baseline '{self.baseline}' of {self.file}")
        return replace(
            self, seeds=chosen.seeds, arms={name: self.arms[name] for name in chosen.arms}
        )

    def ladder(self, steps: Mapping[str, int] | None = None) -> Ladder:
        """All runs as a ladder: an arm is its last stage, of as many ``steps`` as it is given."""
        stages = dict(self.stages)
        for name, arm in self.arms.items():
            stages[slug(name)] = arm if steps is None else _of_length(arm, steps[name])
        arms = {name: slug(name) for name in self.arms}
        return Ladder(
            self.file, self.question, self.baseline, self.seeds, self.seeds[0], stages, arms
        )


def slug(arm: str) -> str:
    """The name of an arm's directories."""
    return re.sub(r"[ ,.+]+", "-", arm).strip("-")


def changes(base: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two configurations differ: by dotted key, the value of each; None where one has none.

    >>> changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None})
    {'a.c': (2, 3)}
    """
    here, there = dict(_leaves(base)), dict(_leaves(arm))
    keys = [key for key in (*here, *there) if here.get(key) != there.get(key)]
    return {key: (here.get(key), there.get(key)) for key in dict.fromkeys(keys)}


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(path, value)]
    return [
        leaf
        for key, below in value.items()
        for leaf in _leaves(below, f"{path}.{key}" if path else str(key))
    ]


def _of_length(arm: Stage, steps: int) -> Stage:
    """The training cut to ``steps``, and validated at the same shares of them as any other."""
    length = {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": max(1, steps // VALIDATIONS),
        "trainer.check_val_every_n_epoch": None,
    }
    return replace(arm, settings={**arm.settings, **length})


def _arm(where: str, base: Stage, value: Any) -> Stage:
    found = fields(where, {} if value is None else value, {"set": dict, "from": dict}, required=())
    settings, sources = varied(where, found)
    kept = {key: source for key, source in base.sources.items() if key not in settings}
    return Stage(base.config, {**base.settings, **settings}, {**kept, **sources})


def _budget(where: str, value: dict[str, Any]) -> Budget:
    kinds = {"match": str, "amount": object}
    found = fields(where, value, kinds, required=kinds)
    known(f"{where}.match", found["match"], get_args(Match), "budget")
    try:  # YAML takes 2e13 for a text: it wants a point and a sign, 2.0e+13
        amount = float(found["amount"])
    except (TypeError, ValueError):
        amount = 0.0
    if isinstance(found["amount"], bool) or not 0 < amount < float("inf"):
        raise UserError(f"{where}.amount: must be a number above 0, got {found['amount']!r}")
    return Budget(found["match"], amount)


def _metrics(where: str, value: list[Any]) -> tuple[str, ...]:
    if not value:
        raise UserError(f"{where}: there is none")
    for name in value:
        if not re.fullmatch(r"(accuracy|heldout)(/\w+)?", str(name)):
            raise UserError(
                f"{where}: unknown metric {name!r}; there are accuracy and heldout, and each of "
                "one question type, as in accuracy/value"
            )
    return tuple(value)
