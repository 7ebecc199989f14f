"""A model against a published benchmark: every question answered, scored and kept.

``evaluate_benchmark`` is what `sandbox evaluate` runs, for notebooks and scripts.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sandbox.checkpoint import load_model, provenance
from sandbox.data.task import Question, Split, Task
from sandbox.devices import AUTO, Placement, choose
from sandbox.errors import UserError
from sandbox.evals import extraction
from sandbox.evals.answering import GROUP, TILES, TOKENS
from sandbox.evals.asking import Asking
from sandbox.evals.benchmark_scores import ALL, MEAN, extraction_of, majority, scored, table
from sandbox.evals.catalog import BENCHMARKS, Known
from sandbox.evals.gallery import write_gallery
from sandbox.evals.judging import Judge
from sandbox.evals.predictions import Prediction, PredictionFile
from sandbox.evals.progress import Meter
from sandbox.evals.run import exchange, write_json
from sandbox.model import VisionLanguageModel
from sandbox.runs import find_weights

SUMMARY, GALLERY = "summary.json", "gallery.html"
LEARNED = 10_000  # training samples that the commonest answers are taken of, at most
CONFIDENCE = "product of the reply's token probabilities, the end of turn included"


@dataclass(frozen=True)
class BenchmarkResults:
    """What an evaluation found.

    Attributes:
        summary: what ``summary.json`` holds.
        predictions: every question about its own images, in the order of the benchmark.
        controls: the same questions about no image, and about exchanged ones, by name.
        out: where the files are, if there are any.
    """

    summary: dict[str, Any]
    predictions: list[Prediction]
    controls: dict[str, list[Prediction]]
    out: Path | None

    @property
    def scored(self) -> bool:
        """Whether the right answers are known."""
        return "score" in self.summary

    def table(self) -> Table:
        """The scores for people, if there are any."""
        return table(self.summary)


def evaluate_benchmark(
    model: VisionLanguageModel | str | Path,
    benchmark: str | Task,
    *,
    data: str | Path | None = None,
    split: Split = "test",
    out: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_tokens: int = 32,
    metric: str | None = None,
    mode: str | None = None,
    extract: bool = False,
    controls: bool = True,
    resume: bool = False,
    device: str = AUTO,
    precision: str = AUTO,
) -> BenchmarkResults:
    """Ask a model every question of a benchmark, and score its greedy replies.

    The same questions are then asked without images and about exchanged ones (what is still right
    was not seen), and the commonest training answers are scored where there is a train split.

    The same model, data and settings give the same predictions, scores and confidences, to the last
    bit, whatever the batch size and however often the evaluation was killed and resumed (see
    ``answering``).

    Args:
        model: one in memory, which keeps its device and dtype, or a checkpoint or run directory.
        benchmark: a name in ``catalog.BENCHMARKS``, or any task.
        data: where the named benchmark lies.
        split: which to ask about.
        out: directory for ``predictions.jsonl``, ``summary.json``, ``gallery.html``,
            ``evaluation.json`` (the settings) and the official file of answers; None: no files.
        limit: ask about the first so many samples only.
        batch_size: questions that are read and encoded ahead; it changes no result.
        max_tokens: the longest reply.
        metric: a name in ``score.METRICS``; None = the benchmark's own, ``exact`` for a task.
        mode: of the metric; None = its first. The summary has the others too.
        extract: score the answer found in each reply, see ``extraction``. Multiple choice always
            needs its letter found. Where none is found, the reply is wrong.
        controls: also ask without images and about exchanged ones.
        resume: go on with what ``out`` holds.
        device: of a checkpoint, see ``devices.choose``: by default CUDA if there is one.
        precision: of a checkpoint; by default its dtype.

    Raises:
        UserError: an argument, the data or the checkpoint is wrong, or ``out`` is of another
            evaluation.
    """
    name, known, task = _open(benchmark, data, split)
    judge = Judge(metric or (known.metric if known else "exact"), mode, extract)
    samples = _samples(task, split, limit)
    model, checkpoint, placement = _loaded(model, device, precision)
    settings = {
        "weights": checkpoint["sha256"],
        "benchmark": name,
        "data": task.identity(),
        "split": split,
        "samples": samples,
        "max_tokens": max_tokens,
        **asdict(judge),
        "metric_version": judge.about.version,
        "extraction_version": extraction.VERSION,
        "controls": controls,
        "device": placement.device.type,
        "precision": placement.precision,
        "computed_together": {"questions": GROUP, "tokens": TOKENS, "tiles": TILES},
    }
    out = None if out is None else Path(out)
    file = PredictionFile(out, settings, resume=resume) if out else None
    try:
        with Meter() as meter, placement.context():
            begun = Asking(model, task, split, batch_size, max_tokens, judge, file, meter)
            own = begun.answer_all("own", [(index, index) for index in range(samples)])
            if not own:
                raise UserError(f"the split '{split}' holds no question")
            known_answers = all(each.targets for each in own)
            others, notes = _controls(begun) if controls and known_answers else ({}, [])
    finally:
        if file:
            file.close()
    summary: dict[str, Any] = {"benchmark": name, "split": split}
    headline = MEAN if known and known.mean else ALL
    if known_answers:
        summary |= scored(own, others, judge, headline)
        if controls:
            learned, told = _learned(known, task, data, split)
            common = majority(learned, own, judge, headline) if learned else None
            summary["controls"]["majority"] = common
            notes += told
    else:
        lack = sum(not each.targets for each in own)
        notes = [f"{lack} of {len(own)} questions have no known answer: nothing is scored"]
    summary |= {
        "notes": notes,
        "extraction": extraction_of(own, judge),
        "confidence": CONFIDENCE,
        "checkpoint": checkpoint,
        "model": _told(model),
        "settings": settings,
        "provenance": provenance(),
        # The only part that is not the same when all is done again.
        "timing": {
            "seconds": round(meter.seconds, 3),
            "questions": meter.questions,
            "questions_per_second": round(meter.rate, 1),
            "threads": torch.get_num_threads(),
        },
    }
    if out:
        write_json(out / SUMMARY, summary)
        if known and known.results:
            _write_results(out / known.results[0], own, known.results[1])
        write_gallery(out / GALLERY, task, own, summary)
    return BenchmarkResults(summary, own, others, out)


def _open(
    benchmark: str | Task, data: str | Path | None, split: Split
) -> tuple[str, Known | None, Task]:
    if isinstance(benchmark, Task):
        return type(benchmark).__qualname__, None, benchmark
    if benchmark not in BENCHMARKS:
        near = get_close_matches(benchmark, BENCHMARKS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown benchmark {benchmark!r}: did you mean {near!r}?")
    if data is None:
        raise UserError(f"benchmark {benchmark}: say where its files lie, by data")
    known = BENCHMARKS[benchmark]
    return benchmark, known, known.open(Path(data), split)


def _samples(task: Task, split: Split, limit: int | None) -> int:
    size = task.size(split)
    if size is None and limit is None:
        raise UserError(f"the split '{split}' has no end: set a limit")
    if size == 0:
        raise UserError(f"the split '{split}' has no sample to evaluate on")
    return min(n for n in (size, limit) if n is not None)


def _loaded(
    model: VisionLanguageModel | str | Path, device: str, precision: str
) -> tuple[VisionLanguageModel, dict[str, Any], Placement]:
    """The model, its identity (path and hash of the file, or hash of its tensors), and its place.

    Raises:
        UserError: no such checkpoint or device, or a device is chosen for a model in memory.
    """
    if not isinstance(model, VisionLanguageModel):
        path = find_weights(model)
        placement = choose(device, precision)
        with path.open("rb") as file:
            told = hashlib.file_digest(file, "sha256")
        loaded = placement.place(load_model(path))
        return loaded, {"path": str(path), "sha256": told.hexdigest()}, placement
    if (device, precision) != (AUTO, AUTO):
        raise UserError(
            "device and precision are those of a checkpoint that is loaded: a model in memory "
            "keeps its own; place it with sandbox.devices"
        )
    told = hashlib.sha256(json.dumps(model.describe(), default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        told.update(name.encode())
        told.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    placement = Placement(model.backbone.embed.weight.device)
    return model, {"path": None, "sha256": told.hexdigest()}, placement


def _controls(begun: Asking) -> tuple[dict[str, list[Prediction]], list[str]]:
    """The passes without the right images, and why one is missing."""
    pictured = list(begun.pictured)
    if not pictured:
        return {}, ["no question is about an image: there are no controls without the right one"]
    found = {"no_image": begun.answer_all("none", [(index, index) for index in pictured])}
    shift = exchange(list(begun.pictured.values()))
    if shift is None:
        return found, ["the images are too few, or too much alike, to be exchanged"]
    rolled = pictured[shift:] + pictured[:shift]
    pairs = list(zip(pictured, rolled, strict=True))
    return {**found, "shuffled_images": begun.answer_all("shuffled", pairs)}, []


def _learned(
    known: Known | None, task: Task, data: str | Path | None, split: Split
) -> tuple[list[Question], list[str]]:
    """Training questions with answers, and what there is to say about them."""
    without = "no commonest answers for a control: "
    if split == "train":
        return [], [f"{without}the split is the one they would be taken of"]
    source = task
    if known and data is not None:
        if known.files and Path(data).is_file():
            return [], [f"{without}{data} is one split, give a folder that has train too"]
        try:
            source = known.open(Path(data), "train")
        except UserError as error:
            return [], [f"{without}{error}"]
    size = source.size("train")
    learned = range(LEARNED if size is None else min(size, LEARNED))
    asked = [q for i in learned for q in source.questions_of("train", i) if q.answer]
    if not asked:
        return [], [f"{without}there is no train split with answers"]
    cut = size is None or size > LEARNED
    return asked, [f"commonest answers of the first {LEARNED:,} train samples"] if cut else []


def _told(model: VisionLanguageModel) -> dict[str, object]:
    """The model's description, with its vocabulary's fingerprint instead of the vocabulary."""
    assert model.tokenizer is not None  # it has replied
    return {**model.describe(), "tokenizer": model.tokenizer.fingerprint}


def _write_results(path: Path, own: Iterable[Prediction], key: str) -> None:
    """The official file of answers: a list of {key: number, "answer": text}."""
    results = [{key: int(each.id), "answer": each.answer or ""} for each in own]
    path.write_text(json.dumps(results) + "\n")  # ASCII: a reply may hold half a character
