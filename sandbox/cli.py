"""The `sandbox` command.

Parsing imports nothing heavy, so that help and usage errors answer at once; each handler imports
what it runs. Exit codes: 0 done, 1 failed, 2 the command line or configuration is wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sandbox.errors import UserError

# Handed to Lightning as they are: its parser knows their many flags.
TRAINER_COMMANDS = {
    "fit": "train a model as a YAML file says; --resume RUN goes on where a run stopped",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "store a checkpoint's predictions",
}


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
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone: `sandbox params | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)


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
    quick.add_argument("--steps", type=_positive, help="train for so many steps only")
    quick.set_defaults(handler=_quickstart)

    for name, text in TRAINER_COMMANDS.items():  # listed for the help; main() dispatches them
        commands.add_parser(name, help=text, add_help=False)

    ask = commands.add_parser("ask", help="put a question about images to a checkpoint")
    ask.add_argument("question")
    ask.add_argument("--checkpoint", type=Path, required=True, help="file or run directory")
    ask.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    ask.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1 = off)")
    ask.add_argument("--max-tokens", type=_positive, default=64, help="default: 64")
    ask.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    ask.set_defaults(handler=_ask)

    params = commands.add_parser("params", help="count a preset's total and active parameters")
    params.add_argument("preset", nargs="?", help="default: all presets")
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


def _ask(args: argparse.Namespace) -> int:
    # Files first: a mistyped path should not wait for torch to load.
    from sandbox.data.media import load_image
    from sandbox.runs import find_weights

    checkpoint = find_weights(args.checkpoint)
    images = [load_image(path) for path in args.image]

    from sandbox.checkpoint import load_model
    from sandbox.data.prompt import Prompt

    model = load_model(checkpoint)
    (answer,) = model.generate(
        [Prompt.ask(args.question, images)],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(answer)
    return 0


def _params(args: argparse.Namespace) -> int:
    from sandbox.backbone.config import PRESETS, preset

    try:
        configs = {args.preset: preset(args.preset)} if args.preset else PRESETS
    except UserError as error:
        return _fail(str(error), code=2)

    from sandbox.params import count, table

    counts = {name: count(config) for name, config in configs.items()}
    if args.json:
        print(json.dumps(counts, indent=2))
        return 0

    from rich.console import Console

    for name, counted in counts.items():
        Console().print(table(name, counted))
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
