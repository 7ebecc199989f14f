import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox.errors import UserError
from sandbox.runs import CONFIG, WEIGHTS, find_checkpoint, find_weights, new_run_dir, resume_point


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a rolling, a best and a post-mortem checkpoint, in order of age."""
    run = tmp_path / "20260101-000000-debug"
    (run / "checkpoints").mkdir(parents=True)
    (run / CONFIG).write_text("seed_everything: 1\n")
    for age, name in enumerate(["nonfinite-step-9.ckpt", "last.ckpt", "best.ckpt"]):
        file = run / "checkpoints" / name
        file.write_text("")
        os.utime(file, times=(time.time() - age, time.time() - age))
    return run


def test_runs_started_together_get_directories_of_their_own(tmp_path: Path) -> None:
    """Two arms of a sweep, started in the same second, once wrote into one directory."""
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: new_run_dir("debug", tmp_path / "runs"), range(40)))
    assert len(set(paths)) == 40
    assert all(path.is_dir() and "-debug" in path.name for path in paths)


def test_a_name_is_one_directory(tmp_path: Path) -> None:
    """A slash in --name would nest the run where nobody looks for it."""
    assert new_run_dir("a/b c", tmp_path).name.endswith("-a-b-c")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_goes_on_from_its_rolling_checkpoint(run: Path) -> None:
    """The newest file may be a post-mortem of a diverged run: resuming there repeats the crash."""
    assert find_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    assert resume_point(run) == (run, run / "checkpoints" / "last.ckpt")


def test_without_a_rolling_checkpoint_the_newest_counts(run: Path) -> None:
    """Runs with Lightning's own checkpoint callback keep none called last."""
    (run / "checkpoints" / "last.ckpt").unlink()
    assert find_checkpoint(run).name == "nonfinite-step-9.ckpt"


def test_a_checkpoint_names_its_run(run: Path) -> None:
    """Resuming from the best checkpoint must go on in the run it belongs to, not start another."""
    best = run / "checkpoints" / "best.ckpt"
    assert resume_point(best) == (run, best)


def test_what_cannot_be_resumed_is_named(run: Path, tmp_path: Path) -> None:
    """A mistyped path must not start a fresh run that looks like a resumed one."""
    with pytest.raises(UserError, match="runs/typo: no such"):
        resume_point(tmp_path / "runs" / "typo")
    (tmp_path / "stray.ckpt").write_text("")
    with pytest.raises(UserError, match=r"stray.ckpt: no config.yaml"):
        resume_point(tmp_path / "stray.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no checkpoint"):
        find_checkpoint(tmp_path / "empty")


def test_a_finished_run_answers_with_what_it_exported(run: Path) -> None:
    """`sandbox ask` on the directory of a quickstart, which keeps weights and no checkpoint."""
    assert find_weights(run).name == "last.ckpt"
    (run / WEIGHTS).write_text("")
    assert find_weights(run) == run / WEIGHTS
    assert find_weights(run / "checkpoints" / "best.ckpt").name == "best.ckpt"
