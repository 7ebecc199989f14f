"""A sweep told to a person: ``report.html``, one page that loads nothing, and ``report.md``.

The same files give the same reports, byte for byte.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined

from sandbox.ablation.charts import curves, forest, gates, loads
from sandbox.ablation.examples import Disagreements, Example, disagreements
from sandbox.ablation.results import (
    CONTROLS,
    RESULTS,
    Reply,
    Results,
    read_results,
    write_results,
)
from sandbox.ablation.tables import (
    Table,
    machine,
    matched,
    missing,
    named,
    tables,
    verdicts,
)
from sandbox.report.page import data_uri

PAGE, TEXT = "report.html", "report.md"
WITHOUT = "Without a result, and left out of every figure:"
READING = (
    "How to read it: several arms are compared with one baseline, so an arm is called higher or "
    "lower only where its p, adjusted by Holm’s method, is below 0.05. Each interval stands alone; "
    "it is about other seeds and other images. Cohen’s h measures a difference of shares: 0.2 is "
    "small, 0.5 medium, 0.8 large."
)
COLOURS = 8  # of arms; the ninth has that of the first again


def write_report(out: Path) -> str:
    """Write ``results.json``, ``report.md`` and ``report.html`` into a sweep's directory.

    Returns:
        The verdict on each arm, and what is missing, as Markdown.

    Raises:
        UserError: ``out`` is no sweep's directory.
    """
    results = read_results(out)
    write_results(results, out / RESULTS)
    found = {
        name: disagreements(results, name) for name in results.arms if name != results.baseline
    }
    found = {name: each for name, each in found.items() if each.shown}
    text = "\n\n".join(_markdown(results, found)) + "\n"
    (out / TEXT).write_text(text, encoding="utf-8")
    (out / PAGE).write_text(_page(results, found), encoding="utf-8")
    return "\n\n".join(_verdict(results))


# --- Markdown -------------------------------------------------------------------------------------


def _markdown(results: Results, found: Mapping[str, Disagreements]) -> Iterator[str]:
    yield f"# {results.question}"
    runs = f"{len(results.arms)} arms, seeds {', '.join(map(str, results.seeds))}"
    yield f"{runs}; each run with {matched(results)}. With charts and pictures: [{PAGE}]({PAGE})."
    yield from _verdict(results)
    yield READING
    yield "## The figures"
    for table in tables(results):
        yield f"### {table.title}"
        yield _table(table)
        if table.note:
            yield table.note
    for name, each in found.items():
        yield f"## {name} against {results.baseline}, question by question"
        yield _told(each)
        yield "\n".join(_example(results.baseline, name, example) for example in each.shown)
    yield "## What each arm changes"
    yield f"Beside the base configuration, {results.base}."
    for name, arm in results.arms.items():
        changes = [
            f"- `{key}`: `{_plain(before)}` → `{_plain(after)}`"
            for key, (before, after) in arm.changes.items()
        ]
        yield f"### {name}\n\n" + ("\n".join(changes) or "Nothing: it is the base.")
    yield "## Do it again"
    yield "\n".join(["```", _again(results), *results.commands, "```"])
    yield "\n".join(f"- {name}: {value}" for name, value in machine(results).items())


def _verdict(results: Results) -> Iterator[str]:
    yield "\n".join(f"- **{v.arm}**: {v.sentence}" for v in verdicts(results, results.metrics[0]))
    if lines := missing(results):
        yield "\n".join([WITHOUT, "", *(f"- {line}" for line in lines)])


def _table(table: Table) -> str:
    align = [*["---"] * table.labels, *["--:"] * (len(table.header) - table.labels)]
    rows = [table.header, align, *table.rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows
    )


def _example(baseline: str, name: str, example: Example) -> str:
    def replies(each: Mapping[int, Reply]) -> str:
        return ", ".join(
            f"{reply.reply or '(none)'} {'✓' if reply.correct else '✗'}" for reply in each.values()
        )

    asked = example.asked
    return (
        f"- {asked.split} {asked.index}: “{asked.question}” truth: {asked.answer}; "
        f"{baseline}: {replies(example.baseline)}; {name}: {replies(example.arm)}"
    )


# --- HTML -----------------------------------------------------------------------------------------


def _page(results: Results, found: Mapping[str, Disagreements]) -> str:
    environment = Environment(
        loader=PrefixLoader(
            {room: PackageLoader(f"sandbox.{room}", ".") for room in ("ablation", "report")}
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "plain": _plain, "told": _told}
    arms = results.arms.items()
    return environment.get_template("ablation/page.html.jinja").render(
        results=results,
        matched=matched(results),
        verdicts=verdicts(results, results.metrics[0]),
        missing=missing(results),
        without=WITHOUT,
        reading=READING,
        metric=named(results.metrics[0]),
        colours={name: n % COLOURS + 1 for n, name in enumerate(results.arms)},
        forest=forest(results),
        controls=list(CONTROLS),
        tables=tables(results),
        curves=curves(results),
        gates={name: gates(arm) for name, arm in arms if gates(arm)},
        loads={name: loads(arm) for name, arm in arms if loads(arm)},
        disagreements=found,
        again=_again(results),
        machine=machine(results),
    )


# --- Both -----------------------------------------------------------------------------------------


def _told(found: Disagreements) -> str:
    """How many questions, and which of them are shown."""
    return (
        f"Of the questions about unseen pictures, it does better on {found.better:,} (most of its "
        f"seeds are right, and most of the baseline’s wrong) and worse on {found.worse:,}. Here "
        f"are {len(found.shown)} of them, the clearest first, the question types taking turns."
    )


def _plain(value: Any) -> str:
    """A value of a configuration on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _again(results: Results) -> str:
    return shlex.join(["sandbox", "ablate", results.file])
