"""Who may see whom: the rule, its drawings, and what it means for a model."""

import pytest
import torch

from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.backbone.visibility import Coordinates, visible


def drawn(picture: str) -> torch.Tensor:
    """A mask from rows of 1 and dot."""
    return torch.tensor([[c == "1" for c in row.split()] for row in picture.strip().splitlines()])


def rule(positions, documents, branches, blocks=None, *, chunk=None):
    """The mask of a sequence over itself."""
    blocks = blocks or [0] * len(positions)
    coordinates = Coordinates(*map(torch.tensor, (positions, documents, branches, blocks)))
    return visible(coordinates, coordinates, chunk)


def test_packed_documents_as_drawn():
    """Guards against packed samples that see each other."""
    sequence = ([0, 1, 2, 0, 1], [0, 0, 0, 1, 1], [0] * 5)
    everywhere = """
        1 . . . .
        1 1 . . .
        1 1 1 . .
        . . . 1 .
        . . . 1 1
    """
    chunked = """
        1 . . . .
        1 1 . . .
        . . 1 . .
        . . . 1 .
        . . . 1 1
    """
    assert rule(*sequence).equal(drawn(everywhere))
    assert rule(*sequence, chunk=2).equal(drawn(chunked))


def test_branches_as_drawn():
    """Guards against a question that sees its neighbour's answer."""
    picture = """
        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 1 1 1 .
        1 1 . . 1
    """
    assert rule([0, 1, 2, 3, 2], [0] * 5, [0, 0, 1, 1, 2]).equal(drawn(picture))


def test_blocks_as_drawn():
    """Guards against an image read from left to right, and against text that sees ahead."""
    sequence = ([0, 1, 2, 3, 4], [0] * 5, [0] * 5, [0, 1, 1, 1, 0])
    everywhere = """
        1 . . . .
        1 1 1 1 .
        1 1 1 1 .
        1 1 1 1 .
        1 1 1 1 1
    """
    chunked = """
        1 . . . .
        1 1 . . .
        . . 1 1 .
        . . 1 1 .
        . . . . 1
    """
    assert rule(*sequence).equal(drawn(everywhere))
    assert rule(*sequence, chunk=2).equal(drawn(chunked))


@pytest.mark.parametrize(
    ("documents", "branches"), [([0, 0, 0, 1, 1], [0] * 5), ([0] * 5, [0, 1, 1, 2, 2])]
)
def test_blocks_end_with_their_document_and_branch(documents, branches):
    """Guards against images of the same number that see each other out of two questions."""
    positions = [0, 1, 2, 1, 2]
    causal, seen = (rule(positions, documents, branches, b) for b in (None, [0, 7, 7, 7, 7]))
    picture = """
        . . . . .
        . . 1 . .
        . . . . .
        . . . . 1
        . . . . .
    """
    assert (seen ^ causal).equal(drawn(picture))


def small(**changes) -> Backbone:
    """A backbone with local and global layers."""
    torch.manual_seed(0)
    return Backbone(BackboneConfig(vocab_size=50, chunk=4, init_std=0.2, **changes)).eval()


def test_packed_samples_cannot_see_each_other():
    """Guards against nanoVLM's packing bug: sample B's logits must ignore sample A."""
    model = small()
    a, b = torch.randint(0, 50, (2, 12))
    row = torch.cat((a, b))[None]
    documents = torch.tensor([[0] * 12 + [1] * 12])
    positions = torch.arange(12).repeat(2)[None]
    packed = model(row, positions=positions, documents=documents).hidden
    torch.testing.assert_close(packed[0, 12:], model(b[None]).hidden[0], atol=2e-5, rtol=0)
    other = torch.cat((torch.randint(0, 50, (12,)), b))[None]
    changed = model(other, positions=positions, documents=documents).hidden
    torch.testing.assert_close(changed[0, 12:], packed[0, 12:], atol=2e-5, rtol=0)
    assert not torch.allclose(changed[0, :12], packed[0, :12], atol=1e-2)


