"""Causal attention: its own backward pass against torch's."""

import pytest
import torch

from sandbox.backbone.backends import causal
from sandbox.backbone.visibility import Coordinates, visible


@pytest.mark.parametrize(
    ("B", "T", "H", "G", "K"),
    [(2, 300, 6, 2, 16), (1, 513, 4, 4, 8), (3, 256, 8, 1, 32), (5, 257, 3, 3, 4)],
    ids=["grouped", "one head a group", "one group", "a ragged block"],
)
@pytest.mark.parametrize("scores", [1 << 12, causal.SCORES], ids=["row by row", "rows together"])
def test_output_and_gradients_are_those_of_a_plain_softmax(
    monkeypatch: pytest.MonkeyPatch, B: int, T: int, H: int, G: int, K: int, scores: int
) -> None:
    """Guards against a block that sees the future, and against heads summed into another group."""
    torch.manual_seed(0)
    monkeypatch.setattr(causal, "SCORES", scores)
    q, k, v = (torch.randn(B, T, heads, K, requires_grad=True) for heads in (H, G, G))
    upstream = torch.randn(B, T, H, K)

    wide_k, wide_v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    zeros = torch.zeros(1, T, dtype=torch.int64)
    places = Coordinates(torch.arange(T)[None], zeros, zeros, zeros)
    logits = torch.einsum("bqhk,bthk->bhqt", q, wide_k) * K**-0.5
    weights = logits.masked_fill(~visible(places, places, None), -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bhqt,bthk->bqhk", weights, wide_v)

    mixed = causal.causal_attention(q, k, v)
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(mixed, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_short_rows_and_other_types_take_torchs_own_way() -> None:
    """Guards against the CPU's way where it is slower, or would round in bfloat16."""
    cases = [(256, torch.float32, True), (255, torch.float32, False), (256, torch.bfloat16, False)]
    for T, dtype, own in cases:
        q, k, v = (torch.randn(1, T, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        name = type(causal.causal_attention(q, k, v).grad_fn).__name__
        assert ("CausalAttention" in name) == own
    with torch.no_grad():
        assert causal.causal_attention(q, k, v).grad_fn is None
