"""Muon beside AdamW in one optimizer: parity, schedule, and what a resumed run keeps."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.train import optim
from sandbox.train.optim import (
    MuonAdamW,
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    matrices,
    orthogonalize,
)


def test_muon_equals_torchs_own_on_matrices():
    """Guards against a momentum, scale or decay that is not Muon's (torch iterates in bf16)."""
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(16, 24), torch.randn(16, 16)]
    ours = [nn.Parameter(w.clone()) for w in start]
    theirs = [nn.Parameter(w.clone()) for w in start]
    options = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
    optimizers = (
        MuonAdamW([{"params": ours, "muon": True, "newton_schulz_steps": 5, **options}]),
        torch.optim.Muon(theirs, nesterov=True, ns_steps=5, **options),
    )
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        moved = (b - w).norm()
        assert (a - b).norm() / moved < 0.01


def test_each_expert_is_orthogonalised_by_itself():
    """Guards against stacked experts flattened into one matrix, which couples their updates."""
    torch.manual_seed(0)
    stacked = torch.randn(3, 8, 20)
    together = orthogonalize(stacked, 5)
    for e in range(3):
        torch.testing.assert_close(together[e], orthogonalize(stacked[e][None], 5)[0])
    singular = torch.linalg.svdvals(together)
    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_embeddings_heads_routers_and_norms_are_adamws():
    """Guards against Muon on a matrix whose rows are looked up, not multiplied."""
    model = Backbone(BackboneConfig(moe_every=2))
    muon = {name for name, p in model.named_parameters() if p in matrices(model)}
    rest = {name for name, _ in model.named_parameters()} - muon
    assert all("norm" in n or "router" in n or n in ("embed.weight", "head.weight") for n in rest)
    assert any("experts.gate_up" in name for name in muon)


