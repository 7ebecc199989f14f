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

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sandbox.errors import UserError
from sandbox.runs import CONFIG

TEST = "-test"  # behind a run's name: the run that tests it
LADDER_KEYS = {"question": str, "baseline": str, "seeds": list, "stages": dict, "arms": dict}
STAGE_KEYS = {"config": str, "set": dict, "from": dict, "once": bool}
TAKEN = ("seed_everything", "config", "ckpt_path", "out", "name", "resume")
IN_WORDS = {str: "a text", list: "a list", dict: "a mapping", bool: "true or false"}


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
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not valid YAML: {error}") from None
        found = _fields(str(file), content, LADDER_KEYS, required=LADDER_KEYS)
        stages = {
            name: _stage(f"{file}: stages.{name}", file.parent, value)
            for name, value in _named(f"{file}: stages", found["stages"], r"\w[\w-]*(?<!-test)")
        }
        arms = dict(_named(f"{file}: arms", found["arms"], r"[^,]+"))
        seeds = _seeds(f"{file}: seeds", found["seeds"])
        ladder = cls(file, found["question"], found["baseline"], seeds, seeds[0], stages, arms)
        ladder._check()
        return ladder

    def choose(
        self, seeds: Sequence[int] | None = None, arms: Sequence[str] | None = None
    ) -> "Ladder":
        """The ladder with some of its seeds and arms only; None = all.

        Raises:
            UserError: the file has no such seed or arm.
        """
        for arm in arms or ():
            _known(f"--arms, {self.file}", arm, self.arms, "arm")
        for seed in seeds or ():
            _known(f"--seeds, {self.file}", str(seed), [str(s) for s in self.seeds], "seed")
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

    def _check(self) -> None:
        """Names lead somewhere, and no stage waits for itself."""
        for name, stage in self.stages.items():
            for key, source in stage.sources.items():
                where = f"{self.file}: stages.{name}.from.{key}"
                if not isinstance(source, str):
                    raise UserError(f"{where}: must be the name of a stage, got {source!r}")
                _known(where, source, self.stages, "stage")
        for name in self.stages:
            self._walk(name, ())
        for arm, tested in self.arms.items():
            where = f"{self.file}: arms.{arm}"
            if not isinstance(tested, str):
                raise UserError(f"{where}: must be the name of a stage, got {tested!r}")
            _known(where, tested, self.stages, "stage")
            if self.stages[tested].once and len(self.seeds) > 1:
                raise UserError(
                    f"{where}: '{tested}' runs once, so its {len(self.seeds)} seeds would be one "
                    "result copied; take `once` away"
                )
        _known(f"{self.file}: baseline", self.baseline, self.arms, "arm")

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
    command = ("fit", "--config", str(stage.config), "--out", str(out / run), *flags)
    linked = [f"--{key}={out / need}" for key, need in needs.items()]
    fingerprint = _hash(stage.config.read_text(encoding="utf-8"), flags, needs)
    return Job(run, (*command, *linked), tuple(dict.fromkeys(needs.values())), fingerprint)


def _test(trained: Job, out: Path) -> Job:
    run, name = out / trained.name, trained.name + TEST
    config = ("--config", str(run / CONFIG))
    argv = ("test", *config, "--ckpt_path", str(run), "--out", str(out / name))
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


# --- Checks ---------------------------------------------------------------------------------------


def _stage(where: str, folder: Path, value: Any) -> Stage:
    found = _fields(where, value, STAGE_KEYS, required=("config",))
    settings, sources = found.get("set", {}), found.get("from", {})
    for part, keys in (("set", settings), ("from", sources)):
        for key, _ in _named(f"{where}.{part}", keys, r"\w[\w.+-]*", empty=True):
            if key in TAKEN:
                raise UserError(f"{where}.{part}: '{key}' is not for a stage to set")
    if both := settings.keys() & sources.keys():
        raise UserError(f"{where}: '{min(both)}' stands under both `set` and `from`")
    try:
        json.dumps(settings)
    except TypeError as error:  # such as a date, which no option takes
        raise UserError(f"{where}.set: a value that is no plain one: {error}") from None
    config = folder / found["config"]
    if not config.is_file():
        raise UserError(f"{where}.config: {config}: no such file")
    return Stage(config, settings, sources, found.get("once", False))


def _fields(
    where: str, value: Any, kinds: Mapping[str, type], required: Iterable[str]
) -> dict[str, Any]:
    """A mapping with known keys, each of its type."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a mapping of {', '.join(kinds)}")
    for key, content in value.items():
        _known(where, str(key), kinds, "key")
        if not isinstance(content, kinds[key]):
            raise UserError(f"{where}: '{key}' must be {IN_WORDS[kinds[key]]}, got {content!r}")
    if missing := [key for key in required if key not in value]:
        raise UserError(f"{where}: '{missing[0]}' is missing")
    return value


def _named(
    where: str, value: Mapping[Any, Any], pattern: str, *, empty: bool = False
) -> list[tuple[str, Any]]:
    """The entries of a mapping whose keys are names."""
    if not value and not empty:
        raise UserError(f"{where}: there is none")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(pattern, name):
            raise UserError(f"{where}: {name!r} is no name that can be used here")
    return list(value.items())


def _seeds(where: str, value: list[Any]) -> tuple[int, ...]:
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in value)
    if not value or not whole or min(value) < 0 or len(set(value)) < len(value):
        raise UserError(f"{where}: must be different whole numbers from 0 on, got {value!r}")
    return tuple(value)


def _known(where: str, name: str, valid: Collection[str], what: str) -> None:
    """Raises: UserError: the name is none of the valid ones; it tells the nearest."""
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(valid)}"
        raise UserError(f"{where}: unknown {what} '{name}'; {hint}")
