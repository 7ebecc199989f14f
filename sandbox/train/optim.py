"""AdamW, and Muon for matrices, in one optimizer with one schedule."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from sandbox.backbone.moe import Experts

# Keller Jordan's quintic Newton-Schulz coefficients, which torch.optim.Muon uses too.
_A, _B, _C = 3.4445, -4.7750, 2.0315

# How many numbers of a group of equal matrices are orthogonalised at once: a quarter of the group,
# so that temporaries, at most five copies of a piece, stay below 1.5 groups. Smaller pieces than
# the first bound would only add calls, larger ones than the second only memory.
_PIECES, _SMALLEST, _LARGEST = 4, 1 << 18, 1 << 24


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move.

    Attributes:
        name: ``muon`` (matrices by Muon, the rest by AdamW) or ``adamw`` (everything).
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate.
        betas, eps: AdamW's; CLIP's recipes have an eps of 1e-6.
        weight_decay: of both, decoupled; it spares vectors.
        momentum: Muon's Nesterov momentum.
        newton_schulz_steps: iterations that orthogonalise a Muon update.
        warmup: steps of linear warm-up.
        schedule: what follows: ``cosine``, or ``linear`` after a constant stretch.
        hold: share of the steps before the linear decay starts (``linear`` alone).
        final: the last learning rate as a share of the peak.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 2e-3
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    warmup: int = 50
    schedule: Literal["cosine", "linear"] = "cosine"
    hold: float = 0.6
    final: float = 0.03


class MuonAdamW(AdamW):
    """AdamW whose groups marked ``muon`` are updated by Muon instead.

    Unlike ``torch.optim.Muon`` it takes stacked matrices ``[E, D, F]`` (each expert is
    orthogonalised by itself), iterates in fp32 on CPUs, where bf16 is several times slower, and
    treats matrices of one shape together, a piece of them at a time (see ``_PIECES``). On plain
    matrices the update is the same.

    It leaves AMP's gradient scaling to the scaler, as unfused optimizers do: gradients arrive
    unscaled, and may be clipped.

    Parameters below fp32 (``bf16-true``): Muon keeps its momentum in fp32, and beside each weight
    the part that rounding cut off, in the weight's dtype; updates are computed in fp32 and added to
    both together, so that those too small to change a bf16 weight add up. AdamW's moments and
    updates are computed in fp32 and stored in the weight's dtype, as torch's are.

    Source: Muon, https://kellerjordan.github.io/posts/muon; the learning rate is scaled by
    ``sqrt(max(1, outputs / inputs))``.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Fused AdamW could unscale in its kernel; Muon could not, and nobody could clip.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of parameters; rates and momenta stay as configured."""
        configured = [
            {k: v for k, v in group.items() if k != "params"} for group in self.param_groups
        ]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, configured, strict=True):
            group.update(own)
        # torch casts what it loads to the dtype of the parameter.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                if group["muon"] and number in state_dict["state"]:
                    momentum = state_dict["state"][number]["momentum"]
                    self.state[parameter]["momentum"] = momentum.to(
                        parameter.device, _exact(parameter), copy=True
                    )

    def _muon(self, group: dict[str, Any]) -> None:
        by_shape: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            by_shape[parameter.shape[-2:]].append(parameter)
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter, dtype=_exact(parameter))
                state["step"] = torch.zeros(())  # AdamW looks for one in every state it loads
            if parameter.dtype != _exact(parameter) and "remainder" not in state:
                state["remainder"] = torch.zeros_like(parameter)
        for shape, parameters in by_shape.items():
            for piece in _pieces(parameters, shape):
                self._muon_piece(piece, group)

    def _muon_piece(self, piece: list[tuple[Tensor, slice]], group: dict[str, Any]) -> None:
        """Update some matrices of one shape; what this takes is free again when it returns."""
        updates = [self._nesterov(*part, group["momentum"]) for part in piece]
        counts = [len(update) for update in updates]
        stacked = torch.cat(updates)
        del updates
        orthogonal = orthogonalize(stacked, group["newton_schulz_steps"])
        for part, update in zip(piece, orthogonal.split(counts), strict=True):
            self._move(*part, update, group)

    def _nesterov(self, parameter: Tensor, part: slice, beta: float) -> Tensor:
        """Advance the momentum of some of a parameter's matrices; their update ``[n, ...]``."""
        assert parameter.grad is not None
        momentum = _stacked(self.state[parameter]["momentum"])[part]
        gradient = _stacked(parameter.grad)[part].to(momentum.dtype)
        return gradient.lerp(momentum.lerp_(gradient, 1 - beta), beta)

    def _move(self, parameter: Tensor, part: slice, update: Tensor, group: dict[str, Any]) -> None:
        """Decay some of a parameter's matrices and subtract their orthogonal update."""
        # nn.Linear stores [outputs, inputs], stacked experts [E, inputs, outputs].
        outputs, inputs = parameter.shape if parameter.ndim == 2 else parameter.mT.shape[-2:]
        rate = -group["lr"] * max(1.0, outputs / inputs) ** 0.5
        weight = exact = _stacked(parameter)[part]
        remainder = self.state[parameter].get("remainder")
        if remainder is not None:
            remainder = _stacked(remainder)[part]
            exact = weight.to(update.dtype) + remainder
        exact.mul_(1 - group["lr"] * group["weight_decay"])
        exact.add_(update, alpha=rate)
        if remainder is not None:
            weight.copy_(exact)
            remainder.copy_(exact - weight)


