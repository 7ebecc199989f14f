"""`sandbox ablate` from a file to a report: what is refused, what is killed and gone on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import cli
from sandbox.stages.run import Mark
from tests.test_ablation_cost import CONFIG

ABLATION: dict[str, Any] = {
    "question": "Does cross-attention see?",
    "base": "tiny.yaml",
    "baseline": "early",
    "seeds": [0],
    "budget": {"match": "flops", "amount": 6e8},
    "metrics": ["accuracy", "heldout"],
    "set": {"data.init_args.task.init_args.seed": "{seed}", "trainer.accumulate_grad_batches": 1},
    "arms": {
        "early": {},
        "cross-attention": {
            "set": {
                "model.init_args.fusion": {
                    "class_path": "fusion.cross_attention.CrossAttention",
                    "init_args": {"layers": [1], "heads": 2, "head_dim": 16, "hidden": 32},
                }
            }
        },
    },
}
# What depends on the machine and the hour; all else must be the same each time.
MEASURED = {"session", "seconds", "tokens_per_s", "peak_memory"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a small ablation, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    config = json.loads(json.dumps(CONFIG))
    config["trainer"] |= {"enable_progress_bar": False, "limit_val_batches": 1}
    config["data"]["init_args"] |= {"val_samples": 2, "test_samples": 4}
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    path = Path("which.yaml")
    path.write_text(yaml.safe_dump(ABLATION, sort_keys=False))
    return path


def found(out: Path) -> Any:
    """What the sweep found, without what was measured on the way."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(below) for key, below in value.items() if key not in MEASURED}
        return value

    return kept(json.loads((out / "results.json").read_text()))


def told(out: Path) -> list[str]:
    """The lines of the report, but for those that tell of the machine and the directory."""
    lines = (out / "report.md").read_text().splitlines()
    took = lines.index("### What it took")
    end = next(n for n, line in enumerate(lines) if n > took and line.startswith("#"))
    again = lines.index("## Do it again")
    return lines[:took] + lines[end:again]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["which.yaml", "--out", "old"], "old: not empty; go on there with --resume"),
        (["which.yaml", "--out", "none", "--resume"], "there is no none"),
        (["wich.yaml"], "wich.yaml: no such file"),
    ],
)
def test_a_sweep_needs_a_place_of_its_own(
    file: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    """A second sweep in the directory of a first would mix the runs of both."""
    Path("old").mkdir()
    Path("old/kept").touch()
    assert cli.main(["ablate", *argv]) == 1
    assert message in capsys.readouterr().err
    assert list(Path("old").iterdir()) == [Path("old/kept")]


def test_a_wrong_arm_is_told_before_anything_runs(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last arm's typing error would be met when all others have trained."""
    content = yaml.safe_load(file.read_text())
    content["arms"]["third"] = {"set": {"model.init_args.backbone.layrs": 3}}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert cli.main(["ablate", "which.yaml", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert "which.yaml: arms.third: model.backbone: unknown key 'layrs'; did you mean" in error
    assert not list(Path("out").glob("seed-*"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_report(file: Path) -> None:
    """A sweep of a day that starts anew after a power cut, or mixes in half a run, is worth little.

    Killed twice: between two runs, and in the middle of one.
    """
    program = [sys.executable, "-m", "sandbox.cli", "ablate", "which.yaml", "--out"]
    subprocess.run([*program, "whole"], check=True)

    def kill_when(done: str, *options: str) -> None:
        process = subprocess.Popen([*program, "killed", *options])
        for _ in range(3000):
            mark = Mark.read(Path("killed"), done)
            if mark and mark.finished:
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()

    kill_when("seed-0/early")
    kill_when("seed-0/cross-attention", "--resume")
    before = (Path("killed/seed-0/early/run.json")).read_text()
    subprocess.run([*program, "killed", "--resume"], check=True)

    assert Path("killed/seed-0/early/run.json").read_text() == before, "what was done is kept"
    assert found(Path("killed")) == found(Path("whole"))
    assert told(Path("killed")) == told(Path("whole"))
    page = Path("killed/report.html").read_text()
    assert "Does cross-attention see?" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "it loads nothing"

    # Each arm's configuration is one that `sandbox fit` takes as it is.
    plan = json.loads(Path("killed/plan.json").read_text())
    steps = plan["arms"]["cross-attention"]["steps"]
    again = ["--config", "killed/arms/cross-attention.yaml", "--trainer.max_steps", str(steps)]
    assert cli.main(["fit", *again, "--out", "again"]) == 0
    runs = (Path("again"), Path("killed/seed-0/cross-attention"))
    records = [json.loads((run / "run.json").read_text()) for run in runs]
    assert records[0]["sessions"][0]["data"] == records[1]["sessions"][0]["data"]
