"""`sandbox stages`, and how it and `sandbox ablate` are told where their runs go.

Light: what a command needs is imported when it runs.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox import arguments
from sandbox.errors import UserError, fail

if TYPE_CHECKING:
    from sandbox.stages.process import Launcher


def add_stages(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `stages` to the command line."""
    stages = commands.add_parser(
        "stages", help="train a ladder of stages for several arms and seeds, and compare the arms"
    )
    stages.add_argument("file", type=Path, help="see sandbox/stages/plan.py")
    stages.add_argument("--out", type=Path, help="new, or one to go on in (default: under runs/)")
    stages.add_argument(
        "--seeds", type=arguments.seeds, help="of the file's, such as 0,1 (default: all)"
    )
    stages.add_argument(
        "--arms", type=arguments.names, help='of the file\'s, such as "a,b" (default: all)'
    )
    stages.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    add_launcher(stages)
    stages.set_defaults(handler=_stages)


def add_launcher(command: argparse.ArgumentParser) -> None:
    """Add the options that say where runs go and how many at a time; see ``launcher``."""
    command.add_argument(
        "--jobs", type=arguments.positive, default=1, help="runs at a time (default: 1)"
    )
    command.add_argument(
        "--launcher",
        choices=("local", "ray"),
        default="local",
        help="where they run: processes of this machine (default), or tasks of the Ray at "
        "RAY_ADDRESS, else of a local one",
    )
    command.add_argument(
        "--gpus-per-run",
        type=partial(arguments.number, rule="a number of at least 0", least=0),
        help="such as 2, or 0.5 to share each (default: with Ray 1, or 0 where it has none; on "
        "this machine an even share of its GPUs)",
    )


def launcher(args: argparse.Namespace) -> "Launcher":
    """Where the runs go, as ``--jobs``, ``--launcher`` and ``--gpus-per-run`` say.

    Raises:
        UserError: Ray cannot be had as asked for, or there are fewer GPUs.
    """
    if args.launcher == "ray":
        from sandbox.stages.on_ray import OnRay

        return OnRay(args.gpus_per_run)
    from sandbox.stages.gpus import places, visible
    from sandbox.stages.process import Local

    found = places(visible(), args.jobs, args.gpus_per_run)
    if 0 < len(found) < args.jobs:
        print(
            f"--jobs {args.jobs}: {len(found)} at a time, which have GPU "
            f"{' / '.join(found)}; --gpus-per-run 0.5 puts two runs on each",
            flush=True,
        )
    return Local(found)


def _stages(args: argparse.Namespace) -> int:
    from sandbox.runs import new_run_dir
    from sandbox.stages.plan import Ladder, plan
    from sandbox.stages.process import LOCAL
    from sandbox.stages.run import run, script

    try:
        ladder = Ladder.read(args.file).choose(args.seeds, args.arms)
    except UserError as error:
        return fail(str(error), code=2)
    if args.dry_run:
        threads = LOCAL.threads(args.jobs)
        print("\n".join(script(plan(ladder, args.out or Path("OUT")), threads)))
        return 0
    launch = launcher(args)
    out = args.out or new_run_dir(f"stages-{args.file.stem}")
    print(f"output directory: {out} (to go on there: --out {out})", flush=True)
    failed = run(plan(ladder, out), out, at_once=args.jobs, launch=launch)

    from sandbox.stages.report import report

    if text := report(ladder, out):
        print(f"\n{text}\nreport: {out / 'report.md'}")
    if failed:
        listed = "; ".join(f"{name} ({why})" for name, why in failed.items())
        raise UserError(f"{len(failed)} runs of {out} did not finish: {listed}")
    return 0
