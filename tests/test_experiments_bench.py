"""The benchmark: its statistics, what it counts, and every section in miniature."""

import gc
import importlib.util
import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench, bench_step
from experiments.bench_chart import draw
from experiments.bench_loss import Fresh
from experiments.bench_measure import Bench, Row, Spread, agree, ratios, time_limit
from experiments.bench_models import (
    MINIATURE,
    matmul_flops,
    our_loss,
    random_tokens,
    their_loss,
    training_step,
    twins,
)
from experiments.bench_parts import Result, there_and_back
from experiments.bench_peers import ExpertLoop
from experiments.bench_report import digits, quantity
from experiments.bench_step import check
from experiments.bench_step_worker import Masks
from experiments.bench_whole import decode_bytes
from sandbox.backbone.transformer import Backbone
from sandbox.backbone.visibility import Coordinates, visible

CPU = torch.device("cpu")
QUICK = Bench(CPU, rounds=2, quick=True)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="compares with transformers"
)


# --- Statistics -----------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round():
    """Guards against a ratio of medians: drift between rounds would pass for a difference."""
    ours, peer = (1.0, 5.0, 2.0), (3.0, 10.0, 2.0)
    assert ratios(peer, ours) == Spread(2.0, 1.5, 2.5)
    drifting = Row("train", "case", (1.0, 2.0, 4.0), "peer", (3.0, 6.0, 12.0))
    assert drifting.ratio == Spread(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("gain", "goal", "met"),
    [(True, 3.9, True), (True, 4.1, False), (False, 0.26, True), (False, 0.24, False)],
)
def test_a_goal_bounds_gains_from_below_and_costs_from_above(gain, goal, met):
    """Guards against an inequality the wrong way round, which reports every miss as met."""
    row = Row("moe", "case", (1.0,), "peer", (4.0,), gain=gain, goal=goal)
    assert row.met is met
    assert replace(row, goal=None).met is None


def test_contenders_take_turns_after_a_warmup_and_without_garbage_collection():
    """Guards against timing one contender after the other, or the first calls, or the collector."""
    calls: list[str] = []

    def contender(name: str, start: float):
        def sample() -> float:
            assert not gc.isenabled()
            calls.append(name)
            return start + calls.count(name)

        return sample

    a, b = Bench(CPU, rounds=3).interleave(contender("a", 0), contender("b", 10), warmup=1)
    assert calls == ["a", "b"] * 4
    assert (a, b) == ((2, 3, 4), (12, 13, 14))
    assert gc.isenabled()


def test_what_differs_is_not_timed():
    """Guards against a fast wrong answer, and against NaN, which compares as no difference."""
    x = torch.randn(8)
    agree("same", x, x + 1e-7, 1e-5)
    for wrong in (x + 0.1, x * torch.nan, x[:4]):
        with pytest.raises(RuntimeError, match="output"):
            agree("output", wrong, x, 1e-5)


def test_memory_is_asked_for_before_it_is_taken():
    """Guards against a case that the system kills, and every finished section with it."""
    assert not QUICK.lacks(1)
    assert "1000000000.0 GB" in QUICK.lacks(1e18)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0123, "s/step", "12.3 ms/step"), (4.97e9, "B", "4.97 GB"), (2.5e-5, "s", "25.0 µs")],
)
def test_quantities_are_readable(value, unit, text):
    """Guards against a prefix off by a thousand."""
    assert quantity(value, unit) == text
    assert digits(1234.5) == "1234"


# --- Equal weights, and what is counted -----------------------------------------------------------


@needs_transformers
def test_both_models_compute_and_learn_the_same():
    """Guards against a comparison of models that differ, or of a step that skips its update."""
    config = replace(MINIATURE, experts=3)
    tokens = random_tokens(QUICK, config, 2, 24)
    ours, theirs = twins(config, CPU)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    step = training_step(ours, our_loss(ours, tokens))
    their_step = training_step(theirs, their_loss(theirs, tokens))
    losses = [(step().item(), their_step().item()) for _ in range(3)]
    for our, their in losses:
        assert our == pytest.approx(their, abs=1e-5)
    assert losses[2][0] < losses[0][0]


