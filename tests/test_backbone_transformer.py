"""The decoder as a whole: parameters, gradients, presets."""

import pytest
import torch

from sandbox.backbone.config import BackboneConfig, RopeScaling, preset
from sandbox.backbone.rope import frequencies, rotate, rotation
from sandbox.backbone.transformer import Backbone
from sandbox.errors import UserError
from sandbox.params import count

TOTAL = {"scout": 107_769_861_120, "maverick": 400_711_848_960}
ACTIVE = {"scout": 17_172_894_720, "maverick": 17_184_691_200}


@pytest.mark.parametrize("name", TOTAL)
def test_presets_have_the_published_number_of_parameters(name):
    """Guards against a wrong width, layer pattern or tied head in a preset."""
    counted = count(preset(name))
    assert counted["total"] == TOTAL[name]
    assert counted["active"] == ACTIVE[name]


def test_unknown_preset_names_the_nearest():
    """Guards against a bare KeyError."""
    with pytest.raises(UserError, match="did you mean 'scout'"):
        preset("scuot")


@pytest.mark.parametrize(
    "changes",
    [{"heads": 3, "kv_heads": 2}, {"head_dim": 7}, {"top_k": 9}, {"moe_every": 0}, {"chunk": 0}],
    ids=str,
)
def test_impossible_configurations_are_refused(changes):
    """Guards against a shape error deep in the forward pass."""
    with pytest.raises(UserError, match=next(iter(changes))):
        BackboneConfig(**changes)


@pytest.mark.parametrize("name", ["tiny", "1m"])
def test_every_parameter_gets_a_gradient(name):
    """Guards against parameters that never learn."""
    torch.manual_seed(0)
    model = Backbone(preset(name))
    tokens = torch.randint(0, model.config.vocab_size, (2, 64))
    model.unembed(model(tokens).hidden).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_the_same_seed_gives_the_same_bits():
    """Guards against a nondeterministic kernel or an uninitialised buffer."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Backbone(preset("tiny"))
        loss = model.unembed(model(torch.arange(96)[None]).hidden).square().mean()
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    assert results[0][0].equal(results[1][0])
    assert all(a.equal(b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_it_learns_to_copy():
    """Guards against a model that runs but cannot learn: recall needs attention and position."""
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(vocab_size=16, width=32, head_dim=16, heads=2, init_std=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        half = torch.randint(0, 16, (16, 8))
        tokens = torch.cat((half, half), dim=1)
        logits = model.unembed(model(tokens[:, :-1]).hidden)[:, 7:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), half.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0, f"chance is {torch.log(torch.tensor(16.0)):.2f}"


def test_tokens_and_embeddings_are_the_same_path():
    """Guards against a text-only run that differs from the plain decoder by a bit."""
    model = Backbone(preset("tiny"))
    tokens = torch.arange(30)[None]
    assert model(tokens).hidden.equal(model(embeds=model.embed(tokens)).hidden)
    with pytest.raises(ValueError, match="either tokens or embeds"):
        model()


def test_scout_stretches_the_last_29_frequencies():
    """Guards against Llama 3's blend where low = high leaves no band (and a 0 / 0)."""
    plain = frequencies(128, 5e5)
    scaled = frequencies(128, 5e5, RopeScaling(16, 1, 1, 8192))
    assert scaled[:35].equal(plain[:35])
    torch.testing.assert_close(scaled[35:], plain[35:] / 16)


def test_llama3_scaling_blends_the_band():
    """Guards against a step where Llama 3.1 has a ramp: factor 8, low 1, high 4."""
    plain = frequencies(128, 5e5)
    ratio = frequencies(128, 5e5, RopeScaling(8, 1, 4, 8192)) / plain
    assert ratio[0] == 1
    torch.testing.assert_close(ratio[-1], torch.tensor(1 / 8))
    assert ((ratio > 0.126) & (ratio < 0.999)).any()
    assert (ratio.diff() <= 1e-6).all()


def test_rotation_turns_adjacent_pairs():
    """Guards against half-rotation (Llama 3's layout), which is wrong for Llama 4."""
    turn = rotation(torch.tensor([[1]]), torch.tensor([torch.pi / 2, 0.0]))
    x = torch.tensor([[[[1.0, 0.0, 5.0, 6.0]]]])
    expected = torch.tensor([[[[0.0, 1.0, 5.0, 6.0]]]])
    torch.testing.assert_close(rotate(x, turn), expected, atol=1e-6, rtol=0)


def test_an_adapter_of_no_layer_is_refused() -> None:
    """Guards against an adapter that trains in vain: before layer 4 of 4 nothing would call it."""
    backbone = Backbone(preset("tiny"))
    with pytest.raises(ValueError, match="before layer 4, but the backbone has 4 layers"):
        backbone(torch.zeros(1, 2, dtype=torch.int64), adapters={4: torch.nn.Identity()})
