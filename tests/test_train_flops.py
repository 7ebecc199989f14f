"""FLOPs: of a training step against arithmetic by hand, and the speed that stands for a device's.

The arithmetic is over the configuration's numbers. A weight matrix costs 2 FLOPs a row that it
multiplies forwards, 2 for the gradient of its input and 2 for its own; attention costs two products
of every query with every key forwards, and four backwards.
"""

import copy
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoders.llama4_vit import Llama4Vision
from encoders.metaclip import MetaCLIP
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.backbone.backends import cpu, meta
from sandbox.backbone.config import BackboneConfig, preset
from sandbox.backbone.moe import Experts
from sandbox.data.batch import Batch, collate
from sandbox.data.captions import Pairs
from sandbox.data.charts import Charts
from sandbox.meta import without_memory
from sandbox.train.contrastive import Contrastive, TextTower
from sandbox.train.flops import flop_counter, matmul_peak, step_flops
from sandbox.train.pretrain import Pretrain

D, H, G, K, LAYERS, WORDS = 48, 4, 2, 16, 3, 1024
SHAPE: dict[str, Any] = {
    "width": D,
    "layers": LAYERS,
    "heads": H,
    "kv_heads": G,
    "head_dim": K,
    "vocab_size": WORDS,
}
QUERY, KEY = 2 * D * H * K, 2 * D * G * K  # query and output, key and value
PROJECTIONS = QUERY + KEY


def batch_of(B: int, T: int, labelled: int, **parts: Any) -> Batch:
    """Rows of random tokens, the last ``labelled`` of each with a label."""
    tokens = torch.randint(0, WORDS, (B, T))
    labels = torch.full_like(tokens, -100)
    labels[:, -labelled:] = torch.randint(0, WORDS, (B, labelled))
    return Batch.of(tokens, labels=labels, **parts)


def text_model(**options: Any) -> Pretrain:
    return Pretrain(backbone=BackboneConfig(**SHAPE, **options))


# --- A step, by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [40, 320])
def test_a_dense_step_costs_what_arithmetic_says(T):
    """Guards against attention that is not counted, or by another kernel's measure: the long rows
    take another backward pass on a CPU, and one of half the products.
    """
    B, labelled, F = 2, 10, 80
    # The last layer computes queries and feed-forward where there are labels alone.
    every = (LAYERS - 1) * (PROJECTIONS + 3 * D * F) + KEY
    some = QUERY + 3 * D * F + D * WORDS
    products = 2 * B * H * K * T * ((LAYERS - 1) * T + labelled)
    by_hand = 6 * every * B * T + 6 * some * B * labelled + 6 * products
    model = text_model(experts=0, dense_hidden=F)
    assert step_flops(model, batch_of(B, T, labelled)) == by_hand


@pytest.mark.parametrize(("top_k", "chunk"), [(1, None), (2, 10)])
def test_a_mixture_costs_the_experts_that_a_token_visits(top_k, chunk):
    """Guards against experts that cost nothing, or all of them; and against local layers that cost
    as much as global ones (two of the three layers are local).
    """
    B, T, labelled, E, F = 2, 40, 10, 8, 32
    active = D * E + (1 + top_k) * 3 * D * F  # the router, the shared and the routed experts
    every = (LAYERS - 1) * (PROJECTIONS + active) + KEY
    some = QUERY + active + D * WORDS  # of the last layer, which is global
    pairs = B * T * (2 * (chunk or T) + labelled)
    by_hand = 6 * every * B * T + 6 * some * B * labelled + 6 * 2 * H * pairs * K
    model = text_model(experts=E, expert_hidden=F, top_k=top_k, chunk=chunk, nope_every=3)
    assert step_flops(model, batch_of(B, T, labelled)) == by_hand