def test_matmul_flops_are_those_of_the_step():
    """Guards against a floor too low (a matmul forgotten) or too high (one counted twice)."""
    config = replace(MINIATURE, experts=0, dense_hidden=48)
    B, T = 2, 21
    model = Backbone(config)
    tokens = random_tokens(QUICK, config, B, T)
    with FlopCounterMode(display=False) as counter:
        logits = model.unembed(model(tokens).hidden[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    operations = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in operations.items() if "attention" not in str(op))
    place = torch.arange(T)
    zeros = torch.zeros_like(place)
    row = Coordinates(place, zeros, zeros, zeros)
    pairs = sum(
        int(visible(row, row, config.chunk if config.uses_rope(layer) else None).sum())
        for layer in range(config.layers)
    )
    attention = 12 * B * pairs * config.heads * config.head_dim
    assert matmul_flops(config, B, T, train=True) == linear + attention


def test_routed_experts_count_as_often_as_they_are_visited():
    """Guards against a floor that charges a token for experts it never sees."""
    counts = [
        matmul_flops(replace(MINIATURE, experts=4, top_k=k), 1, 8, train=True) for k in (1, 2)
    ]
    expert = 3 * MINIATURE.width * MINIATURE.expert_hidden
    assert counts[1] - counts[0] == 6 * 8 * MINIATURE.layers * expert


def test_decoding_must_read_every_weight_once_and_the_keys_in_sight():
    """Guards against a bandwidth floor that leaves out the cache, the head or the experts."""
    config = replace(MINIATURE, experts=1, chunk=8)
    model = Backbone(config)
    B, T, steps = 3, 12, 2
    tokens = random_tokens(QUICK, config, B, T + steps + 1)
    with torch.inference_mode():
        counted = decode_bytes(model, tokens[:, :T], tokens[:, T:])
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1)
    weights -= model.embed.weight.numel()
    # Places 12 and 13: local layers see 5 and 6 keys of their chunk, the global one 13 and 14.
    seen = 3 * 5.5 + 13.5
    keys_and_values = B * seen * 2 * config.kv_heads * config.head_dim
    assert counted == 4 * (weights + keys_and_values)


