"""The `sandbox` command.

Parsing imports nothing heavy, so that help and usage errors answer at once; each handler imports
what it runs. Exit codes: 0 done, 1 failed, 2 the command line or configuration is wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from sandbox import arguments
from sandbox.devices import add_placement, choose
from sandbox.errors import UserError, fail
from sandbox.evals.command import add_evaluate
from sandbox.evals.score import add_score
from sandbox.stages.command import add_launcher, add_stages

# Handed to Lightning as they are: its parser knows their many flags.
TRAINER_COMMANDS = {
    "fit": "train a model as a YAML file says; --resume RUN goes on where a run stopped",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "store a checkpoint's predictions",
}

DTYPES = ("keep", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in TRAINER_COMMANDS:
            from sandbox.lightning_cli import run

            run(argv[0], argv[1:])
            return 0
        args = build_parser().parse_args(argv)
        return args.handler(args)
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone: `sandbox params | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        return fail("interrupted", code=130)


def build_parser() -> argparse.ArgumentParser:
    """The command line, subcommand by subcommand."""
    parser = _Parser(
        prog="sandbox",
        description="Early-fusion multimodal models: train, ask, count, diagnose.",
    )
    commands = parser.add_subparsers(title="commands", metavar="<subcommand>", required=True)

    quick = commands.add_parser("quickstart", help="train a tiny model in minutes and question it")
    quick.add_argument("--out", type=Path, help="run directory (default: a new one under runs/)")
    quick.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: 0)")
    quick.add_argument("--steps", type=arguments.positive, help="train for so many steps only")
    quick.set_defaults(handler=_quickstart)

    for name, text in TRAINER_COMMANDS.items():  # listed for the help; main() dispatches them
        commands.add_parser(name, help=text, add_help=False)

    add_stages(commands)

    ablate = commands.add_parser(
        "ablate", help="compare arms under one budget: their runs, statistics and a report"
    )
    ablate.add_argument("file", type=Path, help="see sandbox/ablation/plan.py")
    ablate.add_argument(
        "--out", type=Path, help="output directory (default: a new one under runs/)"
    )
    ablate.add_argument("--resume", action="store_true", help="go on in --out where it stopped")
    add_launcher(ablate)
    ablate.set_defaults(handler=_ablate)

    ask = commands.add_parser("ask", help="put a question about images and videos to a checkpoint")
    ask.add_argument("question")
    ask.add_argument("--checkpoint", type=Path, required=True, help="file or run directory")
    ask.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    ask.add_argument(
        "--video",
        type=Path,
        action="append",
        default=[],
        help="a file, or a folder of frames; may be repeated, and comes after the images",
    )
    shown = ask.add_mutually_exclusive_group()
    shown.add_argument(
        "--frames",
        type=arguments.positive,
        help="so many of each video, evenly spread (default: 8)",
    )
    shown.add_argument(
        "--fps",
        type=partial(arguments.number, rule="a number above 0"),
        help="so many a second of video",
    )
    shown.add_argument(
        "--times", type=arguments.seconds, help="those that show at these seconds: 0.5,1,2"
    )
    ask.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    ask.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1 = off)")
    ask.add_argument("--top-k", type=int, default=0, help="of the k likeliest (default: 0 = all)")
    ask.add_argument("--max-tokens", type=int, default=64, help="default: 64")
    ask.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    ask.add_argument("--stop", action="append", default=[], help="end at this; may be repeated")
    add_placement(ask)
    ask.set_defaults(handler=_ask)

    imported = commands.add_parser(
        "import-hf", help="turn a transformers checkpoint into one of ours"
    )
    imported.add_argument("directory", type=Path, help="config.json and safetensors")
    imported.add_argument("out", type=Path, help="a .safetensors file, or a directory for one")
    imported.set_defaults(handler=_import_hf)

    exported = commands.add_parser("export-hf", help="turn a checkpoint into one for transformers")
    exported.add_argument("checkpoint", type=Path, help="file or run directory")
    exported.add_argument("directory", type=Path, help="a new one")
    exported.add_argument(
        "--shard-size",
        type=partial(arguments.number, rule="a number of GB above 0"),
        default=5.0,
        help="GB a file at most (default: 5)",
    )
    exported.set_defaults(handler=_export_hf)
    for command in (imported, exported):
        command.add_argument("--dtype", choices=DTYPES, default="keep", help="default: keep")

    curated = commands.add_parser(
        "curate", help="keep a balanced choice of captions, as MetaCLIP does"
    )
    curated.add_argument(
        "inputs", type=Path, nargs="+", metavar="IN.jsonl", help="records; may be gzipped"
    )
    curated.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    metadata = curated.add_mutually_exclusive_group(required=True)
    metadata.add_argument(
        "--metadata", type=Path, metavar="FILE", help="entries: a .json list, or one a line"
    )
    metadata.add_argument(
        "--build-metadata",
        type=arguments.positive,
        metavar="N",
        help="entries: words and bigrams that the captions have at least N times",
    )
    balance = curated.add_mutually_exclusive_group()
    balance.add_argument(
        "--threshold",
        type=arguments.positive,
        metavar="T",
        help="entries in up to T captions keep them all, others about T",
    )
    balance.add_argument(
        "--tail",
        type=partial(arguments.number, rule="a number between 0 and 1", below=1),
        default=0.06,
        metavar="SHARE",
        help="the T for which such entries hold this share of all matches (default: 0.06)",
    )
    curated.add_argument("--text-key", default="caption", help="default: caption")
    curated.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    curated.add_argument(
        "--jobs", type=arguments.positive, default=1, help="processes, one file each (default: 1)"
    )
    curated.add_argument(
        "--keep-matches", action="store_true", help="list a record's entries under 'metadata'"
    )
    curated.set_defaults(handler=_curate)

    add_evaluate(commands)
    add_score(commands)

    params = commands.add_parser("params", help="a preset's parameters, memory and KV cache")
    params.add_argument("preset", nargs="?", help="default: all presets")
    params.add_argument(
        "--context",
        type=arguments.tokens,
        default=131_072,
        help="tokens in the KV cache (default: 131072)",
    )
    params.add_argument("--json", action="store_true", help="print JSON")
    params.set_defaults(handler=_params)

    check = commands.add_parser("doctor", help="check the installation; names what cures a fault")
    check.set_defaults(handler=_doctor)
    return parser


def _quickstart(args: argparse.Namespace) -> int:
    from sandbox.quickstart import quickstart
    from sandbox.runs import new_run_dir

    quickstart(out=args.out or new_run_dir("quickstart"), seed=args.seed, steps=args.steps)
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from sandbox.ablation.command import ablate

    return ablate(args)


def _ask(args: argparse.Namespace) -> int:
    which = {name: getattr(args, name) for name in ("frames", "fps", "times")}
    if not args.video and any(which.values()):
        return fail("--frames, --fps and --times choose from a --video, and there is none", code=2)

    # Files first: a mistyped path should not wait for torch to load.
    from sandbox.data.media import load_image
    from sandbox.data.video import load_video
    from sandbox.runs import find_weights

    checkpoint = find_weights(args.checkpoint)
    images = [load_image(path) for path in args.image]
    clips = [load_video(path, **which) for path in args.video]

    from sandbox.checkpoint import load_model
    from sandbox.data.prompt import Image, Prompt, Turn, Video
    from sandbox.generate import Sampling

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    sampling = {name: getattr(args, name) for name in names}
    try:
        Sampling(**sampling)
    except UserError as error:
        return fail(str(error), code=2)
    prompt = Prompt(
        [Turn("user", [*map(Image, images), *(Video(*clip) for clip in clips), args.question])]
    )
    placement = choose(args.device, args.precision)
    model = placement.place(load_model(checkpoint))
    answer, shown = "", 0
    with placement.context():
        for _, piece in model.stream([prompt], **sampling):
            answer += piece
            # White space at the end waits for what follows it, and at the start it is never shown.
            print(answer.strip()[shown:], end="", flush=True)
            shown = len(answer.strip())
    print()
    return 0


def _import_hf(args: argparse.Namespace) -> int:
    from sandbox.checkpoint import import_hf

    path, note = import_hf(args.directory, args.out, args.dtype)
    print(path)
    if note:
        print(f"without a tokenizer, so it reads token ids alone: {note}")
    return 0


def _export_hf(args: argparse.Namespace) -> int:
    from sandbox.runs import find_weights

    checkpoint = find_weights(args.checkpoint)

    from sandbox.checkpoint import export_hf

    shards = export_hf(checkpoint, args.directory, args.dtype, args.shard_size)
    print(f"{args.directory} ({shards} file{'s' * (shards > 1)} of weights)")
    return 0


def _curate(args: argparse.Namespace) -> int:
    from sandbox.curate.run import Options, curate

    names = ("out", "metadata", "threshold", "tail", "text_key", "seed", "jobs", "keep_matches")
    chosen = {name: getattr(args, name) for name in names}
    try:
        options = Options(tuple(args.inputs), least_count=args.build_metadata, **chosen)
    except UserError as error:
        return fail(str(error), code=2)
    print(curate(options).summary())
    print(args.out)
    return 0


def _params(args: argparse.Namespace) -> int:
    from sandbox.backbone.config import PRESETS, preset

    try:
        configs = {args.preset: preset(args.preset)} if args.preset else PRESETS
    except UserError as error:
        return fail(str(error), code=2)

    from sandbox.params import describe, details, overview

    described = {name: describe(name, config, args.context) for name, config in configs.items()}
    if args.json:
        print(json.dumps(described, indent=2))
        return 0

    from rich.console import Console

    console = Console(highlight=False)
    if args.preset:
        console.print(details(args.preset, described[args.preset]))
    else:
        console.print(overview(described))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from sandbox.doctor import doctor

    return doctor()


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line. Abbreviated flags are mistakes: scripts outlive them."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


if __name__ == "__main__":
    sys.exit(main())
