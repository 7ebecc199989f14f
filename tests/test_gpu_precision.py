"""Reduced precision: bf16-mixed and bf16-true losses and gradients, experts, Muon."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sandbox.data.prompt import Prompt
from sandbox.train.optim import OptimizerConfig, build_optimizer, orthogonalize
from tests.rows import DEVICES, batch_of, model_of, picture, reference

KINDS = ("packed", "branches", "blocks", "adapters")
# Measured on a CPU: loss off by at most 2.5e-4, cosine 1.4e-4 short of 1, Muon's update by 1.5%.
LOSS, ALIKE, MUON = 2e-3, 0.999, 0.03


def alike(model: nn.Module, gradients: dict[str, Tensor]) -> float:
    """The cosine of all gradients of the model, as one vector, with those of the reference."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours = torch.cat([found[name].double().cpu().flatten() for name in gradients])
    theirs = torch.cat([gradient.double().flatten() for gradient in gradients.values()])
    return float(ours @ theirs / (ours.norm() * theirs.norm()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_learns_in_the_direction_of_fp64(kind: str, precision: str, device: str) -> None:
    """Guards against a part that breaks, or is silently wrong, in reduced precision."""
    model = model_of(kind, init_std=0.1)
    batch = batch_of(kind, model.prompts)
    if precision == "bf16-true":
        model = model.bfloat16()
    loss, gradients = reference(model.float(), batch)  # of the rounded weights
    context: AbstractContextManager[Any] = nullcontext()
    if precision == "bf16-mixed":
        context = torch.autocast(device, torch.bfloat16)
    else:
        model = model.bfloat16()
    with context:
        output = model.to(device)(batch.to(device))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert float(output.loss.detach()) == pytest.approx(loss, rel=LOSS)
    assert alike(model, gradients) > ALIKE


@contextmanager
def products() -> Iterator[list[tuple[torch.dtype, ...]]]:
    """The dtypes of the operands of every grouped matmul within, backward passes included."""
    seen: list[tuple[torch.dtype, ...]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket is torch.ops.aten._grouped_mm:
                seen.append((args[0].dtype, args[1].dtype))
            return func(*args, **(kwargs or {}))

    with Spy():
        yield seen


@pytest.mark.parametrize("device", DEVICES)
def test_experts_multiply_in_bfloat16_under_autocast(device: str) -> None:
    """Guards against experts that stay in fp32: no autocast rule covers the grouped matmul.

    On a GPU anything but bf16 is a loop over experts whose host waits for the device.
    """
    model = model_of("branches").to(device)
    batch = batch_of("branches", model.prompts).to(device)
    with products() as seen:
        with torch.autocast(device, torch.bfloat16):
            loss = model(batch).loss
        loss.backward()
    assert seen
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("device", DEVICES)
def test_replies_come_under_autocast(device: str) -> None:
    """Guards against a KV cache of another dtype than the keys that it is given."""
    model = model_of("branches").eval().to(device)
    images = [picture(0), picture(1)]
    prompts = [Prompt.ask("how many bars?", images), Prompt.ask("why?", images[:1])]
    with torch.autocast(device, torch.bfloat16):
        replies = model.generate(prompts, max_tokens=4)
    assert len(replies) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_orthogonal_updates_are_orthogonal(device: str) -> None:
    """Guards against Newton-Schulz iterations that bf16 on a GPU carries away."""
    torch.manual_seed(0)
    update = torch.randn(3, 48, 80)
    values = torch.linalg.svdvals(orthogonalize(update.to(device), 5).cpu())
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("device", DEVICES)
def test_muon_moves_weights_as_on_the_cpu(device: str) -> None:
    """Guards against an update that another device scales, transposes or leaves out."""
    moved = []
    for place in ("cpu", device):
        model = model_of("branches").to(place)
        before = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
        optimizer, _ = build_optimizer(model, OptimizerConfig(warmup=1), steps=4)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # of full rank, or rounding decides on the update
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(place)
        optimizer.step()
        moved.append({n: p.detach().cpu() - before[n] for n, p in model.named_parameters()})
    for name, expected in moved[0].items():
        assert expected.any(), name
        # On a GPU the iterations run in bf16.
        assert (moved[1][name] - expected).norm() <= MUON * expected.norm(), name
