"""Interleaved rotary position embedding (RoFormer, arXiv 2104.09864) and Llama 3's scaling."""

import math

import torch
from torch import Tensor

from sandbox.backbone.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Rotary frequencies in radians a position, fp32 ``[K / 2]``.

    Source: Meta's reference code, ``models/llama4/model.py``, ``apply_scaling``.
    """
    # On the CPU even where a model is built on the meta device: no checkpoint holds these numbers.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = 1.0 / theta**exponents
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_context / scaling.low
    shortest = scaling.original_context / scaling.high
    stretched = frequency / scaling.factor
    scaled = torch.where(wavelength > longest, stretched, frequency)
    if scaling.high > scaling.low:  # with low == high there is no band to blend (and a 0 / 0)
        kept = (scaling.original_context / wavelength - scaling.low) / (scaling.high - scaling.low)
        band = (wavelength >= shortest) & (wavelength <= longest)
        scaled = torch.where(band, (1 - kept) * stretched + kept * frequency, scaled)
    return scaled


def rotation(positions: Tensor, frequency: Tensor) -> Tensor:
    """The turn of every position as a complex number: ``[B, T, 1, K / 2]`` of ``[B, T]``."""
    angle = positions[..., None, None].float() * frequency
    return torch.complex(angle.cos(), angle.sin())


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate adjacent pairs (2i, 2i + 1) of ``x [B, T, heads, K]`` in fp32, by ``rotation``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)
