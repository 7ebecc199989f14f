"""FLOPs: those of experts, and the speed that stands for a device's."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sandbox.backbone.moe import Experts
from sandbox.train.flops import grouped_mm_flops, matmul_peak


def test_flops_of_grouped_matmul():
    """Guards against experts that the FLOP counter passes over: 0 instead of 3 matmuls."""
    experts = Experts(4, 8, 16)
    for parameter in experts.parameters():
        nn.init.ones_(parameter)
    x = torch.randn(10, 8, requires_grad=True)
    ends = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        experts(x, ends).square().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * (8 * 32 + 16 * 8)


def test_matmul_peak_leaves_random_numbers_alone():
    """Guards against a measurement that changes the training it measures."""
    before = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8
    assert torch.equal(torch.get_rng_state(), before)