def test_the_schedule_warms_up_and_falls_to_its_end():
    """Guards against a first step at full rate, and a last one at none."""
    for schedule in ("cosine", "linear"):
        config = OptimizerConfig(schedule=schedule, warmup=10, hold=0.5, final=0.1)
        rates = [learning_rate(config, step, 100) for step in range(101)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[9] == rates[10] == pytest.approx(1.0)
        assert all(a >= b for a, b in pairwise(rates[10:]))
        assert rates[100] == pytest.approx(0.1)


def trained(config: OptimizerConfig, steps: int, state=None):
    """A small model after some updates, with its optimizer and schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer, schedule = build_optimizer(model, config, steps=20)
    if state:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        schedule.load_state_dict(state[2])
    for _ in range(steps):
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule


def test_a_resumed_optimizer_continues_to_the_bit():
    """Guards against a schedule or momentum that starts anew."""
    config = OptimizerConfig(warmup=3)
    whole = trained(config, 9)[0]
    model, optimizer, schedule = trained(config, 4)
    states = (model.state_dict(), optimizer.state_dict(), schedule.state_dict())
    resumed = trained(config, 5, states)[0]
    assert all(a.equal(b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_new_learning_rate_beats_the_checkpoints():
    """Guards against a checkpoint that silently overrides the command line."""
    model, optimizer, schedule = trained(OptimizerConfig(warmup=0), 10)
    states = (model.state_dict(), optimizer.state_dict(), schedule.state_dict())
    _, changed, _ = trained(OptimizerConfig(warmup=0, lr=0.5, muon_lr=0.25), 0, states)
    share = learning_rate(OptimizerConfig(warmup=0), 10, 20)
    rates = {group["muon"]: group["lr"] for group in changed.param_groups}
    assert rates == {True: pytest.approx(0.25 * share), False: pytest.approx(0.5 * share)}


# --- Memory ---------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of all that was made inside."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Random parameters, with gradients."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def muon(parameters: list[nn.Parameter], **options: Any) -> MuonAdamW:
    """An optimizer that updates all of them by Muon."""
    group = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9, "newton_schulz_steps": 5} | options
    return MuonAdamW([{"params": parameters, "muon": True, **group}], fused=True)


def test_muon_takes_less_memory_than_its_largest_group_and_a_half():
    """Guards against updates of all shapes that are alive at once, and copies of whole groups."""
    parameters = weights(*[(16, 64, 128)] * 16, *[(16, 64, 64)] * 16)
    optimizer = muon(parameters)
    optimizer.step()
    states = [state["momentum"] for state in optimizer.state.values()]
    with Peak([*parameters, *states, *(p.grad for p in parameters if p.grad is not None)]) as peak:
        optimizer.step()
    largest = 16 * 16 * 64 * 128 * 4
    assert 0.1 * largest < peak.bytes < 1.5 * largest


def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    """Guards against matrices that are skipped or updated twice where a piece ends, within a stack
    of experts or between parameters.
    """
    shapes = [(8, 16)] * 3 + [(5, 8, 16)] * 3 + [(16, 8)] * 2 + [(7, 24, 24)]
    results = []
    for pieces, smallest in ((1, 1 << 18), (4, 1), (1000, 1)):
        monkeypatch.setattr(optim, "_PIECES", pieces)
        monkeypatch.setattr(optim, "_SMALLEST", smallest)
        parameters = weights(*shapes)
        optimizer = muon(parameters)
        for _ in range(3):
            optimizer.step()
        results.append(parameters)
    whole, *others = results
    for other in others:
        assert all(a.equal(b) for a, b in zip(whole, other, strict=True))


# --- Precision ------------------------------------------------------------------------------------


def test_a_gradient_scaler_skips_what_overflows():
    """Guards against Muon that applies scaled gradients, or those that are not finite: fused AdamW
    would leave unscaling and skipping to a step that knows nothing of either.
    """
    parameters = weights((4, 6), (6,))
    groups = [
        {"params": parameters[:1], "muon": True, "momentum": 0.9, "newton_schulz_steps": 5},
        {"params": parameters[1:], "muon": False},
    ]
    optimizer = MuonAdamW(groups, lr=0.1, fused=True)
    plain = deepcopy(parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # makes the scaler's state
    before = [p.detach().clone() for p in parameters]
    kept = [p.grad.clone() for p in parameters if p.grad is not None]
    for scale, moves in ((float("inf"), False), (512.0, True)):  # the first halves the scale
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient * scale
        scaler.step(optimizer)
        scaler.update()
        moved = [not a.equal(b) for a, b in zip(parameters, before, strict=True)]
        assert moved == [moves, moves]
    groups = [g | {"params": [p]} for g, p in zip(groups, plain, strict=True)]
    for parameter, gradient in zip(plain, kept, strict=True):
        parameter.grad = gradient
    MuonAdamW(groups, lr=0.1, fused=True).step()
    for a, b in zip(parameters, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_small_updates_of_bf16_weights_add_up():
    """Guards against weights that stop where an update is less than half of bf16's last bit."""
    rounded, exact = weights((8, 8), dtype=torch.bfloat16), weights((8, 8))
    exact[0].data.copy_(rounded[0])
    start = exact[0].detach().clone()
    optimizers = [muon(each, lr=1e-3, weight_decay=0.0) for each in (rounded, exact)]
    for _ in range(200):
        rounded[0].grad = torch.randn(8, 8).add(0.5).bfloat16()
        exact[0].grad = rounded[0].grad.float()
        for optimizer in optimizers:
            optimizer.step()
    last_bit = 2**-8 * exact[0].abs()
    assert ((rounded[0].float() - exact[0]).abs() <= last_bit).all()
    assert (exact[0] - start).norm() > 5 * last_bit.norm()


def test_a_resumed_optimizer_of_bf16_weights_continues_to_the_bit():
    """Guards against a momentum that torch rounds to bf16 when it is loaded."""

    def moved(steps: int, state: Any = None) -> tuple[nn.Parameter, dict[str, Any]]:
        (parameter,) = weights((2, 8, 16), dtype=torch.bfloat16)
        optimizer = muon([parameter])
        if state:
            parameter.data.copy_(state[0])
            optimizer.load_state_dict(state[1])
        for _ in range(steps):
            optimizer.step()
        return parameter, optimizer.state_dict()

    whole, resumed = moved(5), moved(2, moved(3))
    assert resumed[1]["state"][0]["momentum"].dtype == torch.float32
    for a, b in zip(tree_leaves(whole), tree_leaves(resumed), strict=True):
        assert a.equal(b) if isinstance(a, Tensor) else a == b


def test_eps_reaches_adamw():
    """Guards against a setting without effect."""
    model = nn.Linear(3, 3)
    groups = [
        build_optimizer(model, OptimizerConfig(**given), steps=2)[0].param_groups
        for given in ({}, {"eps": 1e-6})
    ]
    assert [{group["eps"] for group in each} for each in groups] == [{1e-8}, {1e-6}]
