"""Chunked cross-entropy against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from sandbox.backbone.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_loss_and_gradients_equal_torch(chunk):
    """Guards against a last, shorter chunk that is dropped or weighted wrongly."""
    torch.manual_seed(0)
    hidden = torch.randn(17, 8, requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=True)
    labels = torch.randint(0, 31, (17,))
    loss, correct = chunked_cross_entropy(hidden, weight, labels, chunk)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, expected)
    assert correct.equal(logits.argmax(-1) == labels)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    theirs = torch.autograd.grad(3 * expected, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_without_labels_the_loss_is_zero():
    """Guards against NaN when a batch has nothing to learn."""
    weight = torch.randn(31, 8, requires_grad=True)
    loss, _ = chunked_cross_entropy(torch.zeros(0, 8), weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert weight.grad.abs().sum() == 0


def test_a_frozen_head_gets_no_gradient():
    """Guards against wasted memory for the weight's gradient when the language model is frozen."""
    hidden = torch.randn(4, 8, requires_grad=True)
    loss, _ = chunked_cross_entropy(hidden, torch.randn(5, 8), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert hidden.grad.abs().sum() > 0
