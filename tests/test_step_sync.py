"""A training step asks the device nothing: no operation whose result the host has to wait for.

On a CPU such questions cost nothing and nothing shows them, so the operations that would make the
host of a GPU wait are caught as they are dispatched. Those of files that only a CPU runs may stay.
``test_gpu_step.py`` has PyTorch itself watch the same steps on a GPU.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sandbox.data.batch import Batch
from sandbox.train.monitors import RoutingMonitor
from sandbox.train.next_token import NextToken
from sandbox.train.optim import MuonAdamW, OptimizerConfig, build_optimizer
from tests.rows import KINDS, batch_of, model_of

ROOT = Path(__file__).parents[1]
ROOMS = tuple(str(ROOT / room) for room in ("encoders", "fusion", "sandbox"))
BACKENDS = ROOT / "sandbox" / "backbone" / "backends"
EXEMPT = {str(BACKENDS / name) for name in ("cpu.py", "products.py")}  # what runs on a CPU alone
aten = torch.ops.aten
# The host reads a number, or must know how many there are before it can allocate the result.
WAITS = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# These never reach the dispatcher on a CPU; on a GPU each is a copy that the host waits for.
COPIES = {Tensor.tolist, Tensor.cpu, Tensor.numpy, torch.tensor, torch.as_tensor}


class Watch(TorchDispatchMode):
    """Notes the operations that would make the host wait, and where our code calls them.

    Attributes:
        found: ``operation at file:line``, once each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._functions = _Functions(self)

    def __enter__(self) -> "Watch":
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in WAITS:
            self.note(str(packet))
        elif packet in INDEXING and any(_is_mask(index) for index in args[1]):
            self.note(f"{packet} by a mask")
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.note(str(func))
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        """Add a call, unless the CPU's own backend makes it."""
        frame, where = sys._getframe(1), None
        while frame is not None:
            file = frame.f_code.co_filename
            if file in EXEMPT:
                return
            if where is None and file.startswith(ROOMS):
                where = f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
            frame = frame.f_back
        line = f"{what} at {where or 'a place outside the rooms'}"
        if line not in self.found:
            self.found.append(line)


class _Functions(TorchFunctionMode):
    """The calls that the dispatcher does not see."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            self._watch.note(f"{func.__name__}()")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def objective_of(kind: str, **changes: Any) -> tuple[NextToken, MuonAdamW, Batch]:
    """An objective on rows of a kind, its optimizer, and a batch on the CPU."""
    model = model_of(kind, **changes).train()
    objective = NextToken(model, OptimizerConfig(warmup=1))
    one: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=1)
    objective.trainer = one
    objective.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer, _ = build_optimizer(objective, objective.optimizer, steps=10)
    return objective, optimizer, batch_of(kind, model.prompts)


def step(
    objective: NextToken, optimizer: MuonAdamW, batch: Batch, *, mixed: bool = False
) -> dict[str, Any]:
    """Forward, loss, backward and update; what the training step returns.

    ``mixed`` computes forward and loss under autocast to bf16, as Lightning's bf16-mixed does.
    """
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=mixed):
        result = objective.training_step(batch, 0)
    result["loss"].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def monitor(routing: RoutingMonitor, outputs: dict[str, Any], batch: Batch) -> None:
    """What the routing monitor does after a step that it does not log."""
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer: Any = SimpleNamespace(global_step=1, log_every_n_steps=10, fit_loop=loop)
    routing.on_train_batch_end(trainer, None, outputs, batch, 0)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("balance", ["bias", "loss"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_asks_the_device_nothing(kind: str, balance: str) -> None:
    """Guards against a count, a mask index or a comparison for which a GPU's host would wait."""
    objective, optimizer, batch = objective_of(kind, balance=balance, router_z_loss=0.1)
    routing = RoutingMonitor()
    step(objective, optimizer, batch)  # what happens once, such as states made by the optimizer
    with Watch() as watch:
        monitor(routing, step(objective, optimizer, batch), batch)
    assert watch.found == []


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.index_put_((x > 0,), torch.zeros(())), "index_put_ by a mask"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: torch.tensor([1.0, 2.0]), "tensor"),
    ],
)
def test_the_watch_sees_what_waits(call: Any, what: str) -> None:
    """Guards against a test that passes because it looks away."""
    x = torch.ones(3)
    with Watch() as watch:
        call(x)
    assert any(what in line for line in watch.found)


def test_the_watch_lets_pass_what_does_not_wait() -> None:
    """Guards against a watch that forbids a gather by index, which no host waits for."""
    x, places = torch.ones(3, requires_grad=True), torch.arange(2)
    with Watch() as watch:
        (x[places].sum() + x.index_select(0, places).sum() + x.where(x > 0, 0).sum()).backward()
    assert watch.found == []
