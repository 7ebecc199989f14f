"""The file of a ladder: what it says, what is wrong with it, and the commands it stands for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import cli
from sandbox.errors import UserError
from sandbox.stages.plan import Ladder, plan

File = dict[str, Any]


def content() -> File:
    """A ladder of a shared language model, two ways up, and three arms."""
    return {
        "question": "Which way up?",
        "baseline": "plain",
        "seeds": [3, 5],
        "stages": {
            "text": {"config": "text.yaml", "once": True},
            "pairs": {
                "config": "pairs.yaml",
                "set": {"data.seed": "{seed}", "a.b": [1, "s{seed}"]},
            },
            "align": {"config": "align.yaml", "from": {"m.language": "text", "m.eye": "pairs"}},
            "joint": {"config": "joint.yaml", "from": {"m.eye": "align"}, "set": {"t.flag": None}},
            "fresh": {"config": "joint.yaml"},
            "unused": {"config": "joint.yaml"},
        },
        "arms": {"plain": "fresh", "tall": "joint", "middle": "align"},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a ladder beside the configurations it names."""
    for name in ("text", "pairs", "align", "joint"):
        (tmp_path / f"{name}.yaml").write_text(f"seed_everything: 0  # {name}\n")

    def to_file(ladder: Any) -> Path:
        path = tmp_path / "ladder.yaml"
        path.write_text(ladder if isinstance(ladder, str) else json.dumps(ladder))
        return path

    return to_file


def test_every_run_is_a_command_behind_those_it_needs(write: Callable[[Any], Path]) -> None:
    """A stage of seed 5 that starts from seed 3's checkpoint makes the seeds one experiment."""
    file = write(content())
    out = Path("OUT")
    jobs = {job.name: job for job in plan(Ladder.read(file), out)}
    assert list(jobs) == [
        "seed-3/fresh", "seed-3/fresh-test",
        "seed-3/text", "seed-3/pairs", "seed-3/align", "seed-3/joint", "seed-3/joint-test",
        "seed-3/align-test",
        "seed-5/fresh", "seed-5/fresh-test",
        "seed-5/pairs", "seed-5/align", "seed-5/joint", "seed-5/joint-test",
        "seed-5/align-test",
    ]  # fmt: skip
    assert jobs["seed-5/align"].argv == (
        "fit", "--out", "OUT/seed-5/align", "--config", str(file.parent / "align.yaml"),
        "--seed_everything=5", "--m.language=OUT/seed-3/text", "--m.eye=OUT/seed-5/pairs",
    )  # fmt: skip
    assert jobs["seed-5/align"].needs == ("seed-3/text", "seed-5/pairs")
    settings = ("--seed_everything=5", "--data.seed=5", '--a.b=[1, "s5"]')
    assert jobs["seed-5/pairs"].argv[-3:] == settings
    assert "--t.flag=null" in jobs["seed-5/joint"].argv
    assert jobs["seed-5/joint-test"].argv == (
        "test", "--out", "OUT/seed-5/joint-test",
        "--config", "OUT/seed-5/joint/config.yaml", "--ckpt_path", "OUT/seed-5/joint",
    )  # fmt: skip
    assert jobs["seed-5/joint-test"].needs == ("seed-5/joint",)


def test_only_what_the_chosen_arms_need_runs(write: Callable[[Any], Path]) -> None:
    """A shared stage stays with the file's first seed: chosen seed 5 must not train another one."""
    ladder = Ladder.read(write(content())).choose(seeds=[5], arms=["middle"])
    names = ["seed-3/text", "seed-5/pairs", "seed-5/align", "seed-5/align-test"]
    assert [job.name for job in plan(ladder, Path("OUT"))] == names
    assert ladder.lineage("align", 5) == [("text", 3), ("pairs", 5), ("align", 5)]


def test_sources_of_a_shared_stage_are_shared(write: Callable[[Any], Path]) -> None:
    """What stands below a stage that runs once would otherwise run for every seed, unused."""
    file = content()
    file["stages"]["pairs"]["once"] = True
    file["stages"]["pairs"]["from"] = {"m.text": "fresh"}
    lineage = Ladder.read(write(file)).lineage("align", 5)
    assert lineage == [("text", 3), ("fresh", 3), ("pairs", 3), ("align", 5)]


def _fingerprints(file: Path, out: str = "OUT") -> dict[str, str]:
    return {job.name: job.fingerprint for job in plan(Ladder.read(file), Path(out))}


def test_fingerprints_tell_what_a_result_depends_on(
    write: Callable[[Any], Path], tmp_path: Path
) -> None:
    """A finished run that is skipped must be of the same command and configuration."""
    file = content()
    before = _fingerprints(write(file))
    assert len(set(before.values())) == len(before)
    assert _fingerprints(write(file), out="elsewhere") == before
    file["stages"]["pairs"]["set"]["data.seed"] = 1
    changed = {name for name, now in _fingerprints(write(file)).items() if now != before[name]}
    assert changed == {"seed-3/pairs", "seed-5/pairs"}
    (tmp_path / "align.yaml").write_text("seed_everything: 1\n")
    changed = {name for name, now in _fingerprints(write(content())).items() if now != before[name]}
    aligned = {"seed-3/align", "seed-5/align"}
    assert changed == aligned | {f"{name}-test" for name in aligned}


