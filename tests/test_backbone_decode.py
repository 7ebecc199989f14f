"""The lean decoding step gives what the forward pass gives, for every backbone it serves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sandbox.backbone import decode
from sandbox.backbone.cache import KVCache, close_up
from sandbox.backbone.config import BackboneConfig, RopeScaling
from sandbox.backbone.decode import Decoder, bags, copied_bytes, decoding, product, suits
from sandbox.backbone.transformer import Backbone
from sandbox.errors import UserError
from sandbox.generate import Sampling, generate_ids

TOLERANCE = {"atol": 2e-5, "rtol": 0}
VOCABULARY = 61
LENGTHS = (9, 4, 7)

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "dense": {"experts": 0},
    "every layer a mixture": {"moe_every": 1},
    "top 2": {"top_k": 2},
    "softmax": {"router_score": "softmax"},
    "output": {"router_placement": "output"},
    "top 2, softmax, output": {
        "top_k": 2,
        "router_score": "softmax",
        "router_placement": "output",
    },
    "no shared expert": {"shared_expert": False},
    "no balancing bias": {"balance": "none"},
    "no qk-norm": {"qk_norm": False},
    "rope scaling": {"rope_scaling": RopeScaling(8, 1, 4, 16)},
    "no rope": {"nope_every": 1},
    "rope alone": {"nope_every": 0},
    "no temperature": {"temperature_scale": 0.0},
    "tied": {"tied": True},
    "input only": {"input_only": 3},
    "no chunks": {"chunk": None},
    "chunks of 1": {"chunk": 1},
    "one group": {"kv_heads": 1},
    "epsilon": {"norm_eps": 0.1},
}


def backbone(**changes: Any) -> Backbone:
    """A backbone with every feature on, and no parameter or bias left at zero or one."""
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "width": 32, "layers": 4, "heads": 4, "kv_heads": 2}
    small |= {"head_dim": 8, "dense_hidden": 40, "expert_hidden": 24, "experts": 4}
    small |= {"moe_every": 2, "chunk": 4, "nope_every": 3, "temperature_floor": 4}
    small |= {"init_std": 0.2, "norm_eps": 0.01}
    model = Backbone(BackboneConfig(**small | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.3)
        for moe in model.mixtures().values():
            if model.config.balance == "bias":
                moe.balance_bias.normal_(std=0.5)
    return model


@pytest.fixture(params=["mm", "bags"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Products either way: the sizes of a test are too small for the second by themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(decode, "LARGE", 1 << 30 if request.param == "mm" else 1)
    yield request.param
    torch.set_num_threads(threads)


def filled(model: Backbone, prompt: Tensor, lengths: tuple[int, ...] | None = None) -> KVCache:
    """The cache behind prompts ``[B, T]``, with room for 24 more tokens."""
    B, T = prompt.shape
    documents = None
    if lengths is not None:
        documents = torch.tensor([[0] * n + [-1] * (T - n) for n in lengths])
    cache = KVCache(model.config, B, T + 24, like=torch.zeros(()))
    model(prompt, documents=documents, cache=cache)
    return cache


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "uneven"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_the_lean_step_is_the_forward_pass(
    changes: dict[str, Any], lengths: tuple[int, ...] | None, way: str
) -> None:
    """Guards against a norm's weight folded twice or not, a gate in the wrong place, a bias that
    enters it, a key in the wrong slot behind a chunk's edge, and rows mixed up as one leaves.
    """
    model = backbone(**changes)
    lean, tokens = Decoder(model), torch.randint(0, VOCABULARY, (3, 12 + max(LENGTHS)))
    prompt, forced = tokens[:, : max(LENGTHS)], tokens[:, max(LENGTHS) :]
    ours, plain = (filled(model, prompt, lengths) for _ in range(2))
    for step in range(12):
        if step in (5, 9):  # three rows, two, and one
            kept = torch.tensor(close_up([0, 2] if step == 5 else [1]))
            ours.select(kept)
            plain.select(kept)
            forced = forced[kept]
        found = lean(forced[:, step], ours)
        decoded = model(forced[:, step : step + 1], cache=plain)
        expected = model.unembed(decoded.hidden[:, 0])
        torch.testing.assert_close(found, expected, **TOLERANCE)
        assert found.argmax(-1).equal(expected.argmax(-1))
    assert ours.lengths.equal(plain.lengths)
    assert ours.longest == plain.longest
    for held, expected in zip(ours.keys + ours.values, plain.keys + plain.values, strict=True):
        torch.testing.assert_close(held, expected, **TOLERANCE)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_generated_ids_are_those_of_the_forward_pass(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a loop that takes the lean step and then reads something else of it."""
    model, calls = backbone(**changes), []
    tokens = torch.randint(0, VOCABULARY, (3, 5))
    sampling = Sampling(max_tokens=20, stop_ids=range(0, VOCABULARY, 9))
    called = Decoder.__call__
    monkeypatch.setattr(
        Decoder, "__call__", lambda self, *inputs: calls.append(0) or called(self, *inputs)
    )
    lean = generate_ids(model, tokens, sampling)
    assert calls or all(not reply for reply in lean)
    calls.clear()
    monkeypatch.setattr(decode, "MOST_COPIED", 0)
    assert generate_ids(model, tokens, sampling) == lean
    assert not calls


