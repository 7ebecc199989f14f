"""The rules of the house: who imports whom, what the README promises, which files load."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("encoders", "fusion", "sandbox")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LADDERS = sorted(ROOT.glob("experiments/*/ladder.yaml"))
ABLATIONS = sorted({*ROOT.glob("experiments/ablations/*.yaml")} - {*ROOT.glob("**/base.yaml")})
CONFIGURATIONS = sorted(
    {*ROOT.glob("experiments/**/*.yaml"), *ROOT.glob("sandbox/*.yaml")} - {*LADDERS, *ABLATIONS}
)


def module_of(path: Path) -> str:
    """The dotted name of a file: sandbox/data/batch.py -> sandbox.data.batch."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path, *, typing_too: bool = True) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, `from` names resolved.

    Without ``typing_too``, what stands under ``if TYPE_CHECKING`` is left out.
    """
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped.update(below for child in node.body for below in ast.walk(child))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def within(module: str, *packages: str) -> bool:
    """Whether ``module`` is one of the packages, or lies inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


# --- Who imports whom -----------------------------------------------------------------------------

# Inside `sandbox`, what a module may import of `sandbox`: backbone -> model -> {generate, train}
# -> evals -> {ablation, cli}, the right side importing the left; `data` imports no model code.
BASICS = (
    "sandbox.allocator",
    "sandbox.arguments",
    "sandbox.devices",
    "sandbox.errors",
    "sandbox.runs",
)
TEXT = ("sandbox.tokenizer", "sandbox.vocabulary")
BACKBONE = (*BASICS, "sandbox.backbone", "sandbox.meta", "sandbox.params")
DATA = (*BASICS, *TEXT, "sandbox.data")
MODEL = (*BACKBONE, *DATA, "sandbox.model", "sandbox.generate", "sandbox.checkpoint")
EVALS = (*MODEL, "sandbox.train", "sandbox.evals")
ALLOWED = {
    "sandbox.allocator": (),
    "sandbox.arguments": (),
    "sandbox.devices": BASICS,
    "sandbox.errors": (),
    "sandbox.runs": BASICS,
    "sandbox.meta": BASICS,
    "sandbox.doctor": BASICS,
    "sandbox.tokenizer": (*BASICS, *TEXT),
    "sandbox.vocabulary": DATA,
    "sandbox.backbone": (*BASICS, "sandbox.backbone"),
    "sandbox.params": BACKBONE,
    "sandbox.data": DATA,
    "sandbox.model": MODEL,
    "sandbox.generate": MODEL,
    "sandbox.huggingface": (*BASICS, *TEXT, "sandbox.backbone", "sandbox.huggingface"),
    "sandbox.checkpoint": (*MODEL, "sandbox.huggingface"),
    "sandbox.train": (*MODEL, "sandbox.train"),
    "sandbox.evals": EVALS,
    "sandbox.stages": (*BASICS, "sandbox.evals", "sandbox.stages"),
    "sandbox.ablation": (
        *EVALS,
        "sandbox.stages",
        "sandbox.report",
        "sandbox.lightning_cli",
        "sandbox.ablation",
    ),
    "sandbox.curate": ("sandbox.errors", "sandbox.curate"),
}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    """A leaf that imports its users cannot be read, tested or replaced alone."""
    module = module_of(path)
    ours = [name for name in imports(path) if within(name, *ROOMS, "experiments", "tests")]
    if within(module, "encoders", "fusion"):
        room = module.split(".")[0]
        assert all(within(name, room) for name in ours), f"{room} is a leaf: {ours}"
    for package, allowed in ALLOWED.items():
        if within(module, package):
            wrong = [
                name for name in ours if within(name, "sandbox") and not within(name, *allowed)
            ]
            assert not wrong, f"{module} must not import {wrong}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_imports_experiments_notebooks_or_tests(path: Path) -> None:
    """What only an experiment defines is lost to everybody who has not run it."""
    outside = ("experiments", "notebooks", "tests", "conftest")
    assert not [name for name in imports(path) if within(name, *outside)]


def test_the_rules_know_every_part() -> None:
    """A new package without a rule could import anything, unnoticed."""
    top = {".".join(module.split(".")[:2]) for module in MODULES if within(module, "sandbox")}
    # Where the arrows end: these may import all the rest.
    ends = ("sandbox", "ablation", "cli", "lightning_cli", "quickstart", "report")
    assert top <= {*ALLOWED, "sandbox", *(f"sandbox.{end}" for end in ends)}


