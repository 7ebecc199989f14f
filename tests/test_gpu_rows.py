"""Rows of every kind on a GPU: losses, gradients and hidden states are those of the rule.

What is compared with is written out in fp64 in ``rows.py``. Each test runs on the CPU too, so a
difference between the devices cannot hide in a tolerance that only one of them keeps.
"""

import copy

import pytest
import torch
from torch import Tensor

from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from tests.rows import DEVICES, KINDS, batch_of, dense_hidden, model_of, reference

LOSS, GRADIENT, HIDDEN = 1e-5, 1e-4, 1e-4  # fp32, relative


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_the_rule(kind: str, device: str) -> None:
    """Guards against a kernel that lets a kind of row see too much, or spoils its gradient."""
    model = model_of(kind)
    batch = batch_of(kind, model.prompts)
    loss, gradients = reference(model, batch)
    output = model.to(device)(batch.to(device))
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(loss, rel=LOSS)
    for name, parameter in model.named_parameters():
        if name not in gradients:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        difference = (parameter.grad.cpu() - gradients[name]).norm()
        assert difference <= GRADIENT * gradients[name].norm(), name


# Lengths that no block of a kernel divides, heads as wide as kernels like them.
T, LONG = (
    333,
    BackboneConfig(
        vocab_size=64,
        width=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        experts=0,
        dense_hidden=64,
        chunk=96,
        temperature_floor=64,
    ),
)


def coordinates(kind: str) -> dict[str, Tensor]:
    """The coordinates of two rows of a kind, int64 ``[2, T]`` each; those left out are 0."""
    place = torch.arange(T)
    if kind == "plain":
        return {}
    if kind == "padded":
        documents = torch.stack([place * 0, torch.where(place < 250, 0, -1)])
        return {"positions": place.expand(2, T), "documents": documents}
    if kind == "packed":
        starts = [torch.tensor(ends) for ends in ((0, 50, 190), (0, 130, 131))]
        documents = torch.stack([torch.bucketize(place, s, right=True) - 1 for s in starts])
        first = torch.stack([s[d] for s, d in zip(starts, documents, strict=True)])
        return {"positions": place - first, "documents": documents}
    if kind == "blocks":
        blocks = torch.where(place % 100 < 60, place // 100 + 1, 0).expand(2, T)
        return {"positions": place.expand(2, T), "blocks": blocks}
    trunk, length = 150, 61  # branches of 61 tokens, the last one cut off
    number = (place - trunk) // length
    branches = torch.where(place < trunk, 0, number + 1)
    positions = torch.where(place < trunk, place, place - number * length)
    return {"positions": positions.expand(2, T), "branches": branches.expand(2, T)}


def hidden_states(kind: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states of the real tokens ``[n, D]`` on a device, and the fp64 reference's."""
    torch.manual_seed(0)
    model = Backbone(LONG).eval()
    embeds, given = torch.randn(2, T, LONG.width), coordinates(kind)
    names = ("positions", "documents", "branches", "blocks")
    dense = [given.get(name) for name in names]
    if dense[0] is None:
        dense[0] = torch.arange(T).expand(2, T)
    model, embeds = model.to(dtype), embeds.to(dtype)
    with torch.no_grad():
        expected = dense_hidden(copy.deepcopy(model), embeds, dense)
        moved = {name: x.to(device) for name, x in given.items()}
        hidden = model.to(device)(embeds=embeds.to(device), **moved).hidden.cpu()
    documents = given.get("documents")
    real = torch.ones(2, T, dtype=torch.bool) if documents is None else documents >= 0
    return hidden[real].double(), expected[real]


ROWS = ("plain", "padded", "packed", "branches", "blocks")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ROWS)
def test_long_rows_attend_by_the_rule(kind: str, device: str) -> None:
    """Guards against a block mask whose edge, or whose last and partial block, is off by one."""
    hidden, expected = hidden_states(kind, device, torch.float32)
    torch.testing.assert_close(hidden, expected, atol=HIDDEN, rtol=HIDDEN)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ROWS)
def test_long_rows_attend_by_the_rule_in_bfloat16(kind: str, device: str) -> None:
    """Guards against a mask or a temperature that is applied in bf16 and loses its edge."""
    hidden, expected = hidden_states(kind, device, torch.bfloat16)
    error = (hidden - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.02  # 0.008 on a CPU
