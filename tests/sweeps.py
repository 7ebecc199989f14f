"""A sweep's directory, made up: what `sandbox ablate` reads its report from."""

import json
import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from sandbox.data.charts import Charts

ARMS = {  # how often each is right, in the place of its training
    "early": 0.9,
    "cross-attention": 0.7,
    "early + shuffled 2 by 2 before a projector of two layers": 0.89,
}
TASK = {"size": 32, "questions_per_image": 4}
FLOPS = 2.5e9  # of a step
STEPS = 80


def write_sweep(
    out: Path,
    rates: Mapping[str, float] = ARMS,
    *,
    seeds: Collection[int] = (0, 1, 2),
    failed: Collection[tuple[str, int]] = (),
    samples: int = 12,
) -> Path:
    """Write the directory of a sweep over charts whose runs ``failed`` have stopped in training.

    The first arm is the baseline; an arm with "cross" in its name has gates, the others have
    experts. Returns the directory.
    """
    slugs = {name: f"arm-{number}" for number, name in enumerate(rates)}
    steps = {name: STEPS // (1 + number) for number, name in enumerate(rates)}
    out.mkdir(parents=True, exist_ok=True)
    plan = {
        "question": "Does early fusion beat a cross-attention adapter at equal FLOPs?",
        "baseline": next(iter(rates)),
        "seeds": list(seeds),
        "budget": {"match": "flops", "amount": FLOPS * STEPS},
        "metrics": ["accuracy", "heldout", "accuracy/value"],
        "base": "base.yaml",
        "stages": {"text_lm": "text_lm.yaml"},
        "file": "fusion.yaml",
        "arms": {
            name: {
                "slug": slugs[name],
                "steps": steps[name],
                "changes": {} if not number else {"model.fusion": ["early", {"class_path": name}]},
                "cost": {
                    "flops": FLOPS * (1 + number),
                    "tokens": 900.5,
                    "samples": 16,
                    "params_total": 1_150_000 + number,
                    "params_active": 710_000,
                    "params_trained": 1_150_000,
                },
            }
            for number, name in enumerate(rates)
        },
    }
    write_json(out / "plan.json", plan)
    (out / "commands.txt").write_text("sandbox fit --config 'base.yaml' --out <here> & so on\n")
    for name, rate in rates.items():
        for seed in seeds:
            run = out / f"seed-{seed}" / slugs[name]
            well = (name, seed) not in failed
            trained(run, rate, seed, steps[name], finished=well)
            if well:
                evaluated(
                    run, rate, random.Random(f"{name} {seed}"), samples, gated="cross" in name
                )
    return out


def trained(run: Path, rate: float, seed: int, steps: int, *, finished: bool) -> None:
    """What `sandbox fit` leaves in a run directory, and the runner beside it."""
    (run / "metrics").mkdir(parents=True)
    task = {"class_path": "sandbox.data.charts.Charts", "init_args": TASK}
    data = {"class_path": "sandbox.data.module.VQAData", "init_args": {"task": task}}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    rows = [
        f"{steps * n // 5 - 1},{rate * n / (n + 1) + seed / 50}\n{steps * n // 5},\n"
        for n in range(1, 6)
    ]
    (run / "metrics/metrics.csv").write_text("step,val/accuracy\n" + "".join(rows))
    session = {
        "step": 0,
        "provenance": {"commit": "0123456789ab", "torch": "2.15.0"},
        "device": "cpu",
        "threads": 1,
        "trained": {
            "steps": steps,
            "samples": steps * 16,
            "tokens": steps * 900,
            "seconds": 60.0 + seed,
            "tokens_per_s": 1234.5 + seed,
            "peak_memory": 300_000_000,
        },
    }
    write_json(run / "run.json", {"sessions": [session]})
    mark(run, finished)


def evaluated(run: Path, rate: float, rng: random.Random, samples: int, *, gated: bool) -> None:
    """What `sandbox test` leaves in the directory beside the run's."""
    tested = run.with_name(f"{run.name}-test")
    tested.mkdir()
    task = Charts(**TASK)  # type: ignore[arg-type]
    views = [("test", "own", rate), ("heldout", "own", rate / 2)]
    views += [("test", "shuffled", 0.2), ("test", "none", 0.15)]
    records = []
    for split, images, chance in views:
        for index in range(samples):
            sample = task.sample(split, index)  # type: ignore[arg-type]
            for question in sample.questions:
                correct = rng.random() < chance
                records.append(
                    {
                        "split": split,
                        "index": index,
                        "content": sample.content,
                        "shown": (index + 1) % samples if images == "shuffled" else index,
                        "correct": correct,
                        "reply": question.answer if correct else rng.choice(["1", "red", ""]),
                        "images": images,
                        "answer": question.answer,
                        "kind": question.kind,
                        "present": question.present,
                        "question": question.text,
                    }
                )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tested / "predictions.jsonl").write_text(lines)

    def share(split: str, images: str, kind: str = "") -> float:
        found = [
            record["correct"]
            for record in records
            if (record["split"], record["images"]) == (split, images) and kind in record["kind"]
        ]
        return sum(found) / len(found)

    load = [rng.random() for _ in range(4)]
    experts = {"image": [n / sum(load) for n in load], "text": [0.25] * 4}
    summary = {
        "accuracy": share("test", "own"),
        "heldout_combination_accuracy": share("heldout", "own"),
        "shuffled_image_accuracy": share("test", "shuffled"),
        "no_image_accuracy": share("test", "none"),
        "blind_majority_accuracy": 0.25,
        "by_question": {
            kind: {
                "accuracy": share("test", "own", kind),
                "heldout": share("heldout", "own", kind),
                "shuffled": share("test", "shuffled", kind),
                "no_image": share("test", "none", kind),
                "majority": 0.2,
                "n": sum(r["images"] == "own" and r["kind"] == kind for r in records),
            }
            for kind in ("count", "extremum", "value")
        },
        "inside": {"gates": {"3": {"attention": rng.random() - 0.3, "ffn": 0.0625}}}
        if gated
        else {"expert_load": {"1": experts, "2": {"image": [0.25] * 4, "text": [0.25] * 4}}},
    }
    write_json(tested / "summary.json", summary)
    mark(tested, finished=True)


def mark(run: Path, finished: bool) -> None:
    """What the runner notes of a process."""
    write_json(
        run.with_name(f"{run.name}.json"),
        {
            "fingerprint": "0",
            "finished": finished,
            "seconds": 61.0,
            "cpu_seconds": 60.0,
            "resumed": False,
        },
    )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content))
