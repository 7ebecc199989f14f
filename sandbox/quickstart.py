"""`sandbox quickstart`: train a small model on charts, test whether it looks, tell it on one page.

The recipe is ``quickstart.yaml`` beside this file, a configuration like any other:
``sandbox fit --config`` trains the same model.
"""

import csv
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from sandbox.checkpoint import provenance, save_model
from sandbox.data.module import VQAData
from sandbox.data.task import Question, Task
from sandbox.errors import UserError
from sandbox.evals.controls import PREDICTIONS, SUMMARY, Blind, Results, inside, scores
from sandbox.evals.run import summarize, write_json, write_predictions
from sandbox.lightning_cli import SandboxCLI
from sandbox.model import VisionLanguageModel
from sandbox.report.gather import architecture, gallery, swap
from sandbox.report.page import Architecture, Curve, Facts, interval, percent, write_report
from sandbox.runs import CONFIG

RECIPE = Path(__file__).with_suffix(".yaml")
CHECKS = 12  # validations in a run whose length the caller chose
EXAMPLES = "examples"
ROUTED = 64  # charts of the test split that the experts' load is counted over
SPACE = 64 * 2**20  # bytes that must be free; a run takes about a fifth


def quickstart(
    out: Path, seed: int = 0, steps: int | None = None, samples: int = 256
) -> dict[str, Any]:
    """Train, evaluate and report into the directory ``out``.

    Args:
        out: directory of the run, made where it is missing.
        seed: of weights and of the charts that are drawn.
        steps: training steps; None means the recipe's.
        samples: charts of the test split, and of the held-out one, to evaluate on.

    Returns:
        What ``out/summary.json`` says.

    Raises:
        UserError: ``out`` has results already, or the disk is full.
        OSError: ``out`` cannot be written.
    """
    (out / EXAMPLES).mkdir(parents=True, exist_ok=True)
    if (out / SUMMARY).exists():
        raise UserError(f"{out} holds the results of a run: name another directory")
    if shutil.disk_usage(out).free < SPACE:
        raise UserError(f"{out}: less than {SPACE // 2**20} MB of disk space are left")

    start = time.perf_counter()
    fitted = _train(out, seed, steps)
    seconds = time.perf_counter() - start
    data: VQAData = fitted.datamodule
    trained = fitted.trainer.global_step
    model: VisionLanguageModel = fitted.model.model.eval()
    save_model(model, out / "model.safetensors", seed=seed, steps=trained, data=data.identity())
    model.to(fitted.trainer.strategy.root_device)  # the Trainer has moved it to the CPU
    print("evaluating ...")
    results = Results.of(model, data.task, samples)
    blind = Blind.of(_learned(data, trained * data.batch_size, results), results.asked)
    design = architecture(model, data.task.sample("test", 0))
    summary = {
        **scores(results, blind),
        "inside": inside(model, data.task, ROUTED),
        "params_total": design.params_total,
        "params_active": design.params_active,
        "train_seconds": round(seconds, 1),
        "steps": trained,
        "stages": data.stages,
        "seed": seed,
        "provenance": provenance() | {"data": data.identity()},
    }
    commands = _commands(out, data.task)
    write_predictions(out / PREDICTIONS, results.records)
    write_report(
        out / "report.html",
        _facts(model, data, results, blind, design, _curve(fitted.trainer), summary, commands),
    )
    write_json(out / SUMMARY, summary)
    _tell(out, results, blind, commands)
    return summary


def _train(out: Path, seed: int, steps: int | None) -> SandboxCLI:
    """Run `sandbox fit` on the recipe, in the directory ``out``."""
    args = [f"--config={RECIPE}", f"--seed_everything={seed}"]
    args += [f"--data.init_args.{of}seed={seed}" for of in ("", "task.init_args.")]
    if steps is not None:
        args += [f"--trainer.max_steps={steps}"]
        args += [f"--trainer.val_check_interval={max(1, steps // CHECKS)}"]
    return SandboxCLI("fit", args, run_dir=out)


