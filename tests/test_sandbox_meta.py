"""Modules without memory: as they would be, but for their numbers."""

import torch
from torch import nn

from sandbox.meta import without_memory


class Part(nn.Module):
    """Draws numbers in every way that ours do, and has a table of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.token = nn.Parameter(torch.randn(3))
        self.linear.bias.data.normal_()
        table = torch.randn(5, device="cpu", generator=torch.Generator().manual_seed(0)).sin()
        self.register_buffer("table", table, persistent=False)


def test_weights_have_a_shape_and_tables_their_numbers():
    """Guards against tables that a model built without memory would lack or have as noise."""
    with without_memory():
        part = Part()
    assert all(parameter.is_meta for parameter in part.parameters())
    assert {name: x.shape for name, x in part.state_dict().items()} == {
        name: x.shape for name, x in Part().state_dict().items()
    }
    assert part.table.equal(Part().table)
    assert torch.randn(3).device.type == "cpu"  # and it ends where it should