def _exact(parameter: Tensor) -> torch.dtype:
    """The dtype that a parameter's updates are computed in: fp32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _stacked(tensor: Tensor) -> Tensor:
    """Matrices ``[n, rows, columns]``: a view of one matrix, or of a stack of them."""
    return tensor.view(-1, *tensor.shape[-2:])


def _pieces(parameters: list[Tensor], shape: tuple[int, ...]) -> list[list[tuple[Tensor, slice]]]:
    """Parameters of equal matrices cut into pieces: each lists parameters, with which matrices."""
    size = math.prod(shape)
    total = sum(parameter.numel() for parameter in parameters)
    room = max(min(max(total // _PIECES, _SMALLEST), _LARGEST) // size, 1)  # matrices of a piece
    pieces: list[list[tuple[Tensor, slice]]] = [[]]
    free = room
    for parameter in parameters:
        count, start = parameter.numel() // size, 0
        while start < count:
            if not free:
                pieces.append([])
                free = room
            stop = min(count, start + free)
            pieces[-1].append((parameter, slice(start, stop)))
            free -= stop - start
            start = stop
    return pieces


class Schedule(LambdaLR):
    """A schedule whose checkpoint says how far it is, not which rates it had.

    Whoever resumes with another learning rate gets it.
    """

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step that was saved, at the rates configured now."""
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = [
            base * share(self.last_epoch)
            for base, share in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrices ``[n, rows, columns]``, roughly, by Newton-Schulz."""
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).type_as(matrices)


def matrices(model: nn.Module) -> set[Tensor]:
    """What Muon updates: weights of linear layers and experts, but for head and routers."""
    found: set[Tensor] = set()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found.update(module.parameters())
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.add(module.in_proj_weight)
            found.add(module.out_proj.weight)
        elif isinstance(module, nn.Linear) and not name.endswith(("head", "router")):
            found.add(module.weight)
    return found


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, steps: int
) -> tuple[MuonAdamW, Schedule]:
    """Optimizer and schedule over ``steps`` updates of the parameters that require gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    by_muon = matrices(model) if config.name == "muon" else set()
    adamw = {"lr": config.lr, "muon": False}
    groups = [
        {"params": [p for p in trained if p in by_muon], "muon": True, "lr": config.muon_lr},
        {"params": [p for p in trained if p not in by_muon and p.ndim >= 2], **adamw},
        {"params": [p for p in trained if p.ndim < 2], **adamw, "weight_decay": 0.0},
    ]
    optimizer = MuonAdamW(
        [
            group | {"momentum": config.momentum, "newton_schulz_steps": config.newton_schulz_steps}
            for group in groups
            if group["params"]
        ],
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return optimizer, Schedule(optimizer, lambda step: learning_rate(config, step, steps))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate at ``step`` (0-based) of ``steps``, as a share of the peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(steps - config.warmup, 1)
        shape = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    else:
        start = max(config.hold * steps, config.warmup)
        shape = min(1.0, max(0.0, (steps - step) / max(steps - start, 1)))
    return config.final + (1 - config.final) * shape
