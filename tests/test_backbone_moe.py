"""The mixture: sparse dispatch against a dense oracle, gates, balancing."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sandbox.backbone.backends import products
from sandbox.backbone.backends.visits import padded_visits, sorted_visits
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.moe import MoE, Routing, balance_loss, max_violation


def mixture(**changes) -> MoE:
    """A mixture layer with random weights."""
    torch.manual_seed(0)
    config = BackboneConfig(
        **{"width": 16, "expert_hidden": 12, "experts": 6, "top_k": 2} | changes
    )
    layer = MoE(config, layer=1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def oracle(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, summed under the gates: the definition."""
    logits = layer.router(x)
    scores = logits + (layer.balance_bias if layer.config.balance == "bias" else 0)
    chosen = torch.zeros_like(logits).scatter(-1, scores.topk(layer.config.top_k).indices, 1)
    sigmoid = layer.config.router_score == "sigmoid"
    gates = chosen * (logits.sigmoid() if sigmoid else logits.softmax(-1))
    total = layer.shared(x)
    for e in range(layer.config.experts):
        scale, on = gates[:, e, None], chosen[:, e, None]
        inside = layer.config.router_placement == "input"
        gate, up = ((x * scale if inside else x) @ layer.experts.gate_up[e]).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ layer.experts.down[e]
        total = total + on * (y if inside else y * scale)
    return total


@pytest.mark.parametrize(
    ("score", "placement", "top_k", "balance"),
    list(itertools.product(("sigmoid", "softmax"), ("input", "output"), (1, 2), ("none", "bias"))),
)
def test_dispatch_equals_every_expert_on_every_token(score, placement, top_k, balance):
    """Guards against tokens lost or crossed between experts, forwards and backwards."""
    layer = mixture(router_score=score, router_placement=placement, top_k=top_k, balance=balance)
    if balance == "bias":
        layer.balance_bias.copy_(torch.randn(6))
    x = torch.randn(37, 16, requires_grad=True)
    weights = [x, *layer.parameters()]
    sparse, dense = layer(x[None])[0][0], oracle(layer, x)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
    wanted = torch.randn_like(dense)
    for ours, theirs in zip(
        torch.autograd.grad((sparse * wanted).sum(), weights),
        torch.autograd.grad((dense * wanted).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_one_token_takes_the_direct_path():
    """Guards against a decoding path that disagrees with training's."""
    for placement in ("input", "output"):
        layer = mixture(router_placement=placement)
        x = torch.randn(1, 1, 16)
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0][0], oracle(layer, x[0]), atol=1e-5, rtol=1e-5)


def test_experts_without_tokens_have_zero_gradient():
    """Guards against empty groups in the grouped matmul."""
    layer = mixture(top_k=1, balance="bias")
    layer.balance_bias.copy_(torch.tensor([0.0, 0, 100, 0, 0, 0]))
    layer(torch.randn(1, 9, 16))[0].sum().backward()
    gradient = layer.experts.gate_up.grad
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1, 3, 4, 5]].abs().sum() == 0


def test_gate_on_input_differs_from_gate_on_output():
    """Guards against the placement bug of several ports: the two are different models."""
    x = torch.randn(1, 5, 16)
    inside, outside = (mixture(router_placement=p)(x)[0] for p in ("input", "output"))
    assert not torch.allclose(inside, outside, atol=1e-3)


def test_router_learns_through_the_gate():
    """Guards against a detached gate, which leaves the router untrained."""
    layer = mixture(balance="none")
    layer(torch.randn(1, 9, 16))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0


