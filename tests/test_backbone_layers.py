"""RMS norm: torch's numbers, by the way that is faster on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from sandbox.backbone.layers import RMSNorm, rms_norm


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_are_those_of_torch(weighted: bool, dtype: torch.dtype) -> None:
    """Guards against a wrong term in the hand-written backward pass, most of all through eps."""
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 16) * 0.1).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(16)).to(dtype).requires_grad_() if weighted else None
    inputs = (x, weight) if weight is not None else (x,)
    upstream = torch.randn(2, 5, 16).to(dtype)
    y, expected = rms_norm(x, weight, 1e-2), F.rms_norm(x, (16,), weight, 1e-2)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        assert ours.dtype == dtype
        error = (ours - theirs).float().norm() / theirs.float().norm()
        assert error < tolerance


def test_rms_norm_passes_a_numerical_gradient_check() -> None:
    """Guards against a backward pass that agrees with torch's on lucky numbers only."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    """Guards against silent nonsense where someone differentiates twice."""
    x = torch.randn(2, 8, requires_grad=True)
    (first,) = torch.autograd.grad(RMSNorm(8, 1e-5)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
