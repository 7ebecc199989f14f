"""`sandbox ablate`: from the file of an ablation to its report.

OUT/plan.json        what every arm varies, what a step of it costs, and how many steps it gets
OUT/arms/ARM.yaml    the whole configuration of an arm, as `sandbox fit` takes it
OUT/seed-0/ARM       a run; beside it its output, its mark and its test (see ``sandbox.stages.run``)
OUT/commands.txt     every command that was run
OUT/report.html      what came of it; report.md and results.json say the same
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from sandbox.ablation.plan import PLAN, Ablation, changes, slug
from sandbox.errors import UserError
from sandbox.runs import new_run_dir
from sandbox.stages.command import launcher
from sandbox.stages.plan import TEST, Job, Ladder, plan
from sandbox.stages.run import run

PACE = "-pace"  # behind an arm's name: the short run that tells its speed
PACE_STEPS = 30

Start = Callable[[Sequence[Job], Path], dict[str, str]]  # runs jobs; what failed, and why


def ablate(args: argparse.Namespace) -> int:
    """Plan, run what has not run yet, and report."""
    ablation = Ablation.read(args.file)
    out = args.out or new_run_dir(f"ablate-{args.file.stem}")
    if args.resume and not out.is_dir():
        raise UserError(f"--resume: there is no {out}; name the --out of a sweep that was begun")
    if not args.resume and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; go on there with --resume, or name another")
    start = partial(run, at_once=args.jobs, launch=launcher(args))
    print(f"output directory: {out} (to go on there: --out {out} --resume)", flush=True)

    ladder = ablation.ladder()
    configs = _resolved(ablation, ladder, out)
    _finish(start(_before(ladder, out), out), out)
    steps = _planned(ablation, ladder, configs, out, start)
    failed = start(plan(ablation.ladder(steps), out), out)

    from sandbox.ablation.report import write_report

    print(f"\n{write_report(out)}\nreport: {out / 'report.html'}")
    _finish(failed, out)
    return 0


def _finish(failed: Mapping[str, str], out: Path) -> None:
    if failed:
        listed = "; ".join(f"{name} ({why})" for name, why in failed.items())
        raise UserError(
            f"{len(failed)} runs of {out} did not finish: {listed}; --resume tries them again"
        )


def _first(ladder: Ladder, arm: str, out: Path) -> Job:
    """The training of an arm with the first seed."""
    wanted = ladder.run_name(ladder.arms[arm], ladder.seeds[0])
    return next(job for job in plan(ladder, out) if job.name == wanted)


def _before(ladder: Ladder, out: Path) -> list[Job]:
    """What has to be there before an arm can be built: all that the arms start from."""
    arms = {ladder.run_name(arm, seed) for arm in ladder.arms.values() for seed in ladder.seeds}
    return [job for job in plan(ladder, out) if job.name.removesuffix(TEST) not in arms]


def _resolved(ablation: Ablation, ladder: Ladder, out: Path) -> dict[str, dict[str, Any]]:
    """The whole configuration of each arm, checked and kept before anything runs."""
    from sandbox.ablation.cost import resolve

    configs = {}
    for name in ablation.arms:
        try:
            configs[name] = resolve(_first(ladder, name, out).options)
        except UserError as error:
            raise UserError(f"{ablation.file}: arms.{name}: {error}") from None
        path = out / "arms" / f"{slug(name)}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(configs[name], sort_keys=False), encoding="utf-8")
    return configs


def _planned(
    ablation: Ablation,
    ladder: Ladder,
    configs: Mapping[str, Mapping[str, Any]],
    out: Path,
    start: Start,
) -> dict[str, int]:
    """The steps of each arm: those planned before, or solved from what one costs; told and kept."""
    from sandbox.ablation.cost import measure, resolve, solve

    alone = replace(ablation, arms={"base": ablation.base}, baseline="base").ladder()
    base = resolve(_first(alone, "base", out).options)
    path = out / PLAN
    known = json.loads(path.read_text(encoding="utf-8"))["arms"] if path.is_file() else {}
    firsts = {name: _first(ladder, name, out) for name in ablation.arms}
    arms = {}
    for name, job in firsts.items():
        mark = f"{job.fingerprint}, {ablation.budget.match} {ablation.budget.amount:g}"
        if known.get(name, {}).get("mark") == mark:
            arms[name] = known[name]  # so that the runs that there are can be gone on with
            continue
        try:
            cost = measure(job.options)
            pace = _pace(ladder, name, out, start) if ablation.budget.match == "wall" else None
            steps = solve(ablation.budget, cost, pace, configs[name]["trainer"]["max_steps"])
        except UserError as error:
            raise UserError(f"{ablation.file}: arms.{name}: {error}") from None
        arms[name] = {
            "slug": slug(name),
            "mark": mark,
            "steps": steps,
            "cost": asdict(cost),
            "changes": changes(base, configs[name]),
        }
    told = {
        "question": ablation.question,
        "file": str(ablation.file),
        "base": str(ablation.base.config),
        "baseline": ablation.baseline,
        "seeds": list(ablation.seeds),
        "budget": asdict(ablation.budget),
        "metrics": list(ablation.metrics),
        "stages": {name: str(stage.config) for name, stage in ablation.stages.items()},
        "arms": arms,
    }
    partial = path.with_name(f".{PLAN}.partial")
    partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    _tell(ablation, arms)
    return {name: arm["steps"] for name, arm in arms.items()}


def _pace(ladder: Ladder, arm: str, out: Path, start: Start) -> float:
    """Seconds that a step of an arm takes here, by a short training of it.

    Raises:
        UserError: it failed.
    """
    name = ladder.arms[arm] + PACE
    settings = {"trainer.max_steps": PACE_STEPS, "trainer.limit_val_batches": 0}
    stage = ladder.stages[ladder.arms[arm]]
    short = replace(stage, settings={**stage.settings, **settings})
    alone = replace(
        ladder, stages={**ladder.stages, name: short}, arms={name: name}, seeds=ladder.seeds[:1]
    )
    jobs = [job for job in plan(alone, out) if not job.name.endswith(TEST)]
    _finish(start(jobs, out), out)
    trained = json.loads((out / alone.run_name(name, alone.seeds[0]) / "run.json").read_text())
    took = trained["sessions"][-1]["trained"]
    return took["seconds"] / took["steps"]


def _tell(ablation: Ablation, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what each arm varies, and what it gets."""
    print(ablation.question)
    for name, arm in arms.items():
        print(f"  {name}{'' if arm['changes'] else ': as the base'}")
        for key, (before, after) in arm["changes"].items():
            print(f"      {key}: {before} -> {after}")
    budget = ablation.budget
    table = Table("arm", "steps", "samples", "GFLOP a sample", "total", "active", "trained")
    table.title = f"{budget.match} {budget.amount:.3g} a run, {len(ablation.seeds)} seeds"
    for name, arm in arms.items():
        cost = arm["cost"]
        sizes = (f"{cost[f'params_{which}']:,}" for which in ("total", "active", "trained"))
        per_sample = f"{cost['flops'] / cost['samples'] / 1e9:.3g}"
        row = (name, f"{arm['steps']:,}", f"{arm['steps'] * cost['samples']:,}", per_sample, *sizes)
        table.add_row(*row)
    Console().print(table)