def test_balance_loss_is_one_when_even_and_moves_the_router():
    """Guards against a balancing loss that never reaches the router (or squashes twice)."""
    even = Routing(0, torch.zeros(12, 6), torch.arange(12)[:, None] % 6)
    torch.testing.assert_close(balance_loss(even), torch.tensor(1.0))
    layer = mixture(balance="loss")
    _, routing = layer(torch.randn(1, 33, 16))
    loss = balance_loss(routing)
    load = routing.load() / routing.load().sum()
    expected = 6 * (load * routing.logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert layer.router.weight.grad.abs().max() > 0


def test_load_counts_tokens_by_weight():
    """Guards against a load by modality that counts the other one."""
    routing = Routing(0, torch.randn(4, 3), torch.tensor([[0], [1], [2], [2]]))
    assert routing.load().tolist() == [1, 1, 2]
    assert routing.load(torch.tensor([1.0, 1.0, 0.0, 0.0])).tolist() == [1, 1, 0]


@pytest.mark.parametrize("multiple", [1, 4])
def test_visits_find_their_expert_and_their_way_back(multiple):
    """Guards against rows that are padded with another expert's visits."""
    torch.manual_seed(0)
    chosen = torch.randint(0, 5, (23, 2)).masked_fill_(torch.rand(23, 2) < 0.3, 3)
    # Nothing visits the last one.
    visits = sorted_visits(chosen, 6) if multiple == 1 else padded_visits(chosen, 6, multiple)
    sizes = visits.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    assert all(size % multiple == 0 for size in sizes)
    assert sizes[5] == 0
    expert = torch.arange(6).repeat_interleave(torch.tensor(sizes))
    assert expert[visits.rows].equal(chosen.flatten())
    assert visits.order[visits.rows].equal(torch.arange(46))
    blank = set(range(sum(sizes))) - set(visits.rows.tolist())
    assert blank == set([] if visits.blank is None else visits.blank.tolist())


def test_padded_visits_change_nothing(monkeypatch):
    """Guards against blank rows that reach the output, or the experts' gradients."""
    torch.manual_seed(0)
    layer = mixture()
    x = torch.randn(37, 16, requires_grad=True)
    results = []
    for multiple in (1, 8):
        monkeypatch.setattr(products, "visits_multiple", lambda *_, m=multiple: m)
        out = layer(x)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)


def test_bias_evens_the_load():
    """Guards against a bias that moves the wrong way: a skewed router must come to even load."""
    layer = mixture(top_k=1, balance="bias", balance_rate=0.05)
    x = torch.randn(1, 600, 16) + 1.0
    with torch.no_grad():
        first = max_violation(layer(x)[1].load())
        for _ in range(200):
            layer.nudge(layer(x)[1].load())
        last = max_violation(layer(x)[1].load())
    assert first > 0.5
    assert last < 0.15


def test_bias_keeps_a_mean_of_zero():
    """Guards against a bias that drifts, one that an even load moves, and a checkpoint from before
    the centring that no longer chooses as it did.
    """
    layer = mixture(balance="bias", balance_rate=0.5)
    layer.nudge(torch.tensor([9.0, 1, 1, 1, 0, 0]))  # one has too much, five too little
    expected = torch.tensor([-5.0, 1, 1, 1, 1, 1]) / 6
    torch.testing.assert_close(layer.balance_bias, expected)
    before = layer.balance_bias.clone()
    layer.nudge(torch.full((6,), 2.0))
    torch.testing.assert_close(layer.balance_bias, before, atol=1e-7, rtol=0)
    layer.balance_bias += 3.0  # as an old checkpoint may have it
    layer.nudge(torch.full((6,), 2.0))
    torch.testing.assert_close(layer.balance_bias, before, atol=1e-6, rtol=0)


def test_bias_stays_fp32_in_a_bf16_model():
    """Guards against steps that bf16 swallows: from 8 on, 0.02 would no longer move the bias."""
    layer = mixture(balance="bias", balance_rate=0.02, expert_hidden=16)
    layer.balance_bias.copy_(torch.linspace(-1, 1, 6))
    bias = layer.balance_bias.clone()
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.balance_bias.equal(bias), "to the last bit"
    for _ in range(1000):
        layer.nudge(torch.tensor([0.0, 0, 0, 2, 2, 2]))
    moved = (layer.balance_bias - bias).abs()
    torch.testing.assert_close(moved, torch.full((6,), 20.0), atol=0.01, rtol=0)
    assert layer(torch.randn(1, 9, 16).bfloat16())[0].dtype == torch.bfloat16
    layer.to_empty(device="meta").to(torch.float16)
    assert (layer.balance_bias.device.type, layer.balance_bias.dtype) == ("meta", torch.float32)


def test_bias_never_enters_the_gate():
    """Guards against a balancing bias that changes the experts' output, not just their choice."""
    layer = mixture(balance="bias")
    x = torch.randn(1, 9, 16)
    before = layer(x)[0]
    layer.balance_bias.fill_(5.0)  # the same for all: the choice stays
    torch.testing.assert_close(layer(x)[0], before)
