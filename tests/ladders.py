"""A ladder of stages with a script in the place of `sandbox fit` and `sandbox test`."""

import json
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

from sandbox.stages.plan import Ladder

STUB = """
import json, os, random, sys, time
from pathlib import Path

command, *argv = sys.argv[1:]
with open("calls.txt", "a") as calls:
    print(*sys.argv[1:], os.environ["OMP_NUM_THREADS"], file=calls)
flags = dict(flag[2:].split("=", 1) for flag in argv if "=" in flag)
words = [word for word in argv if "=" not in word]
given = dict(zip(words[::2], words[1::2]))
out = Path(given.get("--out") or given["--resume"])
if "--resume" in given:
    config = json.loads((out / "config.yaml").read_text())
    print("resumed")
else:
    assert not out.exists() or not any(out.iterdir()), out
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads(Path(given["--config"]).read_text())
print("at work as", os.getpid())
if config.get("fails") and command == config["fails"]:
    print("first\\n" * 20, "the last words", flush=True)
    sys.exit(3)
if command == "fit":
    (out / "partial").touch()
    for key, value in flags.items():
        if value.count("/"):  # a run to start from
            assert (Path(value) / "checkpoints/last.ckpt").read_text() == "whole", value
    config["seed"] = int(flags.get("seed_everything", config.get("seed", -1)))
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "config.yaml").write_text(json.dumps(config))
    if config.get("saves"):
        (out / "checkpoints/last.ckpt").write_text("half")
    if Path("hang").exists() and config.get("hangs"):
        Path("hanging").write_text(str(os.getpid()))
        time.sleep(600)
    (out / "checkpoints/last.ckpt").write_text("whole")
else:
    run = Path(given["--ckpt_path"])
    assert (run / "checkpoints/last.ckpt").read_text() == "whole"
    rng = random.Random(f"{config['seed']} {config['name']}")
    records = [
        {"split": split, "index": i, "content": f"c{i}", "shown": (i + 1) % 30 if shuffled else i,
         "images": images, "question": "how many?", "kind": f"kind {n}", "answer": "1",
         "correct": rng.random() < (0.2 if shuffled else config["rate"])}
        for split, images in (("test", "own"), ("heldout", "own"), ("test", "shuffled"),
                              ("test", "reordered"))
        for shuffled in [images == "shuffled"]
        for i in range(30) for n in range(2)
    ]
    lines = "".join(json.dumps(record) + "\\n" for record in records)
    (out / "predictions.jsonl").write_text(lines)
    def rate(split, images="own", kind=""):
        found = [r["correct"] for r in records
                 if (r["split"], r["images"]) == (split, images) and kind in r["kind"]]
        return sum(found) / len(found)
    (out / "summary.json").write_text(json.dumps({
        "accuracy": rate("test"),
        "heldout_combination_accuracy": rate("heldout"),
        "shuffled_image_accuracy": rate("test", "shuffled"),
        "blind_majority_accuracy": 0.25,
        "by_question": {k: {"accuracy": rate("test", kind=k)} for k in ("kind 0", "kind 1")},
    }))
"""

STAND_IN = (sys.executable, "-S", "stub.py")


def ladder(**stages: dict[str, Any]) -> Ladder:
    """Language model and pairs, then align, then joint, and a fresh arm; with changes by stage."""
    rates = {"text": 0.0, "pairs": 0.0, "align": 0.6, "joint": 0.9, "fresh": 0.5}
    sources = {"align": {"m.text": "text", "m.eye": "pairs"}, "joint": {"m.eye": "align"}}
    for name, rate in rates.items():
        config = {"name": name, "rate": rate, "data": {"init_args": {"batch_size": 4}}}
        config |= {"trainer": {"max_steps": 10}} | stages.get(name, {})
        Path(f"{name}.yaml").write_text(json.dumps(config))
    content = {
        "question": "Which way up?",
        "baseline": "plain",
        "seeds": [0, 1, 2],
        "stages": {
            name: {"config": f"{name}.yaml", "from": sources.get(name, {}), "once": name == "text"}
            for name in rates
        },
        "arms": {"plain": "fresh", "tall": "joint", "middle": "align"},
    }
    Path("ladder.yaml").write_text(json.dumps(content))
    return Ladder.read(Path("ladder.yaml"))


def calls() -> list[str]:
    """The commands that were started, and forget them."""
    path = Path("calls.txt")
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def hanging() -> int:
    """The script's process once it hangs, as a stage with ``hangs`` does while "hang" exists."""
    for _ in count():
        if Path("hanging").exists() and (text := Path("hanging").read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError
