"""Whole steps on a GPU: no waiting, copies that overlap, memory, compilation, replies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.data.batch import collate
from sandbox.data.prompt import Image, Prompt, Turn
from sandbox.train.monitors import RoutingMonitor
from tests.rows import DEVICES, KINDS, batch_of, model_of, picture
from tests.test_step_sync import monitor, objective_of, step

gpu = pytest.mark.gpu


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Within, an operation that makes the host wait for the device raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits_within_a_step(kind: str, precision: str) -> None:
    """Guards against a step whose host stops for a number, and leaves the device idle after it.

    The step is forward, loss, backward and update, with the routing monitor where it does not log.
    ``NonFiniteGuard`` is left out: before each update it reads one flag, and that is its purpose.
    """
    objective, optimizer, batch = objective_of(kind)
    objective, batch, routing = objective.cuda(), batch.to("cuda"), RoutingMonitor()

    def run() -> None:
        outputs = step(objective, optimizer, batch, mixed=precision == "bf16-mixed")
        monitor(routing, outputs, batch)

    for _ in range(2):  # kernels are chosen, and the optimizer's states made, once
        run()
    with nobody_waits():
        run()


@gpu
def test_pinned_batches_are_copied_without_waiting() -> None:
    """Guards against blocking copies of what was pinned so that copies could overlap.

    Lightning asks for ``non_blocking`` of bare tensors only, and calls ``Batch.to(device)``.
    """
    model = model_of("branches")
    batch = batch_of("branches", model.prompts).pin_memory()
    with nobody_waits():
        moved = batch.to(torch.device("cuda"))
    torch.cuda.synchronize()
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            assert getattr(moved, field.name).cpu().equal(value), field.name


@gpu
@pytest.mark.parametrize("kind", ["packed", "branches", "blocks"])
def test_no_row_takes_memory_by_the_square_of_its_length(kind: str) -> None:
    """Guards against a dense mask, or its copies for the backward pass, on a GPU."""
    T, trunk = 16_384, 8192
    config = BackboneConfig(
        vocab_size=64, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, experts=0,
        dense_hidden=64, chunk=1024, nope_every=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Backbone(config).cuda().bfloat16()
    place = torch.arange(T, device="cuda")[None]
    rows = {
        "packed": {"positions": place % 2048, "documents": place // 2048},
        "branches": {
            "positions": torch.where(place < trunk, place, trunk + place % 512),
            "branches": torch.where(place < trunk, 0, (place - trunk) // 512 + 1),
        },
        "blocks": {
            "positions": place,
            "blocks": torch.where(place % 100 < 64, place // 100 + 1, 0),
        },
    }
    embeds = torch.randn(1, T, config.width, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        model(embeds=embeds, **rows[kind]).hidden.float().square().mean().backward()

    run()  # a kernel may need memory while it is compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    # Activations take less than half of one mask of a byte an entry.
    assert torch.cuda.max_memory_allocated() - before < T * T


@gpu
@pytest.mark.parametrize("kind", ["branches", "packed"])
def test_a_compiled_backbone_computes_the_same(kind: str) -> None:
    """Guards against generated code that differs from what is trained without it."""
    results = []
    for compiled in (False, True):
        model = model_of(kind).cuda()
        batch = batch_of(kind, model.prompts).to("cuda")
        if compiled:
            model.backbone.compile()
        loss = model(batch).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, gradients), (their_loss, theirs) = results
    torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=0)
    for ours, other in zip(gradients, theirs, strict=True):
        if ours is not None and other is not None:
            assert (ours - other).norm() <= 1e-3 * other.norm()


def questions() -> list[Prompt]:
    """Prompts of unequal length, with and without images."""
    turn = Turn("user", ["left ", Image(picture(1)), " and right ", Image(picture(2)), ": same?"])
    return [Prompt.ask("how many bars?", [picture(0)]), Prompt.ask("why?"), Prompt([turn])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["branches", "blocks", "adapters"])
def test_greedy_replies_are_the_same_ids(kind: str, device: str) -> None:
    """Guards against a cache that a device fills or reads in another way than a full pass does."""
    model = model_of(kind, init_std=0.3).eval()
    prompts = questions()
    expected = []
    with torch.no_grad():  # one row at a time, without a cache, on the CPU
        for prompt in prompts:
            example = model.prompts.encode(prompt, reply=True)
            fused = model.fuse(collate([example]))
            embeds, ids = fused.embeds, list[int]()
            for _ in range(8):
                context = fused.context
                if context is not None and ids:
                    break  # the context holds the prompt's tokens alone: compare the first id
                hidden = model.backbone(
                    embeds=embeds,
                    blocks=None if fused.blocks is None else _longer(fused.blocks, embeds.shape[1]),
                    adapters=fused.adapters,
                    context=context,
                ).hidden
                ids.append(int(model.backbone.unembed(hidden[0, -1]).argmax()))
                embeds = torch.cat((embeds, model.backbone.embed(torch.tensor([ids[-1:]]))), dim=1)
            expected.append(ids)
    batch = collate([model.prompts.encode(prompt, reply=True) for prompt in prompts])
    replies = model.to(device).generate_ids(batch.to(device), max_tokens=8)
    assert [ids[: len(wanted)] for ids, wanted in zip(replies, expected, strict=True)] == expected


def _longer(blocks: Tensor, T: int) -> Tensor:
    """Blocks ``[1, T]`` of a row that text was added to."""
    return torch.nn.functional.pad(blocks, (0, T - blocks.shape[1]))


@gpu
def test_the_benchmark_answers_on_a_gpu(tmp_path: Path) -> None:
    """Guards against a section that only ever ran in rehearsal on a CPU."""
    pytest.importorskip("transformers")
    from experiments import bench

    command = ["--quick", "--rounds", "2", "--sections", "gpu", "--out", str(tmp_path)]
    assert bench.main(command) == 0
    assert '"skipped": []' in (tmp_path / "bench.json").read_text()
