"""The loss over a large vocabulary: peak memory and time, each in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench_measure import Bench, Row, Skip, agree
from sandbox.backbone.loss import chunked_cross_entropy


def loss(bench: Bench) -> Iterator[Row | Skip]:
    """Cross-entropy over Llama 4's vocabulary, forward and backward: peak memory and time."""
    M, D, V = bench.pick((2048, 256, 202_048), (256, 32, 8192))
    what = f"{M:,} tokens, {V:,} words, width {D}"
    if why := bench.lacks(3.5 * 4 * M * V):
        yield Skip("loss", what, why)
        return
    plain = "plain, all logits"
    fresh, fresh_plain = (Fresh(bench, name, M, D, V) for name in ("chunked", "plain"))
    ours, peer = bench.interleave(fresh, fresh_plain, warmup=0)
    agree(f"loss, {what}", torch.tensor(fresh.losses), torch.tensor(fresh_plain.losses), 1e-4)
    due = 4.0 * (V * D + M * D)  # fp32
    note = "floor: the gradients of weights and hidden states, which either must return"
    floor = (due,) * bench.rounds
    yield Row("loss", f"peak, {what}", ours, plain, peer, "B", goal=15.0, floor=floor, note=note)
    ours, peer = (tuple(peak - due for peak in peaks) for peaks in (ours, peer))
    yield Row("loss", "peak beyond those gradients", ours, plain, peer, "B", goal=15.0)
    seconds = tuple(fresh.seconds), tuple(fresh_plain.seconds)
    yield Row("loss", "time, first call of a process", seconds[0], plain, seconds[1])


class Fresh:
    """One way to the loss, in a process of its own at each call; gives the peak in bytes.

    What a process once took from the system it seldom gives back, so each peak needs a new one.
    """

    def __init__(self, bench: Bench, kind: str, M: int, D: int, V: int) -> None:
        self.arguments = (kind, M, D, V, bench.device, torch.get_num_threads())
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def __call__(self) -> float:
        """Bytes at the peak, above what the inputs take."""
        command = [sys.executable, __file__, *map(str, self.arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        peak, seconds, value = json.loads(done.stdout)
        self.seconds.append(seconds)
        self.losses.append(value)
        return peak


def loss_peak(
    kind: str, M: int, D: int, V: int, place: str, threads: int
) -> tuple[float, float, float]:
    """Peak bytes, seconds and value of a loss over ``[M, D] @ [D, V]``, forward and backward."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(place)
    hidden = torch.randn(M, D, device=device, requires_grad=True)
    weight = (torch.randn(V, D, device=device) / D**0.5).requires_grad_()
    labels = torch.randint(V, (M,), device=device)

    def value(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if kind == "chunked":
            return chunked_cross_entropy(hidden, weight, labels)[0]
        return F.cross_entropy(hidden @ weight.T, labels)

    # A first call, on next to nothing, loads the code that it needs.
    few = [torch.ones(2, D, device=device, requires_grad=True) for _ in range(2)]
    value(*few, labels[:2] % 2).backward()
    before, _ = memory(device)
    start = time.perf_counter()
    result = value(hidden, weight, labels)
    result.backward()
    loss = result.item()  # waits for the device
    seconds = time.perf_counter() - start
    return memory(device)[1] - before, seconds, loss


def memory(device: torch.device) -> tuple[float, float]:
    """Bytes in use now, and at most so far, by the device or else by this process."""
    if device.type == "cuda":
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return now, peak
    try:
        # Not `getrusage`: its peak is inherited from the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    except (OSError, KeyError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return peak, peak


if __name__ == "__main__":
    kind, M, D, V, place, threads = sys.argv[1:]
    print(json.dumps(loss_peak(kind, int(M), int(D), int(V), place, int(threads))))