def test_modules_do_not_import_each_other_in_circles() -> None:
    """A circle works or fails by which module happens to be imported first."""
    graph = {
        module: {name for name in imports(path, typing_too=False) if name in MODULES}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_tests_say_what_they_test() -> None:
    """`test_<room>_<file>.py` leads from a red test to the line, and from a file to its tests."""
    known = {"_".join(module.split(".")) for module in MODULES}
    known |= {name.removeprefix("sandbox_") for name in known}
    known |= {"_".join(module.split(".")[-2:]) for module in MODULES}
    topics = {"house", "notebooks", "readme", "experiments", "gpu", "step"}
    for path in (ROOT / "tests").glob("test_*.py"):
        subject = path.stem.removeprefix("test_")
        starts = any(subject == name or subject.startswith(f"{name}_") for name in known)
        assert starts or subject.split("_")[0] in topics, f"{path.name} names no file"


# --- What loads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_ours(room: str) -> None:
    """`encoders` and `fusion` are common names: another package of that name would win silently."""
    found = importlib.import_module(room).__file__
    assert found is not None
    assert Path(found).is_relative_to(ROOT)


@pytest.mark.slow
def test_every_module_imports_without_the_optional_packages() -> None:
    """decord has no wheels for ARM and macOS, and users lack what only developers install."""
    script = (
        "import importlib, sys\n"
        "for optional in ('av', 'decord', 'open_clip', 'pyarrow', 'pytest', 'ray', 'tiktoken'):\n"
        "    sys.modules[optional] = None\n"
        f"for module in {sorted(MODULES)}: importlib.import_module(module)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_fragile_packages_are_imported_inside_functions(path: Path) -> None:
    """A torchvision that does not match torch took down modules that never use it."""
    top = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    lines = [ast.unparse(node) for node in top]
    fragile = r"\b(torchvision|transformers|open_clip|decord|av|pyarrow|ray)\b"
    assert not [line for line in lines if re.search(fragile, line)]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_every_configuration_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed argument broke the YAML files that nobody had run since."""
    from sandbox.lightning_cli import SandboxCLI

    monkeypatch.setattr(SandboxCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(SandboxCLI, "_run_subcommand", lambda self, subcommand: None)
    assert SandboxCLI("fit", ["--config", str(path)]).config.fit.model.class_path


@pytest.mark.slow
@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.parent.name)
def test_every_ladder_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder that names a file that is gone, or a key that no class takes, fails after hours."""
    from sandbox.lightning_cli import SandboxCLI, run
    from sandbox.stages.plan import Ladder, plan

    monkeypatch.setattr(SandboxCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(SandboxCLI, "_run_subcommand", lambda self, subcommand: None)
    ladder = Ladder.read(path)
    jobs = plan(ladder.choose(seeds=ladder.seeds[:1]), tmp_path)
    trained = [job for job in jobs if job.argv[0] == "fit"]
    assert {job.name for job in trained} == {f"seed-0/{name}" for name in ladder.stages}
    for job in trained:
        run(*job.argv[:1], job.argv[1:])


@pytest.mark.slow
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_ablation_is_valid(path: Path, tmp_path: Path) -> None:
    """An arm that no longer parses would be found after the arms before it have trained."""
    from sandbox.ablation.cost import resolve
    from sandbox.ablation.plan import Ablation
    from sandbox.stages.plan import plan

    ladder = Ablation.read(path).ladder()
    jobs = plan(replace(ladder, seeds=ladder.seeds[:1]), tmp_path)
    trained = [job for job in jobs if job.argv[0] == "fit"]
    assert len(trained) == len(ladder.stages)
    configs = [resolve(job.options) for job in trained]
    assert all(config["model"]["class_path"] for config in configs)
    assert len({str(config) for config in configs}) == len(configs), "two arms are the same"


# --- What the README says -------------------------------------------------------------------------


def readme() -> str:
    """The README."""
    return (ROOT / "README.md").read_text()


def tree() -> dict[str, str]:
    """The README's tree: each path with its annotation.

    The tree is the code block under the heading "The tree"; a line is a name, two or more spaces,
    and what the file is for; two spaces of indentation are one level.
    """
    found = re.search(r"^## The tree$.*?^```\w*\n(.*?)^```$", readme(), re.DOTALL | re.MULTILINE)
    assert found, "the README has no code block under '## The tree'"
    paths: dict[str, str] = {}
    parents: list[str] = []
    for line in found[1].splitlines():
        parts = re.fullmatch(r"( *)(\S+?)(/?)(?:\s{2,}(.+))?", line)
        assert parts, f"not a line of a tree: {line!r}"
        indent, name, _, note = parts.groups()
        parents = [*parents[: len(indent) // 2], name]
        paths["/".join(parents)] = note or ""
    return paths


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    """A tour that leads to files long gone, or past the new ones, is worse than none."""
    annotated = tree()
    gone = [path for path in annotated if not (ROOT / path).exists()]
    assert not gone, f"the README's tree names what does not exist: {gone}"
    on_disk = {path.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py"}
    new = sorted(on_disk - annotated.keys())
    assert not new, f"the README's tree lacks {new}"
    assert all(annotated.values()), f"no annotation: {[p for p, a in annotated.items() if not a]}"


def test_the_commands_in_the_readme_parse() -> None:
    """The first thing a visitor types must work."""
    from sandbox.cli import TRAINER_COMMANDS, build_parser

    named = [shlex.split(line) for line in re.findall(r"\buv run sandbox (.+)", readme())]
    for argv in named:
        if argv[0] not in TRAINER_COMMANDS:
            build_parser().parse_args(argv)
    assert {"quickstart", "fit", "ask", "params", "doctor"} <= {argv[0] for argv in named}


def test_the_links_in_the_readme_lead_somewhere() -> None:
    """A dead link in the tour ends the tour."""
    targets = re.findall(r"\]\(([^)#:]+)\)", readme())
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_no_file_is_longer_than_a_sitting() -> None:
    """A file past 400 lines holds two ideas."""
    long = {module_of(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
