"""The file of a ladder, checked, and every run that it takes, as a command.

    question: Does alignment beat contrastive training alone?
    baseline: contrastive only          # an arm
    seeds: [0, 1, 2]
    stages:                             # a name, a `sandbox fit` configuration, and what varies
      contrastive: {config: contrastive.yaml, set: {data.init_args.seed: "{seed}"}}
      aligned: {config: align.yaml, from: {model.init_args.init_from.encoder: contrastive}}
    arms:                               # a name, and the stage that is tested
      contrastive only: contrastive
      contrastive, then aligned: aligned

``config`` is relative to the file; ``set`` gives dotted keys of it, "{seed}" in a text standing for
the seed; ``from`` puts the run directory of another stage of the same seed at a dotted key. A stage
with ``once: true`` runs with the first seed alone, and all seeds share it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox.errors import UserError
from sandbox.runs import CONFIG
from sandbox.stages.checks import fields, known, named, read_yaml, seed_list

TEST = "-test"  # behind a run's name: the run that tests it
LADDER_KEYS = {"question": str, "baseline": str, "seeds": list, "stages": dict, "arms": dict}
STAGE_KEYS = {"config": str, "set": dict, "from": dict, "once": bool}
TAKEN = ("seed_everything", "config", "ckpt_path", "out", "name", "resume")
NAME = r"\w[\w-]*(?<!-test)"  # of a stage, and so of its runs' directories


@dataclass(frozen=True)
class Stage:
    """An ordinary training, and what a ladder varies of it.

    Attributes:
        config: a configuration of ``sandbox fit``.
        settings: values by dotted key of that configuration.
        sources: by dotted key, the stage whose run directory is put there.
        once: trained with the first seed alone.
    """

    config: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True)
class Job:
    """One run: a stage trained with one seed, or its test.

    Attributes:
        name: where it stands below the output directory, such as ``seed-0/aligned``.
        argv: what stands behind ``sandbox``.
        needs: the jobs that have to be finished before.
        fingerprint: a hash of its command and of its configuration's text, wherever they lie.
    """

    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...]
    fingerprint: str

    @property
    def options(self) -> tuple[str, ...]:
        """Its configuration: what is said behind the command and its ``--out DIR``."""
        return self.argv[3:]


@dataclass(frozen=True)
class Ladder:
    """What the file says. ``shared`` is the seed of the stages that run once."""

    file: Path
    question: str
    baseline: str
    seeds: tuple[int, ...]
    shared: int
    stages: Mapping[str, Stage]
    arms: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> "Ladder":
        """Read and check a file.

        Raises:
            UserError: it is missing or no YAML, a key or a name is unknown, a value is of the wrong
                type, stages stand in a circle, or a configuration does not exist.
        """
        content = read_yaml(file)
        found = fields(str(file), content, LADDER_KEYS, required=LADDER_KEYS)
        stages = {
            name: read_stage(f"{file}: stages.{name}", file.parent, value)
            for name, value in named(f"{file}: stages", found["stages"], NAME)
        }
        arms = dict(named(f"{file}: arms", found["arms"], r"[^,]+"))
        seeds = seed_list(f"{file}: seeds", found["seeds"])
        ladder = cls(file, found["question"], found["baseline"], seeds, seeds[0], stages, arms)
        ladder.check()
        return ladder

    def choose(
        self, seeds: Sequence[int] | None = None, arms: Sequence[str] | None = None
    ) -> "Ladder":
        """The ladder with some of its seeds and arms only; None = all.

        Raises:
            UserError: the file has no such seed or arm.
        """
        for arm in arms or ():
            known(f"--arms, {self.file}", arm, self.arms, "arm")
        for seed in seeds or ():
            known(f"--seeds, {self.file}", str(seed), [str(s) for s in self.seeds], "seed")
        chosen = self.seeds if seeds is None else tuple(s for s in self.seeds if s in seeds)
        kept = {n: stage for n, stage in self.arms.items() if arms is None or n in arms}
        return replace(self, seeds=chosen, arms=kept)

    def lineage(self, stage: str, seed: int) -> list[tuple[str, int]]:
        """The stage and all that it builds on, as (stage, seed), each behind its sources."""
        if self.stages[stage].once:
            seed = self.shared
        found: list[tuple[str, int]] = []
        for source in self.stages[stage].sources.values():
            found += [node for node in self.lineage(source, seed) if node not in found]
        return [*found, (stage, seed)]

    def run_name(self, stage: str, seed: int) -> str:
        """The name of a stage's run."""
        return f"seed-{self.shared if self.stages[stage].once else seed}/{stage}"

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            UserError: a name leads nowhere, or a stage waits for itself.
        """
        for name, stage in self.stages.items():
            for key, source in stage.sources.items():
                where = f"{self.file}: stages.{name}.from.{key}"
                if not isinstance(source, str):
                    raise UserError(f"{where}: must be the name of a stage, got {source!r}")
                known(where, source, self.stages, "stage")
        for name in self.stages:
            self._walk(name, ())
        for arm, tested in self.arms.items():
            where = f"{self.file}: arms.{arm}"
            if not isinstance(tested, str):
                raise UserError(f"{where}: must be the name of a stage, got {tested!r}")
            known(where, tested, self.stages, "stage")
            if self.stages[tested].once and len(self.seeds) > 1:
                raise UserError(
                    f"{where}: '{tested}' runs once, so its {len(self.seeds)} seeds would be one "
                    "result copied; take `once` away"
                )
        known(f"{self.file}: baseline", self.baseline, self.arms, "arm")

    def _walk(self, stage: str, trail: tuple[str, ...]) -> None:
        if stage in trail:
            circle = " -> ".join((*trail[trail.index(stage) :], stage))
            raise UserError(f"{self.file}: stages.{stage}.from: a circle: {circle}")
        for source in self.stages[stage].sources.values():
            self._walk(source, (*trail, stage))


def plan(ladder: Ladder, out: Path) -> list[Job]:
    """The runs that the ladder's arms take, each behind those it needs, seed after seed."""
    jobs: dict[str, Job] = {}
    for seed in ladder.seeds:
        for tested in ladder.arms.values():
            for stage, its_seed in ladder.lineage(tested, seed):
                job = _fit(ladder, stage, its_seed, out)
                jobs.setdefault(job.name, job)
            test = _test(jobs[ladder.run_name(tested, seed)], out)
            jobs.setdefault(test.name, test)
    return list(jobs.values())