class _Scale(nn.Module):
    """An adapter: multiplies every token by what its context holds for the row."""

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden * context


@torch.inference_mode()
def test_adapters_stand_before_their_layers() -> None:
    """Guards against a lean step that skips cross-attention, or runs it a layer late."""
    model = backbone()
    tokens = torch.randint(0, VOCABULARY, (2, 6))
    context, adapters = torch.randn(2, 1, 32), {0: _Scale(), 2: _Scale()}
    ours, plain = (filled(model, tokens) for _ in range(2))
    found = Decoder(model)(tokens[:, 0], ours, adapters, context)
    decoded = model(tokens[:, :1], cache=plain, adapters=adapters, context=context)
    torch.testing.assert_close(found, model.unembed(decoded.hidden[:, 0]), **TOLERANCE)


@torch.inference_mode()
def test_a_full_cache_is_refused() -> None:
    """Guards against a lean step that overwrites the oldest keys in silence."""
    model = backbone()
    cache = filled(model, torch.randint(0, VOCABULARY, (2, 6)))
    lean, token = Decoder(model), torch.zeros(2, dtype=torch.int64)
    for _ in range(24):
        lean(token, cache)
    with pytest.raises(UserError, match=r"holds 30 .* 31 are needed"):
        lean(token, cache)


def test_what_it_does_not_serve_takes_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against fp32 arithmetic on weights of another precision, against a step that training
    could differentiate through prepared copies, and against copies of a large model's weights.
    """
    model = backbone()
    assert not suits(model)  # with gradients
    with torch.inference_mode():
        assert isinstance(decoding(model), Decoder)
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits(model)
        assert not suits(backbone().to(torch.bfloat16))
        assert not suits(backbone().to("meta"))
        monkeypatch.setattr(decode, "MOST_COPIED", copied_bytes(model))
        assert suits(model)
        monkeypatch.setattr(decode, "MOST_COPIED", copied_bytes(model) - 1)
        assert not suits(model)


def test_another_dtype_decodes_all_the_same() -> None:
    """Guards against a fallback that nobody has ever run."""
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    exact = generate_ids(backbone(experts=0).double(), tokens, Sampling(max_tokens=14))
    assert exact == generate_ids(backbone(experts=0), tokens, Sampling(max_tokens=14))


@torch.inference_mode()
@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"moe_every": 1}], ids=str)
def test_experts_are_not_copied(changes: dict[str, Any]) -> None:
    """Guards against a model that takes twice its memory to decode: most of it are experts."""
    model = backbone(experts=16, **changes)
    held = {w.data_ptr() for w in model.parameters()}
    lean = Decoder(model)
    prepared = [lean.head, *(x for layer in lean.layers for x in vars(layer).values())]
    matrices = [x for x in prepared if isinstance(x, Tensor) and x.ndim == 2]
    assert sum(x.nbytes for x in matrices if x.data_ptr() not in held) == copied_bytes(model)
    experts = sum(w.nbytes for moe in model.mixtures().values() for w in moe.experts.parameters())
    everything = sum(w.nbytes for w in model.parameters())
    assert copied_bytes(model) < everything - experts + model.embed.weight.nbytes


def test_weights_are_prepared_anew() -> None:
    """Guards against replies of the weights before an update, e.g. in validation."""
    model = backbone()
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    before = generate_ids(model, tokens, Sampling(max_tokens=8))
    model.initialize()
    after = generate_ids(model, tokens, Sampling(max_tokens=8))
    fresh = backbone()
    fresh.load_state_dict(model.state_dict())
    assert before != after == generate_ids(fresh, tokens, Sampling(max_tokens=8))


@torch.inference_mode()
@pytest.mark.parametrize("outputs", [24, decode.LARGE // 48 + 1], ids=["small", "large"])
@pytest.mark.parametrize("rows", [1, 2, decode.FEW_ROWS, decode.FEW_ROWS + 1])
def test_products_of_few_rows_are_products(rows: int, outputs: int) -> None:
    """Guards against bags that begin in the wrong place, or read another expert's rows."""
    torch.manual_seed(0)
    x, weights = torch.randn(rows, 48), torch.randn(3, 48, outputs)
    ids = torch.arange(rows) % 3
    torch.testing.assert_close(product(x, weights[1]), x @ weights[1], atol=1e-4, rtol=0)
    expected = torch.einsum("mi,mio->mo", x, weights[ids])
    torch.testing.assert_close(bags(x, weights, ids), expected, atol=1e-4, rtol=0)


def test_hooks_on_layers_see_every_token() -> None:
    """Guards against a probe that sees the prompt and none of the reply."""
    backbone = Backbone(BackboneConfig(vocab_size=50)).eval()
    with torch.inference_mode():
        assert suits(backbone)
        handle = backbone.layers[1].attention.register_forward_hook(lambda *_: None)
        assert not suits(backbone)
        handle.remove()
        assert suits(backbone)
