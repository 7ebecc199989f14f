"""`sandbox fit | validate | test | predict`: LightningCLI, with run directories and clear errors.

Precedence: command line over YAML files over checkpoint. A checkpoint gives weights and training
state, never configuration.
"""

import argparse
import difflib
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from sandbox.backbone.config import PRESETS, BackboneConfig
from sandbox.checkpoint import load_weights, read_checkpoint
from sandbox.devices import available, slow_bf16_mixed
from sandbox.errors import UserError
from sandbox.evals.controls import PREDICTIONS, Controls
from sandbox.evals.run import evaluate, with_replies, write_predictions
from sandbox.runs import CONFIG, RUNS, find_checkpoint, new_run_dir, resume_point
from sandbox.train.callbacks import Checkpoints, NonFiniteGuard, RunRecord

HELP = (
    "Beside the options below: --name NAME names the run (default: the first configuration file); "
    "--out DIR is its directory, new or empty; for fit, --resume PATH goes on in a run directory, "
    "or from a checkpoint inside one, with the configuration saved there, which later files and "
    "options override."
)

# What Lightning runs as autocast to bf16 on a CPU.
MIXED = ("bf16-mixed", "bf16", "16-mixed", "16", 16)
SLOW_MIXED = (
    "this CPU emulates bf16 (it has neither AMX nor AVX512-BF16), so this runs in 32-true; to keep "
    "it, put Lightning's MixedPrecision in trainer.plugins"
)


def run(subcommand: str, argv: Sequence[str]) -> None:
    """Parse ``argv`` (see ``HELP``) and run one subcommand of the trainer in a run directory."""
    ours = argparse.ArgumentParser(prog=f"sandbox {subcommand}", add_help=False, allow_abbrev=False)
    ours.add_argument("--name")
    ours.add_argument("--out", type=Path)
    if subcommand == "fit":
        ours.add_argument("--resume")
    flags, rest = ours.parse_known_args(argv)
    resume = getattr(flags, "resume", None)
    if flags.out and (resume or flags.name):
        raise UserError("--out says where a new run goes: leave out --name and --resume")
    run_dir, checkpoint = flags.out and _claim(flags.out), None
    if resume:
        run_dir, checkpoint = resume_point(resume)
        rest = ["--config", str(run_dir / CONFIG), *rest]
    SandboxCLI(subcommand, rest, name=flags.name, run_dir=run_dir, checkpoint=checkpoint)