def _fit(ladder: Ladder, name: str, seed: int, out: Path) -> Job:
    stage = ladder.stages[name]
    settings = {"seed_everything": seed, **stage.settings}
    flags = [f"--{key}={_text(value, seed)}" for key, value in settings.items()]
    needs = {key: ladder.run_name(source, seed) for key, source in stage.sources.items()}
    run = ladder.run_name(name, seed)
    command = ("fit", "--out", str(out / run), "--config", str(stage.config), *flags)
    linked = [f"--{key}={out / need}" for key, need in needs.items()]
    fingerprint = _hash(stage.config.read_text(encoding="utf-8"), flags, needs)
    return Job(run, (*command, *linked), tuple(dict.fromkeys(needs.values())), fingerprint)


def _test(trained: Job, out: Path) -> Job:
    run, name = out / trained.name, trained.name + TEST
    config = ("--config", str(run / CONFIG))
    argv = ("test", "--out", str(out / name), *config, "--ckpt_path", str(run))
    return Job(name, argv, (trained.name,), _hash("test", trained.fingerprint))


def _text(value: Any, seed: int) -> str:
    """A value for the command line: texts as they are, all others as JSON."""
    value = _seeded(value, seed)
    return value if isinstance(value, str) else json.dumps(value)


def _seeded(value: Any, seed: int) -> Any:
    if isinstance(value, str):
        return value.replace("{seed}", str(seed))
    if isinstance(value, list):
        return [_seeded(part, seed) for part in value]
    if isinstance(value, dict):
        return {key: _seeded(part, seed) for key, part in value.items()}
    return value


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_stage(where: str, folder: Path, value: Any) -> Stage:
    """A stage of a file, ``value``, whose configuration lies below ``folder``.

    Raises:
        UserError: a key is unknown or of the wrong type, or its configuration does not exist.
    """
    found = fields(where, value, STAGE_KEYS, required=("config",))
    settings, sources = varied(where, found)
    return Stage(
        existing(f"{where}.config", folder, found["config"]),
        settings,
        sources,
        found.get("once", False),
    )


def varied(where: str, found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What stands under ``set`` and ``from``.

    Raises:
        UserError: a key is no option's, belongs to the command itself, or stands under both.
    """
    settings, sources = found.get("set", {}), found.get("from", {})
    for part, keys in (("set", settings), ("from", sources)):
        for key, _ in named(f"{where}.{part}", keys, r"\w[\w.+-]*", empty=True):
            if key in TAKEN:
                raise UserError(f"{where}.{part}: '{key}' is not for a stage to set")
    if both := settings.keys() & sources.keys():
        raise UserError(f"{where}: '{min(both)}' stands under both `set` and `from`")
    try:
        json.dumps(settings)
    except TypeError as error:  # such as a date, which no option takes
        raise UserError(f"{where}.set: a value that is no plain one: {error}") from None
    return settings, sources


def existing(where: str, folder: Path, name: str) -> Path:
    """The configuration of that name below ``folder``.

    Raises:
        UserError: there is none.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file")
    return path