def _curve(trainer: Trainer) -> Curve:
    """The validation accuracies that a run has logged."""
    logger = next(logger for logger in trainer.loggers if isinstance(logger, CSVLogger))
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/accuracy")]
    names = [name for name in (rows[0] if rows else ()) if name.startswith("val/accuracy")]
    return Curve(
        [int(row["step"]) for row in rows],
        {
            name.removeprefix("val/accuracy").strip("/") or "all": [
                float(row[name]) for row in rows
            ]
            for name in names
        },
    )


def _learned(data: VQAData, trained: int, results: Results) -> list[Question]:
    """The questions of the ``trained`` first training charts, as the curriculum drew them.

    On the way it is verified that none of these charts was evaluated on.
    """
    evaluated = {record.content for record in results.own + results.heldout}
    learned: list[Question] = []
    for index in range(trained):
        sample = data.tasks[data.stage_at(index)].sample("train", index)
        if sample.content in evaluated:
            raise RuntimeError(f"training sample {index} is in an evaluated split: the split leaks")
        learned += sample.questions
    return learned


def _commands(out: Path, task: Task) -> list[tuple[str, str]]:
    """What to try next; the charts to ask about are saved."""
    pictures = [out / EXAMPLES / f"{number}.png" for number in range(8)]
    for number, path in enumerate(pictures):
        task.sample("test", number).images[0].save(path)
    question = task.sample("test", 0).questions[0].text
    ask = ["sandbox", "ask", "--checkpoint", out / "model.safetensors"]
    ask += ["--image", pictures[0], question]
    return [
        ("Ask it about a chart that it has never seen", shlex.join(map(str, ask))),
        ("Look at the training run", shlex.join(["tensorboard", "--logdir", str(out)])),
        (
            "Train it again, with what you change",
            shlex.join(["sandbox", "fit", "--config", str(out / CONFIG), "--seed_everything=1"]),
        ),
    ]


def _facts(
    model: VisionLanguageModel,
    data: VQAData,
    results: Results,
    blind: Blind,
    design: Architecture,
    curve: Curve,
    summary: dict[str, Any],
    commands: list[tuple[str, str]],
) -> Facts:
    own, heldout, shuffled = results.summaries
    assert heldout is not None  # charts have held-out combinations
    return Facts(
        title="Early-fusion sandbox: quickstart on bar charts",
        run={
            "trained for": _duration(summary["train_seconds"]),
            "steps": f"{summary['steps']:,}",
            "charts seen": f"{summary['steps'] * data.batch_size:,}",
            "parameters": f"{design.params_total / 1e6:.2f} million",
            "tested on": f"{own.overall.n:,} questions",
            "seed": str(summary["seed"]),
        },
        own=own,
        heldout=heldout,
        shuffled=shuffled,
        no_image=summarize(results.no_image),
        blind=blind,
        swap=swap(model, data.task, results.own, results.shuffled),
        architecture=design,
        curve=curve,
        experts=summary["inside"].get("expert_load", {}),
        galleries=[
            gallery(data.task, results.own, title="Charts it has never seen", size=12),
            gallery(
                data.task,
                results.combinations,
                title="Combinations it has never seen",
                note="A colour at a height that no training chart gave it.",
                size=8,
            ),
        ],
        commands=commands,
        provenance=summary["provenance"],
    )


def _tell(out: Path, results: Results, blind: Blind, commands: list[tuple[str, str]]) -> None:
    names = ("charts never seen", "held-out combinations", "charts exchanged", "no chart")
    summaries = (*results.summaries, summarize(results.no_image))
    for name, summary in zip(names, summaries, strict=True):
        assert summary is not None  # charts have held-out combinations
        score = summary.overall
        print(f"{name:<22} {percent(score.accuracy):>4}  ({interval(score)})")
    print(f"{'commonest answer':<22} {percent(blind.majority):>4}")
    print(f"\nThe report: {out / 'report.html'}")
    for why, command in commands:
        print(f"\n{why}:\n  {command}")


def _duration(seconds: float) -> str:
    """Seconds for people.

    >>> _duration(231.7), _duration(9.2)
    ('3 min 52 s', '9 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