class SandboxCLI(LightningCLI):
    """LightningCLI over any module and data module, started in a directory of its own."""

    def __init__(
        self,
        subcommand: str,
        argv: Sequence[str],
        *,
        name: str | None = None,
        run_dir: Path | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        _hush()
        self.argv = [subcommand, *argv]
        self.name = name
        self.run_dir = run_dir
        self.checkpoint = checkpoint
        usage = f"sandbox {subcommand} --config FILE [options]"
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=_Parser,
            parser_kwargs={"prog": "sandbox", subcommand: {"description": HELP, "usage": usage}},
            save_config_callback=_KeepConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse our arguments; a key of a file that a later class cannot take is an error."""
        self.config = parser.parse_args(self.argv)
        config = self.config[self.config.subcommand]
        varied = [("the command line", flag, name) for flag, name in _presets_overridden(self.argv)]
        for file in map(str, config.config or []):
            given = yaml.safe_load(Path(file).read_text())
            for key in _dropped(given, config.as_dict()):
                if any(_plain(key).startswith(f"{whole}.") for whole in _replaced(self.argv)):
                    continue  # meant: class and arguments together were replaced
                parser.error(
                    f"{file}: '{key}' would be dropped, because the class around it was replaced; "
                    "put the new class and all of its init_args in one file"
                )
            varied += [(file, *found) for found in _varied_presets(given, config.as_dict())]
        for where, key, name in varied:
            parser.error(
                f"{where}: '{key}' is the preset '{name}', which would be dropped for one value "
                f"given: write all of them (`sandbox params {name} --json` has them as config)"
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyper-parameters override the command line."""

    def before_instantiate_classes(self) -> None:
        """Read checkpoints without code, unless configured; replace a mixed precision that slows.

        On a CPU that emulates bf16, ``bf16-mixed`` becomes ``32-true``. A precision plugin in
        ``trainer.plugins`` stays, as does ``bf16-true``, and a Trainer made in Python is not asked.
        """
        config = self.config[self.subcommand]
        if config.get("weights_only") is None:
            config["weights_only"] = True
        trainer = config.trainer
        if trainer.precision in MIXED and _on_cpu(trainer.accelerator) and slow_bf16_mixed():
            if _first_process():
                print(f"precision {trainer.precision}: {SLOW_MIXED}", file=sys.stderr)
            trainer["precision"] = "32-true"
        if self.subcommand == "fit":
            return
        if config.ckpt_path is not None:
            config["ckpt_path"] = str(find_checkpoint(config.ckpt_path))
        elif not config.model.get("init_args", {}).get("init_from"):
            raise UserError(
                f"{self.subcommand} without --ckpt_path would measure random weights: name a run "
                "directory or a checkpoint"
            )

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what the user can mend is told as it was raised."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps errors of constructors in its own
            for cause in _causes(error):
                if isinstance(cause, UserError):
                    raise cause from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with everything it writes inside the run directory."""
        config = self.config[self.subcommand]
        run_dir = self.run_dir or self._new_run_dir(config)
        if config.trainer.logger in (None, True) and not config.trainer.barebones:
            kwargs["logger"] = _loggers(run_dir)
        if not (config.trainer.barebones or config.trainer.fast_dev_run):
            kwargs["callbacks"] = self._callbacks(config)
        if _first_process():
            print(self._parser(self.subcommand).dump(config, skip_default=True))
            print(f"run directory: {run_dir}")
        return super().instantiate_trainer(default_root_dir=str(run_dir.resolve()), **kwargs)

    def _callbacks(self, config: Any) -> list[Callback]:
        """Those of the configuration, and the house's where it names none of their class."""
        given = self._get(self.config_init, "trainer").callbacks or []
        callbacks = list(given) if isinstance(given, Sequence) else [given]
        house: list[type[Callback]] = []
        if self.subcommand == "fit":
            house = [RunRecord, NonFiniteGuard]
            if config.trainer.enable_checkpointing is not False:
                house.append(Checkpoints)
        elif self.subcommand == "test":
            house = [Controls]
        present = tuple(map(type, callbacks))
        return callbacks + [kind() for kind in house if kind not in present]

    def fit(self, **kwargs: Any) -> None:
        """Train, on from the checkpoint of ``--resume``.

        That stays out of the configuration, which the run saves and another may start from.
        """
        if self.checkpoint:
            kwargs["ckpt_path"] = str(self.checkpoint)
        self.trainer.fit(**kwargs)

    def predict(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        """Write every question of the tested splits with the model's reply."""
        if path := kwargs.get("ckpt_path"):
            load_weights(model.model, read_checkpoint(path)[1], source=path)
        precision = self.trainer.precision_plugin
        network: Any = precision.convert_module(model.model)
        network.to(self.trainer.strategy.root_device)
        out = Path(self.trainer.default_root_dir) / PREDICTIONS
        with precision.forward_context():
            records = [
                record
                for split in datamodule.test_splits
                for record in evaluate(network, datamodule.task, split, datamodule.size(split))
            ]
            records = with_replies(network, datamodule.task, records)
        write_predictions(out, records)
        print(f"predictions: {out}")

    def _new_run_dir(self, config: Any) -> Path:
        file = Path(str(config.config[0])) if config.config else Path("run")
        # A configuration that a run saved is named like its directory.
        name = self.name or (file.resolve().parent.name if file.name == CONFIG else file.stem)
        if self.subcommand != "fit":
            name = f"{self.subcommand}-{name}"
        parent = config.trainer.default_root_dir or RUNS
        # Of several processes the first creates it; the others learn its name later.
        return new_run_dir(name, parent) if _first_process() else Path(parent)


class _KeepConfig(SaveConfigCallback):
    """Saves the effective configuration in the run directory; a resumed run keeps the old one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell every process the run directory, which only the first one has created."""
        private: Any = trainer
        private._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``, after moving one that says something else out of the way."""
        path = Path(trainer.default_root_dir) / CONFIG
        text = self.parser.dump(self.config, skip_unset=False)
        if path.exists() and path.read_text() != text:
            number = 1 + len(list(path.parent.glob("config-*.yaml")))
            path.rename(path.with_name(f"config-{number}.yaml"))
        path.write_text(text)


def _claim(run_dir: Path) -> Path:
    """Create a directory that no run has written to.

    Raises:
        UserError: it holds something.
    """
    if _first_process():
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise UserError(f"--out {run_dir}: not empty; a run needs a directory of its own")
    return run_dir


def _on_cpu(accelerator: Any) -> bool:
    """Whether a Trainer with this ``accelerator`` key computes on the CPU."""
    return accelerator == "cpu" or (accelerator == "auto" and available() == ["cpu"])


def _first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _hush() -> None:
    """Keep advertisements and idle warnings from hiding what a run says."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # a frozen LM
    talker = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    talker.addFilter(lambda record: "Tip:" not in record.getMessage())


def _loggers(run_dir: Path) -> list[Logger]:
    """TensorBoard's events in the run directory itself, and ``metrics/metrics.csv``.

    A CSV logger deletes what it finds in its place: a resumed run writes ``metrics-2``, and so on.
    """
    number = 1 + len(list(run_dir.glob("metrics*")))
    return [
        TensorBoardLogger(run_dir, name="", version="", default_hp_metric=False),
        CSVLogger(run_dir, name="", version="metrics" if number == 1 else f"metrics-{number}"),
    ]


class _Parser(LightningArgumentParser):
    """Reports an error in one line that names the full key and the nearest valid one.

    jsonargparse makes such a parser for every class in the configuration, so the one that meets an
    unknown key is the one that knows its neighbours. What it reports travels up as an exception;
    the outermost parser prints.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.match(r".*(?:option|arguments:) '?-*([\w.+-]+)", message, re.IGNORECASE)
        if unknown and "\n" not in message:
            message = _unknown_key(getattr(ex, "subcommand_parser", self), unknown[1])
            ex = None
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {_one_line(message, ex)}\n")


def _unknown_key(parser: argparse.ArgumentParser, key: str) -> str:
    known = [action.dest for action in parser._actions if action.dest != "help"]
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"unknown key '{key}'; did you mean '{near[0]}'?"
    valid = f"valid: {', '.join(known)}" if len(known) < 20 else f"see `{parser.prog} --help`"
    return f"unknown key '{key}' ({valid})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, what caused that, ..."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _one_line(message: str, ex: Exception | None) -> str:
    """The innermost reason, behind the path of keys that leads to it."""
    keys: list[str] = []
    for error in _causes(ex):
        text = str(error)
        if found := re.match(r'Parser key "(.+?)":\s*', text):
            if not keys or keys[-1] != found[1]:
                keys.append(found[1])
            text = text[found.end() :]
        if isinstance(error, AttributeError) and hasattr(error.obj, "__file__"):
            near = difflib.get_close_matches(str(error.name), dir(error.obj), n=1)
            message += f"; did you mean '{near[0]}'?" if near else ""
        elif isinstance(error, (TypeError, ValueError, argparse.ArgumentError)):
            message = text
    if message.startswith("Not a valid subclass"):
        message = f"{message.split('. Got', 1)[0]}: give class_path and, beside it, only init_args"
    if message.startswith("Unexpected config"):
        message = "a configuration file holds no keys; is it empty?"
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(message.split()))
    return f"{'.'.join(keys)}: {message}" if keys else message


def _dropped(given: Any, effective: Any, path: str = "") -> Iterator[str]:
    """Keys below an ``init_args`` of a file that the effective configuration no longer has."""
    if not isinstance(given, Mapping) or not isinstance(effective, Mapping):
        return
    for key, value in given.items():
        full = f"{path}.{key}" if path else str(key)
        if key in effective:
            yield from _dropped(value, effective[key], full)
        elif path.endswith("init_args"):
            yield full


def _replaced(argv: Sequence[str]) -> Iterator[str]:
    """Keys that get a whole object on the command line: a class and all of its arguments."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, _, value = arg.partition("=")
        if flag.startswith("--") and (value or following).lstrip().startswith("{"):
            yield _plain(flag.removeprefix("--"))


def _plain(key: str) -> str:
    """A key as it may be written for short: without ``init_args``."""
    return key.replace(".init_args", "")


def _varied_presets(given: Any, effective: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Keys of a file whose preset gave way to single values, with the preset's name.

    jsonargparse fills the values that are not given from ``BackboneConfig``: the preset "tiny".
    """
    if not isinstance(given, Mapping) or not isinstance(effective, Mapping):
        return
    for key, value in given.items():
        full, other = f"{path}.{key}" if path else str(key), effective.get(key)
        if isinstance(value, str) and isinstance(other, Mapping) and value in PRESETS:
            if PRESETS[value] != BackboneConfig():
                yield full, value
        else:
            yield from _varied_presets(value, other, full)


def _presets_overridden(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags that name a preset while others set single values of it, with the preset's name."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, _, value = arg.partition("=")
        name = value or following
        overridden = any(other.startswith(f"{flag}.") for other in argv)
        if overridden and PRESETS.get(name, BackboneConfig()) != BackboneConfig():
            yield flag, name