def _put(path: str, value: Any) -> Callable[[File], None]:
    def edit(file: File) -> None:
        *parents, last = path.split("|")
        for key in parents:
            file = file[key]
        file[last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("basline", "plain", "ladder.yaml: unknown key 'basline'; did you mean 'baseline'?"),
        ("seeds", 3, "ladder.yaml: 'seeds' must be a list, got 3"),
        ("seeds", [], "ladder.yaml: seeds: must be different whole numbers"),
        ("seeds", [1, 1], "ladder.yaml: seeds: must be different whole numbers"),
        ("seeds", [True], "ladder.yaml: seeds: must be different whole numbers"),
        ("seeds", [-1], "ladder.yaml: seeds: must be different whole numbers"),
        ("arms", {}, "ladder.yaml: arms: there is none"),
        ("arms|a, b", "fresh", "arms: 'a, b' is no name that can be used here"),
        ("arms|tall", "jiont", "arms.tall: unknown stage 'jiont'; did you mean 'joint'?"),
        ("arms|tall", ["joint"], "arms.tall: must be the name of a stage, got ['joint']"),
        ("arms|tall", "text", "arms.tall: 'text' runs once, so its 2 seeds"),
        ("baseline", "zzz", "baseline: unknown arm 'zzz'; there are: plain, tall, middle"),
        ("stages|align|form", {}, "stages.align: unknown key 'form'; did you mean 'from'?"),
        ("stages|align|from", "text", "stages.align: 'from' must be a mapping, got 'text'"),
        (
            "stages|align|from",
            {"m.eye": "pear"},
            "stages.align.from.m.eye: unknown stage 'pear'; d",
        ),
        ("stages|align|from", {"m.eye": 1}, "from.m.eye: must be the name of a stage, got 1"),
        ("stages|align|once", "yes", "stages.align: 'once' must be true or false, got 'yes'"),
        ("stages|align", None, "stages.align: must be a mapping of config, set, from, once"),
        ("stages|align", {}, "stages.align: 'config' is missing"),
        ("stages|fresh|config", "jint.yaml", "stages.fresh.config: "),
        ("stages|fresh|set", {"seed_everything": 1}, "'seed_everything' is not for a stage to set"),
        ("stages|align|set", {"m.eye": "x"}, "'m.eye' stands under both `set` and `from`"),
        ("stages|fresh|set", {"--x": 1}, "stages.fresh.set: '--x' is no name"),
        ("stages|fresh|set", {"x y": 1}, "stages.fresh.set: 'x y' is no name"),
        ("stages|../up", {"config": "text.yaml"}, "stages: '../up' is no name"),
        ("stages|fresh-test", {"config": "text.yaml"}, "stages: 'fresh-test' is no name"),
        ("stages|pairs|from", {"m.eye": "joint"}, "a circle: pairs -> joint -> align -> pairs"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    path: str, value: Any, says: str, write: Callable[[Any], Path]
) -> None:
    """A misspelt name that is found when its stage starts, is found after hours."""
    file = content()
    _put(path, value)(file)
    with pytest.raises(UserError) as error:
        Ladder.read(write(file))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must be a mapping of question"),
        ("", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_ladder(text: str, says: str, write: Callable[[Any], Path]) -> None:
    """An empty file has no keys to complain about."""
    with pytest.raises(UserError, match=says):
        Ladder.read(write(text))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--arms", "plain,tal"], "unknown arm 'tal'; did you mean 'tall'?"),
        (["--seeds", "4"], "unknown seed '4'; there are: 3, 5"),
        (["--seeds", "3,x"], "must be whole numbers such as 0,1, got '3,x'"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_a_wrong_choice_is_a_usage_error(
    flags: list[str], says: str, write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt arm that is left out in silence is missed when the table is read."""
    try:
        code = cli.main(["stages", str(write(content())), "--dry-run", *flags])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_dry_run_prints_commands_and_loads_nothing_heavy(
    write: Callable[[Any], Path], tmp_path: Path
) -> None:
    """To look at a plan should neither take seconds nor leave directories behind."""
    file = write(content())
    code = (
        "import sys; from sandbox.cli import main\n"
        f"code = main(['stages', {str(file)!r}, '--dry-run', '--arms', 'plain', '--out', 'new'])\n"
        "heavy = {'torch', 'lightning', 'numpy', 'scipy', 'matplotlib', 'rich'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "0 []"
    assert len(lines) == 4
    assert lines[0].startswith("OMP_NUM_THREADS=")
    joint = file.parent / "joint.yaml"
    assert lines[0].endswith(f"fit --out new/seed-3/fresh --config {joint} --seed_everything=3")
    assert not (tmp_path / "new").exists()
