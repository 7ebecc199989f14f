"""Muon beside AdamW in one optimizer: parity, schedule, and what a resumed run keeps."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
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
