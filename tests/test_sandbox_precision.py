"""Every precision from the first step to an answer: 32-true, bf16-mixed and bf16-true on the CPU.

``bf16-mixed`` is Lightning's plugin here: `sandbox fit` replaces the key where it is slow.
"""

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image as PILImage

from sandbox import cli
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.moe import MoE
from sandbox.backbone.visibility import Visibility
from sandbox.checkpoint import load_model, read_checkpoint, save_model
from sandbox.generate import Sampling
from sandbox.runs import find_weights
from tests.asked import mixture

HOUSE = Path(__file__).parents[1]
SHIPPED = [HOUSE / "sandbox/quickstart.yaml", *sorted(HOUSE.glob("experiments/**/*.yaml"))]
RECIPES = [path for path in SHIPPED if "model" in yaml.safe_load(path.read_text())]
MIXED = [
    "--trainer.plugins+=lightning.pytorch.plugins.MixedPrecision",
    "--trainer.plugins.precision=bf16-mixed",
    "--trainer.plugins.device=cpu",
]
PRECISIONS = {
    "32-true": ["--trainer.precision=32-true"],
    "bf16-mixed": MIXED,
    "bf16-true": ["--trainer.precision=bf16-true"],
}
TINY = """
seed_everything: 7
trainer:
  max_steps: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  gradient_clip_val: 1.0
  limit_val_batches: 1
  val_check_interval: 1
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  callbacks:
    - class_path: sandbox.train.monitors.SampleImages
    - class_path: sandbox.train.monitors.RoutingMonitor
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
    """A directory of its own, with `tiny.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def call(*argv: str) -> None:
    assert cli.main(argv) == 0, argv


def check(run: Path, precision: str) -> None:
    """Weights are finite and of the precision's dtype, and all that was logged is finite."""
    _, tensors = read_checkpoint(run / "checkpoints/last.ckpt")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    weights = {name: each for name, each in tensors.items() if name.endswith("weight")}
    assert weights and {each.dtype for each in weights.values()} == {dtype}
    assert all(each.isfinite().all() for each in tensors.values())
    logged = list(csv.DictReader((run / "metrics/metrics.csv").open()))
    values = [float(value) for row in logged for value in row.values() if value]
    assert values and all(map(math.isfinite, values))
    losses = [float(row["train/loss"]) for row in logged if row.get("train/loss")]
    assert losses and all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_from_the_first_step_to_an_answer(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against crashes between dtypes: clipping with a fused optimizer, the KV cache under
    autocast, answers counted under a default dtype of bf16; and against controls, `predict` and
    `ask` that leave out the precision.
    """
    chosen = PRECISIONS[precision]
    call("fit", "--config", "tiny.yaml", "--out", "run", *chosen)
    check(Path("run"), precision)
    for command in ("test", "predict"):
        call(command, "--config", "tiny.yaml", "--ckpt_path", "run", "--out", command, *chosen)
    summary = json.loads(Path("test/summary.json").read_text())
    assert 0 <= summary["accuracy"] <= 1
    shares = summary["inside"]["expert_load"]["0"]["image"]
    assert sum(shares) == pytest.approx(1)
    for command in ("test", "predict"):
        lines = Path(command, "predictions.jsonl").read_text().splitlines()
        assert all("correct" in json.loads(line) for line in lines)
    PILImage.new("RGB", (32, 32), "red").save("a.png")
    capsys.readouterr()
    call("ask", "--checkpoint", "run", "--image", "a.png", "--precision", precision, "what?")
    assert capsys.readouterr().out.endswith("\n")


def test_the_command_line_replaces_a_precision_that_slows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against `bf16-mixed` that costs time without a word, against a saved configuration
    that says what did not run, and against replacing it where it pays.
    """
    monkeypatch.setattr("sandbox.lightning_cli.slow_bf16_mixed", lambda: True)
    call("fit", "--config", "tiny.yaml", "--out", "slow", "--trainer.precision=bf16-mixed")
    said = [line for line in capsys.readouterr().err.splitlines() if "AMX" in line]
    assert len(said) == 1 and said[0].startswith("precision bf16-mixed: this CPU emulates bf16")
    assert yaml.safe_load(Path("slow/config.yaml").read_text())["trainer"]["precision"] == "32-true"
    monkeypatch.setattr("sandbox.lightning_cli.slow_bf16_mixed", lambda: False)
    call("fit", "--config", "tiny.yaml", "--out", "quick", "--trainer.precision=bf16-mixed")
    saved = yaml.safe_load(Path("quick/config.yaml").read_text())
    assert saved["trainer"]["precision"] == "bf16-mixed"
    assert "AMX" not in capsys.readouterr().err


# --- Numbers that must not be rounded -------------------------------------------------------------


@pytest.fixture
def bf16_default() -> Iterator[None]:
    """What Lightning's bf16-true puts around a forward pass."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def nudged(mixture_layer: MoE) -> torch.Tensor:
    """The balancing bias after 1,000 steps in which the first expert gets everything."""
    load = torch.zeros(mixture_layer.config.experts)
    load[0] = 8.0
    for _ in range(1000):
        mixture_layer.nudge(load)
    return mixture_layer.balance_bias.float()


def expected(mixture_layer: MoE) -> torch.Tensor:
    rate = 1000 * mixture_layer.config.balance_rate
    moved = torch.tensor([-rate] + [rate] * (mixture_layer.config.experts - 1))
    return moved - moved.mean()


def test_a_bf16_model_balances_on() -> None:
    """Guards against a bias that stops at +-8 of +-20: 8 + 0.02 is 8 in bf16."""
    model = mixture().bfloat16()
    layer = next(iter(model.backbone.mixtures().values()))
    assert layer.balance_bias.dtype == torch.float32
    torch.testing.assert_close(nudged(layer), expected(layer), rtol=1e-4, atol=0)


def test_the_bias_survives_a_checkpoint_of_a_bf16_model(workplace: Path) -> None:
    """Guards against a bias that is rounded on its way through a file."""
    model = mixture().bfloat16()
    for layer in model.backbone.mixtures().values():
        layer.balance_bias.copy_(torch.linspace(-20, 20, layer.config.experts) + 0.0123)
    before = {i: m.balance_bias.clone() for i, m in model.backbone.mixtures().items()}
    assert all(bias.dtype == torch.float32 for bias in before.values())
    save_model(model, workplace / "model.safetensors")
    loaded = load_model(workplace / "model.safetensors")
    assert loaded.backbone.head.weight.dtype == torch.bfloat16
    for number, layer in loaded.backbone.mixtures().items():
        assert layer.balance_bias.dtype == torch.float32
        assert torch.equal(layer.balance_bias, before[number])


def test_the_bias_of_a_bf16_run_is_saved_and_resumed_in_fp32() -> None:
    """Guards against bf16-true that trains, saves or resumes the bias in the dtype of weights."""
    chosen = PRECISIONS["bf16-true"]
    call("fit", "--config", "tiny.yaml", "--out", "run", *chosen)
    call("fit", "--resume", "run", "--trainer.max_steps=4")
    _, tensors = read_checkpoint(find_weights("run"))
    biases = [each for name, each in tensors.items() if name.endswith("balance_bias")]
    assert biases
    for bias in biases:
        assert bias.dtype == torch.float32
        steps = bias / 0.02 * len(bias)  # whole nudges, whose mean was subtracted
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("bf16_default")
def test_draws_and_temperature_are_fp32_under_a_bf16_default() -> None:
    """Guards against sampling by 256 different numbers, and against a temperature of queries that
    steps at the wrong position: 8,191 is 8,192 in bf16.
    """
    draws = Sampling(max_tokens=4, seed=3).draws(2)
    assert draws.dtype == torch.float32
    config = BackboneConfig(temperature_floor=8192)
    positions = torch.tensor([[8190, 8191, 16382, 16383]])
    seen = Visibility(config, torch.ones(16, dtype=torch.float32), positions).temperature
    assert seen is not None
    steps = [0.0, 1.0, 1.0, 2.0]
    by_hand = [1 + config.temperature_scale * math.log1p(step) for step in steps]
    torch.testing.assert_close(seen.flatten(), torch.tensor(by_hand, dtype=torch.float32))


# --- Every recipe ---------------------------------------------------------------------------------


def shapes(folder: Path, images: int) -> None:
    """One split of easy-VQA's layout: squares of random colours."""
    rng = random.Random(folder.name)
    records = []
    for number in range(images):
        path = folder / "images" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (64, 64), tuple(rng.choices(range(256), k=3))).save(path)
        records.append(["what color is the shape?", rng.choice(["red", "blue"]), number])
        records.append(["what shape is in the image?", "circle", number])
    (folder / "questions.json").write_text(json.dumps(records))


def easy_vqa(root: Path) -> Path:
    shapes(root / "train", 800)  # a few of which become the validation split
    shapes(root / "test", 40)
    (root / "answers.txt").write_text("red\nblue\ncircle\n")
    return root


def chartqa(root: Path) -> Path:
    """ChartQA's layout: one chart a shade."""
    for base, split in enumerate(("train", "val", "test")):
        charts = root / split / "png"
        charts.mkdir(parents=True)
        for number in range(8):
            PILImage.new("RGB", (40, 30), (20 * number, 80 * base, 0)).save(
                charts / f"{number}.png"
            )
        for part in ("human", "augmented"):
            records = [
                {"imgname": f"{n}.png", "query": f"{part}?", "label": str(n)} for n in range(8)
            ]
            (root / split / f"{split}_{part}.json").write_text(json.dumps(records))
    return root


def needs(recipe: Path) -> Sequence[str]:
    """What a recipe leaves open, filled with what is made here."""
    name = recipe.stem
    if name == "easy_vqa":
        return [f"--data.init_args.task.init_args.root={easy_vqa(Path('easy_vqa'))}"]
    if name == "chartqa":
        root = chartqa(Path("chartqa"))
        return [f"--data.init_args.task.init_args.tasks.chartqa.init_args.root={root}"]
    if name == "pictures_apart":
        return ["--model.init_args.init_from=null"]
    if name == "align":
        small = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
        config = ["--config", str(HOUSE / "experiments/text_lm.yaml"), "--trainer.accelerator=cpu"]
        call("fit", *config, "--out", "reader", *small, "--data.init_args.batch_size=2")
        return ["--model.init_args.language_model=reader"]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_runs_in_every_precision(recipe: Path, precision: str) -> None:
    """Guards against a shipped configuration that crashes, or trains on non-finite numbers, as soon
    as `--trainer.precision` is given.
    """
    config = yaml.safe_load(recipe.read_text())
    common = ["--config", str(recipe), *PRECISIONS[precision], "--trainer.accelerator=cpu"]
    common += ["--trainer.limit_val_batches=1", "--data.init_args.batch_size=4", *needs(recipe)]
    if config["data"]["class_path"].endswith("VQAData"):
        common += [f"--data.init_args.{split}_samples=16" for split in ("val", "test")]
    short = ["--trainer.max_steps=3", "--trainer.val_check_interval=3"]
    call("fit", *common, *short, "--trainer.log_every_n_steps=1", "--out", "run")
    check(Path("run"), precision)
    call("validate", *common, "--ckpt_path=run", "--out", "validate")
    if "Contrastive" in config["model"]["class_path"]:
        return  # it has no test
    call("test", *common, "--ckpt_path=run", "--out", "test")
    assert 0 <= json.loads(Path("test/summary.json").read_text())["accuracy"] <= 1
