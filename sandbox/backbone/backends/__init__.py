"""How the visibility rule, the experts and the loss are computed fast on each kind of device.

Device types are asked for here, and by two shortcuts of decoding on a CPU (``MoE.forward`` and
``decode.suits``). What runs in which dtype, under each precision of a Trainer
(tests/test_backbone_precision.py holds this table against the code):

=====================  =========  ================  =========
computation            32-true    bf16-mixed        bf16-true
=====================  =========  ================  =========
weights, optimizer     fp32       fp32              bf16
linear layers          fp32       bf16              bf16
experts                fp32       bf16              bf16
router                 fp32       fp32              bf16
gates, rotary turns    fp32       fp32              fp32
RMS norms inside       fp32       fp32              fp32
attention on a CPU     fp32       fp32              fp32
attention in decoding  fp32       bf16              bf16
attention on a GPU     fp32       bf16              bf16
logits of the loss     fp32       bf16              bf16
softmax of the loss    fp32       fp32              fp32
head's gradient sums   fp32       fp32              fp32
balancing bias         fp32       fp32              fp32
KV cache               fp32       bf16              bf16
=====================  =========  ================  =========
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sandbox.backbone.backends import cpu
from sandbox.backbone.backends.visits import Visits
from sandbox.backbone.visibility import Visibility


class Backend(Protocol):
    """What a module of this folder offers."""

    @property
    def LOGITS(self) -> int:  # noqa: N802 (a module's constant)
        """Numbers that a chunk of logits may hold."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: Visibility,
        *,
        local: bool,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Self-attention of real tokens: ``[Mq, H, K]`` over ``[M, G, K]``.

        ``chosen``, int64 ``[Mq]``, are the tokens that the queries stand for; None means all.
        """

    def attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: Visibility,
        lengths: Tensor,
        *,
        chunk: int | None,
    ) -> Tensor:
        """Attention of new tokens ``[M, H, K]`` over held keys and their own, ``[N + M, G, K]``.

        Held keys come first, N / B slots for each of B rows of which ``lengths``, int64 ``[B]``,
        tokens are known; see ``visibility.cached_coordinates``.
        """

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """See ``layers.rms_norm``."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of ``[..., 2F]``, gate first: ``[..., F]``."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x [..., k] @ weight.T`` for ``weight [n, k]``: ``[..., n]``."""

    def grouped_mm(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Rows ``ends[e - 1] .. ends[e]`` of ``x [M, D]`` times ``weights[e] [D, F]``."""

    def tokens_multiple(self) -> int:
        """The number that real tokens are padded to a multiple of; 1 for no padding."""

    def visits_of(self, chosen: Tensor, experts: int, dtype: torch.dtype) -> Visits:
        """How the visits of tokens to ``chosen [M, k]`` are laid out for products in ``dtype``."""

    def scaled(self, gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
        """The gradients times a scalar."""


def of(x: Tensor) -> Backend:
    """The backend of the device that ``x`` is on."""
    if x.device.type == "cpu":
        return cpu
    if x.device.type == "meta":
        from sandbox.backbone.backends import meta

        return meta
    from sandbox.backbone.backends import cuda  # FlexAttention takes a second to import

    return cuda