@pytest.mark.parametrize("frozen", [["backbone"], ["backbone", "encoder"]])
def test_frozen_parts_cost_no_gradients_of_their_weights(frozen):
    """Guards against a budget that charges frozen parts in full, or forgets the tower or adapters.

    The adapter stands before the last layer of three: nothing that learns comes before the others,
    so they run forwards only.
    """
    B, T, labelled, F = 2, 40, 10, 80
    N, S, patch, V, tower_layers, tower_hidden = 3, 32, 8, 32, 2, 64
    A_H, A_G, A_K, A_F = 3, 1, 16, 56
    P = (S // patch) ** 2
    L = 2 * P  # vision tokens a row, the first of which has one tile and is padded to two

    layer = PROJECTIONS + 3 * D * F
    pair = 2 * B * H * T * K  # one product of a query of every row with its keys
    decoder = (2 + 2) * (layer * B * T + pair * T)
    decoder += 4 * (KEY * B * T + (QUERY + 3 * D * F + D * WORDS) * B * labelled)
    decoder += 6 * pair * labelled

    of_text = 2 * D * A_H * A_K + 3 * D * A_F
    of_vision = 2 * D * A_G * A_K
    adapter = 6 * (of_text * B * T + of_vision * B * L + 2 * B * A_H * T * L * A_K)

    tower_layer = (4 * V * V + 2 * V * tower_hidden) * N * (P + 1)
    tower_pairs = 2 * N * (P + 1) ** 2 * V
    learns = "encoder" not in frozen
    tower = (4 if learns else 2) * 3 * patch**2 * V * N * P  # pixels need no gradient
    tower += (6 if learns else 2) * tower_layers * (tower_layer + tower_pairs)
    projector = (6 if learns else 4) * V * D * N * P

    torch.manual_seed(0)
    model = Pretrain(
        Llama4Vision(S, patch, V, layers=tower_layers, heads=2, hidden=tower_hidden),
        partial(CrossAttention, layers=[2], heads=A_H, kv_heads=A_G, head_dim=A_K, hidden=A_F),
        BackboneConfig(**SHAPE, experts=0, dense_hidden=F),
        freeze=frozen,
    )
    batch = batch_of(
        B,
        T,
        labelled,
        tiles=torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8),
        tile_rows=torch.tensor([0, 1, 1]),
        tile_starts=torch.tensor([0, 0, 0]),
    )
    by_hand = decoder + adapter + tower + projector
    assert step_flops(model, batch) == by_hand