@pytest.mark.parametrize("unbound", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loop_over_experts_is_the_layer(top_k, unbound):
    """Guards against a peer that is fast because it computes something else."""
    torch.manual_seed(0)
    ours = Backbone(replace(MINIATURE, experts=5, top_k=top_k)).layers[0].ffn
    loop = ExpertLoop(ours, unbound=unbound)
    x = torch.randn(2, 9, MINIATURE.width)
    for our, their in zip(*(there_and_back(Result(m), x)() for m in (ours, loop)), strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)
    loop(x)[0].sum().backward()
    ours(x)[0].sum().backward()
    gate, up = ours.experts.gate_up.grad.chunk(2, dim=-1)
    torch.testing.assert_close(loop.gate.grad, gate, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loop.up.grad, up, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loop.router.grad, ours.router.weight.grad, atol=1e-5, rtol=1e-4)


def test_masks_are_found_and_other_tensors_are_not():
    """Guards against a count of mask bytes that misses masks, or counts logits."""
    with Masks(24) as spy:
        torch.ones(4, 24).gt(0.5)
        torch.ones(4, 24, 64) * 2
        assert spy.largest == 0
        place = torch.arange(24)
        place[:, None].ge(place)
        assert spy.largest == 24 * 24
        torch.ones(3, 24, 24) * 2
    assert spy.largest == 4 * 3 * 24 * 24


def test_sides_that_learn_other_things_are_not_compared():
    """Guards against a faster step that skipped labels, or computed another loss."""
    side, peer = (SimpleNamespace(root=name, facts={"labels": 9}) for name in "ab")
    check(side, [2.0, 1.9, 5.0], peer, [2.0, 1.9, 1.0])  # later losses drift by rounding
    with pytest.raises(RuntimeError, match=r"step 1: loss 1\.8, but 1\.9 in b"):
        check(side, [2.0, 1.8], peer, [2.0, 1.9])
    with pytest.raises(RuntimeError, match="9 labels, but 8 in b"):
        check(side, [2.0, 1.9], SimpleNamespace(root="b", facts={"labels": 8}), [2.0, 1.9])


def test_what_takes_too_long_is_interrupted():
    """Guards against a compilation that takes the whole time that a GPU was lent for."""
    with pytest.raises(TimeoutError, match="took more than"), time_limit(0.05):
        time.sleep(10)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # the alarm is off


@pytest.mark.slow
def test_the_plain_loss_peaks_higher_by_its_logits():
    """Guards against a peak that misses the allocations, or was reached before the call."""
    M, V = 1024, 16_384
    ours, plain = (Fresh(QUICK, kind, M, 16, V)() for kind in ("chunked", "plain"))
    assert plain > 2 * 4 * M * V
    assert 4 * 16 * (M + V) < ours < plain


# --- End to end -----------------------------------------------------------------------------------

SLOW = {"loss", "step"} | {"gpu", "compiled"}  # start processes, or trace a model


@needs_transformers
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in bench.SECTIONS],
)
def test_every_section_runs_in_miniature(name, tmp_path, capsys):
    """Guards against an hour's benchmark that fails in its last section."""
    command = ["--quick", "--rounds", "2", "--sections", name, "--out", str(tmp_path)]
    assert bench.main([*command, "--against", str(bench_step.ROOT)]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["rows"]
    assert not content["skipped"]
    for row in content["rows"]:
        assert len(row["ours"]) == len(row["peer"]) == 2
        assert min(row["ours"] + row["peer"]) > 0
    assert {"machine", "cpu", "commit", "torch", "transformers"} <= content["facts"].keys()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert all(row["against"] in " ".join(shown.split()) for row in content["rows"])


def test_the_picture_shows_goals_kept_and_missed_and_curves(tmp_path):
    """Guards against a picture that fails on what a rehearsal never has: goals."""
    rows = [
        Row("train", "16 experts", (1.0, 1.1), "transformers", (7.0, 7.2), goal=6.5),
        Row("moe", "64 experts", (1.8, 1.7), "dense", (1.0, 1.0), gain=False, goal=1.6),
        *(Row("attention", f"{T}", (1e-5,), "SDPA", (T / 1e8,), length=T) for T in (2048, 8192)),
    ]
    assert draw(tmp_path / "rows.png", rows, "a machine")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert not draw(tmp_path / "none.png", [], "a machine")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "train,decoding"], "unknown section decoding"),
        (["--rounds", "0"], "least 1"),
    ],
)
def test_a_wrong_command_line_is_refused_at_once(arguments, message, capsys):
    """Guards against a typing error that shows after the sections before it."""
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


@needs_transformers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--sections", "step", "--against", "no-such-revision"],
            "--against no-such-revision: nei",
        ),
        (["--cpu-time", "--threads", "2"], "--cpu-time: only with --device cpu and one thread"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, message, tmp_path, capsys):
    """Guards against git's error, or CPU seconds of two threads that pass for time."""
    threads = torch.get_num_threads()
    try:
        assert bench.main([*arguments, "--quick", "--out", str(tmp_path)]) == 1
    finally:
        torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@needs_transformers
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a CUDA device")
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gpu", "skipped: all cases: PyTorch sees no CUDA device"),
        ("step", "skipped: all cases: name what to compare with: --against"),
    ],
)
def test_a_section_that_cannot_run_says_so_and_succeeds(name, line, tmp_path, capsys):
    """Guards against a failed run on the machines that most people have."""
    assert bench.main(["--sections", name, "--out", str(tmp_path)]) == 0
    assert line in " ".join(capsys.readouterr().out.split())


def test_without_transformers_the_cure_is_named(monkeypatch, tmp_path, capsys):
    """Guards against a traceback for who installed without the developers' packages."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "uv sync" in capsys.readouterr().err