def test_each_branch_equals_its_own_row():
    """Guards against question packing that differs from asking one by one."""
    model = small()
    trunk, one, two = (torch.randint(0, 50, (n,)) for n in (6, 5, 7))
    row = torch.cat((trunk, one, two))[None]
    branches = torch.tensor([[0] * 6 + [1] * 5 + [2] * 7])
    positions = torch.cat((torch.arange(11), torch.arange(6, 13)))[None]
    packed = model(row, positions=positions, branches=branches).hidden[0]
    for branch, span in ((one, slice(6, 11)), (two, slice(11, 18))):
        alone = model(torch.cat((trunk, branch))[None]).hidden[0, 6:]
        torch.testing.assert_close(packed[span], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("nope_every", [0, 1, 4])
def test_later_tokens_never_change_earlier_ones(nope_every):
    """Guards against a mask that is not causal, on all-RoPE, all-NoPE and mixed stacks."""
    model = small(nope_every=nope_every)
    tokens = torch.randint(0, 50, (1, 13))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 50
    before, after = model(tokens).hidden, model(changed).hidden
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=2e-5, rtol=0)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


def test_temperature_follows_true_positions_under_packing():
    """Guards against transformers' use of the slot: a packed document keeps its own positions."""
    model = small(nope_every=1, temperature_floor=2, temperature_scale=0.5)
    tokens = torch.randint(0, 50, (1, 8))
    shifted = model(tokens, positions=torch.arange(8)[None] + 100).hidden
    assert not torch.allclose(shifted, model(tokens).hidden, atol=1e-4)


def test_blocks_of_one_token_are_causal():
    """Guards against a block that changes more than the order within it."""
    model = small()
    tokens = torch.randint(0, 50, (2, 21))
    alone = model(tokens, blocks=torch.arange(1, 22).expand(2, 21)).hidden
    torch.testing.assert_close(alone, model(tokens).hidden, atol=2e-5, rtol=0)
    together = model(tokens, blocks=torch.ones_like(tokens)).hidden
    assert not torch.allclose(together, alone, atol=1e-2)


def test_padding_is_never_computed():
    """Guards against rows that cost what the longest row costs: M counts real tokens alone."""
    model = small(experts=3)
    tokens = torch.randint(0, 50, (3, 40))
    lengths = torch.tensor([40, 7, 11])
    documents = torch.where(torch.arange(40) < lengths[:, None], 0, -1)
    decoded = model(tokens, documents=documents)
    assert [len(routing.logits) for routing in decoded.routing] == [40 + 7 + 11] * 4
    assert decoded.hidden.shape == (3, 40, 96)
    assert not decoded.hidden[documents < 0].any()
    for row, n in enumerate(lengths.tolist()):
        alone = model(tokens[row : row + 1, :n]).hidden[0]
        torch.testing.assert_close(decoded.hidden[row, :n], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_chosen_outputs_are_those_of_the_whole_pass(padded):
    """Guards against a last layer that computes the wrong tokens, or drops their gradient."""
    model = small(experts=3, balance="none")
    tokens = torch.randint(0, 50, (2, 21))
    documents = torch.zeros_like(tokens)
    if padded:
        documents[1, 15:] = -1
    outputs = torch.tensor([0, 5, 20, 22, 30, 35])
    whole = model(tokens, documents=documents).hidden.flatten(0, 1)[outputs]
    expected = torch.autograd.grad(
        whole.square().sum(), list(model.parameters()), allow_unused=True
    )
    some = model(tokens, documents=documents, outputs=outputs)
    found = torch.autograd.grad(
        some.hidden.square().sum(), list(model.parameters()), allow_unused=True
    )
    torch.testing.assert_close(some.hidden, whole, atol=2e-5, rtol=0)
    for name, mine, other in zip(dict(model.named_parameters()), found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4, msg=name)
    assert some.routing[-1].places.tolist() == outputs.tolist()