def test_a_contrastive_step_is_counted_without_a_trainer():
    """Guards against an objective that only a trainer can ask what it minimises, and a patch
    embedding by convolution, or attention of open_clip's, that costs nothing.
    """
    B, S, patch, V, layers, text_length, text_width, both = 4, 32, 8, 32, 2, 12, 24, 16
    text = TextTower(context_length=text_length, width=text_width, heads=2, layers=1)
    encoder = MetaCLIP(tile_size=S, patch_size=patch, width=V, layers=layers, heads=2)
    module = Contrastive(encoder, text, embed_dim=both)
    batch = Pairs(
        tiles=torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8),
        tokens=torch.randint(1, 50, (B, text_length)),
        labels=torch.full((B,), -1),
        classes=(),
    )
    P = (S // patch) ** 2 + 1
    tower = 4 * 3 * patch**2 * V * B * (P - 1) + 6 * layers * B * P * (12 * V * V + 2 * P * V)
    writer = 6 * B * text_length * (12 * text_width**2 + 2 * text_length * text_width)
    heads = 6 * B * (V + text_width) * both + 6 * 2 * B * B * both
    assert step_flops(module, batch) == tower + writer + heads


# --- A step, by running it ------------------------------------------------------------------------


def charts(fusion: Any, **options: Any) -> tuple[Pretrain, Batch]:
    """A model that reads charts, and a batch of them: padded rows, images and branches."""
    encoder = MetaCLIP(tile_size=32, patch_size=8, width=32, layers=1, heads=2)
    model = Pretrain(encoder, fusion, BackboneConfig(**SHAPE, **options))
    samples = [Charts(size=32).sample("train", index) for index in range(3)]
    return model, collate([model.model.prompts.encode_sample(sample) for sample in samples])


@pytest.mark.parametrize(
    ("fusion", "options"),
    [
        (EarlyFusion, {"experts": 4}),
        (EarlyFusion, {"experts": 4, "balance": "loss", "router_z_loss": 0.01, "tied": True}),
        (partial(EarlyFusion, bidirectional=True), {"experts": 0}),
        (partial(CrossAttention, layers=[1]), {"experts": 4, "top_k": 2}),
    ],
)
def test_shapes_alone_count_what_running_counts(
    fusion: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a count on shapes that misses an operation: one that indices pick rows for,
    that a tied weight takes part in twice, or that fusion adds for as many tiles as there are.

    The decoder's attention, whose kernels pad, is that of the shapes in both.
    """
    torch.manual_seed(0)
    for name in ("attend", "linear", "grouped_mm", "tokens_multiple", "visits_of"):
        monkeypatch.setattr(cpu, name, getattr(meta, name))
    model, batch = charts(fusion, **options)
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        loss = model.train().loss(batch)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert step_flops(model, batch) == counter.get_total_flops() > 0


def test_images_in_both_directions_cost_what_causal_ones_do() -> None:
    """Guards against a budget that gives one arm twice the steps: long rows of blocks are cut."""
    encoder = MetaCLIP(tile_size=32, patch_size=8, width=32, layers=1, heads=2)
    flops = []
    for bidirectional in (False, True):
        fusion = partial(EarlyFusion, shuffle=1, bidirectional=bidirectional)
        model = Pretrain(encoder, fusion, BackboneConfig(**SHAPE, experts=0))
        images = tuple(Charts(size=32).sample("train", n).images[0] for n in range(12))
        shown = replace(Charts(size=32).sample("train", 0), images=images)
        flops.append(step_flops(model, collate([model.model.prompts.encode_sample(shown)])))
    assert flops[0] == flops[1]


def test_a_large_model_is_counted_without_memory() -> None:
    """Guards against weights, activations or gradients that counting allocates or multiplies: this
    model has 60 GB of them, and one pass takes 20 TFLOP.
    """
    with without_memory():
        model = Pretrain(backbone=preset("1b"))
    weights = {p.device.type for p in model.parameters()}
    assert weights == {"meta"}
    spent = time.process_time()
    flops = step_flops(model, batch_of(4, 512, 10))
    spent = time.process_time() - spent
    active = 1e9  # by the preset's name
    assert 6 * active * 4 * 512 * 0.8 < flops < 6 * active * 4 * 512 * 1.3
    assert spent < 60


def test_a_shape_that_hangs_on_weights_is_told() -> None:
    """Guards against a wrong count in place of an error, where the host reads a float."""

    class Reading(Pretrain):
        def loss(self, batch: Batch) -> Tensor:
            loss = super().loss(batch)
            return loss if loss.item() > 0 else -loss

    with pytest.raises(RuntimeError, match="meta"):
        step_flops(Reading(backbone=BackboneConfig(**SHAPE)), batch_of(1, 8, 2))


# --- What counting leaves behind ------------------------------------------------------------------


class Dropping(Pretrain):
    """An objective that draws random numbers, and keeps a buffer of what it has seen."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen = nn.BatchNorm1d(1)

    def loss(self, batch: Batch) -> Tensor:
        assert self.training
        seen = self.seen(torch.randn(8, 1)).sum()
        return super().loss(batch) * torch.rand(()) + seen


def test_counting_leaves_no_trace():
    """Guards against a count that changes the run after it: gradients, random numbers, modes,
    buffers, or the experts' load since the last update.
    """
    model = Dropping(backbone=BackboneConfig(**SHAPE, experts=4))
    batch = batch_of(2, 12, 4)
    model.loss(batch).backward()
    model.eval()
    model.model.backbone.layers[1].train()

    def everything() -> dict[str, Any]:
        return copy.deepcopy(
            {
                "gradients": {n: p.grad for n, p in model.named_parameters()},
                "state": dict(model.named_buffers()) | dict(model.named_parameters()),
                "modes": {n: torch.tensor(m.training) for n, m in model.named_modules()},
                "random": {"state": torch.get_rng_state()},
                "load": dict(model._sums._sums),
            }
        )

    before = everything()
    assert step_flops(model, batch) > 0
    after = everything()
    for what, tensors in before.items():
        assert tensors.keys() == after[what].keys(), what
        for name, tensor in tensors.items():
            torch.testing.assert_close(after[what][name], tensor, rtol=0, atol=0, msg=name)


# --- The counter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_alike_for_every_kernel(kernel, masked):
    """Guards against a budget in FLOPs that is more steps on one device than on another."""
    B, H, G, T, S, K = 2, 6, 2, 5, 7, 8
    q, k, v = (
        torch.randn(B, heads, length, K, requires_grad=True)
        for heads, length in ((H, T), (G, S), (G, S))
    )
    mask = torch.rand(B, 1, T, S) > 0.2 if masked else None
    with sdpa_kernel(kernel), flop_counter() as counter:
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        mixed.square().sum().backward()
    assert counter.get_total_flops() == 6 * 2 * B * H * T * S * K


def test_flops_of_grouped_matmul():
    """Guards against experts that the FLOP counter passes over: 0 instead of 3 matmuls."""
    experts = Experts(4, 8, 16)
    for parameter in experts.parameters():
        nn.init.ones_(parameter)
    x = torch.randn(10, 8, requires_grad=True)
    ends = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
    with flop_counter() as counter:
        experts(x, ends).square().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * (8 * 32 + 16 * 8)


def test_matmul_peak_leaves_random_numbers_alone():
    """Guards against a measurement that changes the training it measures."""
    before = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8
    assert torch.equal(torch.get_rng_state(), before)
