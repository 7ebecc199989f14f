"""The `sandbox` command: usage, errors, and a run from training to evaluation."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from sandbox import cli
from sandbox.errors import UserError

CONFIG = """
seed_everything: 7
trainer:
  max_steps: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 1
  log_every_n_steps: 1
model:
  class_path: sandbox.train.pretrain.Pretrain
  init_args:
    encoder:
      class_path: encoders.patches.Patches
      init_args: {tile_size: 32, patch_size: 8, width: 32}
    fusion:
      class_path: fusion.early.EarlyFusion
      init_args: {hidden: 16}
    backbone: {width: 32, layers: 2, heads: 2, head_dim: 16, dense_hidden: 32, expert_hidden: 16}
    optimizer: {name: adamw}
data:
  class_path: sandbox.data.module.VQAData
  init_args:
    task:
      class_path: sandbox.data.charts.Charts
      init_args: {size: 32}
    batch_size: 2
    val_samples: 2
    test_samples: 2
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a directory of its own, with `tiny.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def call(*argv: str) -> int:
    """The exit code of a command, whether it returns or exits."""
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_help_and_usage_errors_import_nothing_heavy() -> None:
    """`sandbox --help` took 12 seconds when handlers were imported at the top."""
    script = (
        "import sys\n"
        "from sandbox.cli import main\n"
        "for argv in (['--help'], ['quickstart', '--help'], ['ask']):\n"
        "    try: main(argv)\n"
        "    except SystemExit: pass\n"
        "print(','.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split(",")}
    assert not loaded & {"torch", "lightning", "numpy", "PIL", "tokenizers", "rich", "matplotlib"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fti"], "invalid choice: 'fti'"),
        ([], "required: <subcommand>"),
        (["params", "scuot"], "did you mean 'scout'?"),
        (["params", "--context", "0"], "at least 1, got '0'"),
        (["params", "scout", "--context", "-5"], "at least 1, got '-5'"),
        (["params", "scout", "--context", "10M"], "a whole number of at least 1, got '10M'"),
        (["params", "scout", "--context", "9" * 30], "at most 10^12"),
        (["quickstart", "--steps", "0"], "at least 1, got '0'"),
        (["quickstart", "--step", "3"], "unrecognized arguments: --step 3"),
        (["ask", "what?"], "required: --checkpoint"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page of usage hid the one line that mattered; abbreviations changed meaning later."""
    assert call(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert says in error


def _raiser(error: BaseException) -> Callable[..., int]:
    def handler(*_: object) -> int:
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("image a.png:\n  cut short"), "error: image a.png: cut short\n"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "error: a.yaml: No such"),
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: Exception,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback for a mistyped path reads like a bug of the program."""
    monkeypatch.setattr(cli, "_doctor", _raiser(error))
    assert call("doctor") == 1
    assert capsys.readouterr().err.startswith(says)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catching every ValueError would hide a shape mismatch in torch behind one useless line."""
    monkeypatch.setattr(cli, "_doctor", _raiser(ValueError("not enough values to unpack")))
    with pytest.raises(ValueError, match="unpack"):
        cli.main(["doctor"])


def test_params_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read the counts; a table drawn around the JSON would break them."""
    assert call("params", "tiny", "--json", "--context", "500") == 0
    tiny = json.loads(capsys.readouterr().out)["tiny"]
    assert tiny["active"] < tiny["total"]
    assert tiny["cache_bytes"]["bf16"]["bytes"] == 4 * 500 * 2 * 32 * 2
    assert tiny["config"]["layers"] == 4


def test_params_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a preset the numbers of all, with one all of its numbers."""
    assert call("params") == 0
    assert "maverick" in capsys.readouterr().out
    assert call("params", "scout", "--context", "10000000") == 0
    shown = capsys.readouterr().out
    assert "107,769,861,120" in shown
    assert "0.251" in shown


def test_quickstart_gets_its_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags once parsed and never passed on: every quickstart ran with seed 0."""
    got: list[dict[str, Any]] = []
    fake: Any = ModuleType("sandbox.quickstart")
    fake.quickstart = lambda **kwargs: got.append(kwargs)
    monkeypatch.setitem(sys.modules, "sandbox.quickstart", fake)
    assert call("quickstart", "--out", "here", "--seed", "3", "--steps", "5") == 0
    assert got == [{"out": Path("here"), "seed": 3, "steps": 5}]
    assert call("quickstart") == 0
    assert got[1]["out"].parent == Path("runs")
    assert got[1]["steps"] is None


def test_ask_passes_images_question_and_sampling(
    monkeypatch: pytest.MonkeyPatch, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images in another order than given answer another question."""
    from PIL import Image

    from sandbox import checkpoint

    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(workplace / name)
    (workplace / "model.safetensors").touch()
    seen: dict[str, Any] = {}
    shown: list[str] = []

    class Model:
        def to(self, *_: Any) -> "Model":
            return self

        def stream(self, prompts: list[Any], **sampling: Any) -> Iterator[tuple[int, str]]:
            seen.update(sampling, content=prompts[0].turns[0].content)
            for piece in (" ", "b", "lue ", "\n", "or not", " \n"):
                yield 0, piece
                shown.append(capsys.readouterr().out)

    monkeypatch.setattr(checkpoint, "load_model", lambda path: seen.update(path=path) or Model())
    flags = ["--temperature", "0.5", "--top-p", "0.9", "--max-tokens", "3", "--seed", "1"]
    flags += ["--top-k", "7", "--stop", "red", "--stop", "green"]
    images = ["--image", "a.png", "--image", "b.png"]
    assert call("ask", "--checkpoint", ".", *images, *flags, "which is blue?") == 0
    assert shown == ["", "b", "lue", "", " \nor not", ""]  # as it comes, and trimmed
    assert capsys.readouterr().out == "\n"
    first, second, question = seen.pop("content")
    assert first.pixels.getpixel((0, 0)) == (255, 0, 0)
    assert second.pixels.getpixel((0, 0)) == (0, 0, 255)
    assert question == "which is blue?"
    assert seen == {
        "path": Path("model.safetensors"),
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 3,
        "seed": 1,
        "stop": ["red", "green"],
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "-3"], "top_k"),
        (["--stop", ""], "stop"),
    ],
)
def test_sampling_out_of_range_is_a_usage_error(
    flags: list[str], says: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It should not take the loading of a model to learn that a flag is wrong."""
    (workplace / "model.safetensors").touch()
    assert call("ask", "--checkpoint", ".", *flags, "what?") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sampling: ")
    assert says in error
    assert error.count("\n") == 1


def test_a_broken_image_is_one_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow's traceback for a truncated file names neither the file nor the cure."""
    (workplace / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    (workplace / "model.safetensors").touch()
    assert call("ask", "--checkpoint", ".", "--image", "broken.png", "what?") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: image broken.png")
    assert error.count("\n") == 1


# --- Configuration --------------------------------------------------------------------------------


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of the configuration: put ``value`` at the dotted ``path``."""

    def edit(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("trianer", {"max_steps": 3}, "unknown key 'trianer.max_steps'; did you mean 'trainer.m"),
        ("trainer.max_step", 3, "did you mean 'trainer.max_steps'?"),
        ("model.init_args.tokeniser", "small", "model: unknown key 'tokeniser'; did you mean 'tok"),
        ("model.init_args.encoder.init_args.widht", 8, "model.encoder: unknown key 'widht'; did"),
        ("model.init_args.encoder.init_args.zebra", 8, "(valid: tile_size, patch_size, width)"),
        ("model.init_args.encoder.init_args.width", "wide", "model.encoder.width: Expected a int"),
        ("model.init_args.encoder.class_path", "encoders.patches.Patch", "mean 'Patches'?"),
        ("model.init_arg", {}, "model: Not a valid subclass of LightningModule: give class_path"),
        ("data.init_args.batchsize", 4, "data: unknown key 'batchsize'; did you mean 'batch_size'"),
    ],
)
def test_a_wrong_key_is_an_error_that_names_the_nearest(
    path: str, value: Any, says: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt key that is ignored trains another model than the file describes."""
    config = yaml.safe_load(CONFIG)
    _set(path, value)(config)
    (workplace / "wrong.yaml").write_text(yaml.safe_dump(config))
    assert call("fit", "--config", "wrong.yaml") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--modle", "x"], "unknown key 'modle'; did you mean 'model'?"),
        (["--trainer.max_step", "3"], "did you mean 'trainer.max_steps'?"),
        (
            ["--model.encoder.widht", "8"],
            "model.encoder: unknown key 'widht'; did you mean 'width'",
        ),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--resume", "runs/absent"], "runs/absent: no such checkpoint or run directory"),
    ],
)
def test_a_wrong_flag_is_an_error_too(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Abbreviated flags were expanded in silence, to whichever option came to have that prefix."""
    assert call("fit", "--config", "tiny.yaml", *flags) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_arguments_that_a_new_class_cannot_take_are_not_dropped_in_silence(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When a flag swaps a class, jsonargparse drops the init_args that the new one cannot take."""
    (workplace / "arms.py").write_text(
        "from encoders.patches import Patches\n"
        "class Narrow(Patches):\n"
        "    def __init__(self, tile_size: int = 32, patch_size: int = 8):\n"
        "        super().__init__(tile_size, patch_size, 16)\n"
    )
    monkeypatch.syspath_prepend(workplace)
    argv = ["fit", "--config", "tiny.yaml", "--model.encoder", "arms.Narrow"]
    assert call(*argv) == 2
    error = capsys.readouterr().err
    assert "tiny.yaml: 'model.init_args.encoder.init_args.width' would be dropped" in error
    for flag in ("--model.encoder", "--model.init_args.encoder"):
        whole = f'{flag}={{"class_path": "arms.Narrow", "init_args": {{"patch_size": 16}}}}'
        encoder = _parsed(*argv[1:3], whole, monkeypatch=monkeypatch).model.init_args.encoder
        assert (encoder.class_path, encoder.init_args.patch_size) == ("arms.Narrow", 16)

    config = yaml.safe_load(CONFIG)
    del config["model"]["init_args"]["encoder"]["init_args"]["width"]
    (workplace / "tiny.yaml").write_text(yaml.safe_dump(config))
    encoder = _parsed(*argv[1:], monkeypatch=monkeypatch).model.init_args.encoder
    assert encoder.class_path == "arms.Narrow"
    assert encoder.init_args.patch_size == 8  # what both take is kept


def _parsed(*argv: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The effective configuration, without building anything from it."""
    from sandbox.lightning_cli import SandboxCLI

    monkeypatch.setattr(SandboxCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(SandboxCLI, "_run_subcommand", lambda self, subcommand: None)
    return SandboxCLI("fit", argv).config.fit


def test_command_line_beats_file_beats_checkpoint(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning merges a checkpoint's hyper-parameters over the command line."""
    saved = {"_class_path": "sandbox.train.pretrain.Pretrain", "tokenizer": "from-checkpoint"}
    torch.save({"hyper_parameters": saved}, workplace / "old.ckpt")
    argv = ["--config", "tiny.yaml", "--ckpt_path", "old.ckpt", "--model.optimizer.lr", "0.5"]
    config = _parsed(*argv, monkeypatch=monkeypatch)
    assert config.model.init_args.tokenizer == "small"
    assert config.model.init_args.optimizer.lr == 0.5
    assert config.model.init_args.optimizer.name == "adamw"
    assert config.seed_everything == 7


def test_a_preset_is_chosen_by_name(workplace: Path) -> None:
    """A size of the ladder must be trainable as it is, with whatever tokenizer."""
    from sandbox.backbone.config import preset
    from sandbox.checkpoint import read_checkpoint
    from sandbox.runs import find_checkpoint
    from sandbox.tokenizer import Tokenizer

    words = Tokenizer.train(["What is the value of the highest bar? How many bars?"], 290)
    (workplace / "words.json").write_text(words.to_json())
    argv = ["--config", "tiny.yaml", "--model.backbone", "1m", "--trainer.max_steps", "1"]
    assert call("fit", *argv, "--model.tokenizer", "words.json") == 0
    (run,) = (workplace / "runs").iterdir()
    description, _ = read_checkpoint(find_checkpoint(run))
    backbone = description["model"]["backbone"]
    assert (backbone["width"], backbone["vocab_size"]) == (preset("1m").width, 290)


def test_a_preset_is_not_dropped_in_silence(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--model.backbone.chunk 64` over the preset 5m trained the tiny one, with that chunk."""
    config = yaml.safe_load(CONFIG)
    _set("model.init_args.backbone", "5m")(config)
    (workplace / "named.yaml").write_text(yaml.safe_dump(config))
    argv = ["--config", "named.yaml"]
    assert call("fit", *argv, "--model.backbone.chunk", "64") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "named.yaml: 'model.init_args.backbone' is the preset '5m'" in error
    for preset in (["--model.backbone", "5m"], ["--model.backbone=5m"]):
        flags = ["--config", "tiny.yaml", *preset, "--model.backbone.chunk", "64"]
        assert call("fit", *flags) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "the command line: '--model.backbone' is the preset '5m'" in error
    other = _parsed(*argv, "--model.backbone", "25m", monkeypatch=monkeypatch)
    assert other.model.init_args.backbone == "25m"


def test_train_resume_evaluate(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A saved configuration did not load again, and resuming stopped at `config.yaml exists`."""
    assert call("fit", "--config", "tiny.yaml", "--name", "first") == 0
    (run,) = (workplace / "runs").iterdir()
    assert f"run directory: runs/{run.name}" in capsys.readouterr().out
    assert run.name.endswith("-first")
    written = {path.name for path in run.rglob("*")}
    assert written >= {"config.yaml", "run.json", "last.ckpt", "metrics.csv"}

    assert call("fit", "--resume", str(run), "--trainer.max_steps", "4") == 0
    assert list((workplace / "runs").iterdir()) == [run]
    effective = yaml.safe_load((run / "config.yaml").read_text())
    before = yaml.safe_load((run / "config-1.yaml").read_text())
    assert (before["trainer"]["max_steps"], effective["trainer"]["max_steps"]) == (2, 4)
    assert effective["seed_everything"] == 7
    assert effective["ckpt_path"] is None
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["step"] for session in sessions] == [0, 2]
    assert (run / "metrics" / "metrics.csv").exists()  # the second session did not overwrite it
    assert (run / "metrics-2" / "metrics.csv").exists()

    capsys.readouterr()
    last = os.fspath(run / "checkpoints" / "last.ckpt")
    assert call("test", "--config", str(run / "config.yaml"), "--ckpt_path", last) == 0
    assert "test/accuracy" in capsys.readouterr().out
    (tested,) = (workplace / "runs").glob("*-test-*")
    summary = json.loads((tested / "summary.json").read_text())
    assert 0 <= summary["shuffled_image_accuracy"] <= 1
    assert summary["questions"] == sum(kind["n"] for kind in summary["by_question"].values())

    assert call("predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(run)) == 0
    (predicted,) = (workplace / "runs").glob("*-predict-*")
    replies = list(map(json.loads, (predicted / "predictions.jsonl").read_text().splitlines()))
    assert {reply["split"] for reply in replies} == {"test", "heldout"}
    own = [reply for reply in replies if reply["split"] == "test"]
    assert [r["correct"] for r in own] == [
        r["correct"]
        for r in map(json.loads, (tested / "predictions.jsonl").read_text().splitlines())
        if r["split"] == "test" and r["images"] == "own"
    ]


def test_evaluation_needs_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """Without one, Lightning evaluates random weights and reports them like any others."""
    assert call("test", "--config", "tiny.yaml") == 1
    assert "random weights" in capsys.readouterr().err


def test_an_error_in_a_constructor_is_told_as_it_was_raised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """jsonargparse wraps it in a page about the subtypes of a union."""
    assert call("fit", "--config", "tiny.yaml", "--model.freeze", "[nothing]") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: freeze: the model has no part 'nothing'")


@pytest.mark.slow
def test_processes_share_one_run_directory(workplace: Path) -> None:
    """Each process of a distributed run made a directory of its own, named a second apart."""
    command = [sys.executable, "-m", "sandbox.cli", "fit", "--config", "tiny.yaml"]
    several = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run([*command, *several], check=True, timeout=300, stdout=subprocess.DEVNULL)
    (run,) = (workplace / "runs").iterdir()
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert json.loads((run / "run.json").read_text())["sessions"][0]["processes"] == 2


def test_a_checkpoint_of_another_configuration_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch answers with a page of size mismatches, after some weights were taken over."""
    assert call("fit", "--config", "tiny.yaml", "--name", "narrow") == 0
    (run,) = Path("runs").iterdir()
    wider = ["--model.backbone.width", "48"]
    last = str(run / "checkpoints" / "last.ckpt")
    for command in (
        ["test", "--config", "tiny.yaml", "--ckpt_path", str(run), *wider],
        ["fit", "--resume", str(run), *wider],
        [
            "fit",
            "--config",
            "tiny.yaml",
            "--model.init_from",
            last,
            *wider,
        ],
    ):
        capsys.readouterr()
        assert call(*command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "is of another configuration" in error
        assert "backbone.embed.weight" in error
