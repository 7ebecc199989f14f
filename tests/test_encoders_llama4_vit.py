"""Llama 4's tower: parity with transformers, its traps one by one, and its size."""

import re
from collections.abc import Callable
from functools import partial
from inspect import getdoc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import llama4_vit
from encoders.llama4_vit import Llama4Vision, rotate, rotation
from fusion import projectors
from fusion.projectors import PixelShuffleMLP

llama4 = pytest.importorskip(
    "transformers.models.llama4.modeling_llama4", reason="parity needs transformers"
)

LAYERS, WIDTH, HEADS, ADAPTER, TOKEN = 4, 48, 3, 40, 36


class Theirs(nn.Module):
    """Transformers' tower with its adapter, and its projector."""

    def __init__(self, tile_size: int, patch_size: int) -> None:
        super().__init__()
        vision = llama4.Llama4VisionConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            image_size=tile_size,
            patch_size=patch_size,
            pixel_shuffle_ratio=0.5,
            projector_input_dim=ADAPTER,
            projector_output_dim=ADAPTER,
            vision_output_dim=ADAPTER,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            attn_implementation="eager",
        )
        text = llama4.Llama4TextConfig(hidden_size=TOKEN)
        self.tower = llama4.Llama4VisionModel(vision)
        self.last = llama4.Llama4MultiModalProjector(
            llama4.Llama4Config(vision_config=vision.to_dict(), text_config=text)
        )

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """Tokens, then what stands before the first layer and after each."""
        out = self.tower(tiles, output_hidden_states=True)
        return self.last(out.last_hidden_state), *out.hidden_states


class Ours(nn.Module):
    """The encoder, and the projector that a fusion puts behind it."""

    def __init__(self, tile_size: int, patch_size: int) -> None:
        super().__init__()
        self.encoder = Llama4Vision(tile_size, patch_size, WIDTH, LAYERS, HEADS, 4 * WIDTH)
        self.projector = PixelShuffleMLP(WIDTH, self.encoder.grid, TOKEN, hidden=ADAPTER)

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """Tokens, then what stands before the first layer and after each."""
        states: list[Tensor] = []
        before = self.encoder.layers[0].register_forward_pre_hook(lambda _, x: states.append(x[0]))
        after = [
            block.register_forward_hook(lambda _, __, y: states.append(y))
            for block in self.encoder.layers
        ]
        tokens = self.projector(self.encoder(tiles))
        for hook in (before, *after):
            hook.remove()
        return tokens, *states


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``Theirs`` under the names of ``Ours``."""
    names = {
        "tower.patch_embedding.linear": "encoder.patch_embed",
        "tower.class_embedding": "encoder.class_token",
        "tower.positional_embedding_vlm": "encoder.positions",
        "tower.layernorm_pre": "encoder.norm_pre",
        "tower.layernorm_post": "encoder.norm_post",
        "tower.model.layers": "encoder.layers",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "tower.vision_adapter.mlp": "projector",
        "last.linear_1": "projector.project",
    }
    ours = {}
    for key, tensor in state.items():
        for their, our in names.items():
            key = key.replace(their, our)
        ours[key] = tensor
    return ours


def pair(tile_size: int = 24, patch_size: int = 4) -> tuple[Theirs, Ours]:
    """Both on the same random weights, none of them all zeros or all ones."""
    theirs, ours = Theirs(tile_size, patch_size), Ours(tile_size, patch_size)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        matrix = parameter.ndim > 1
        nn.init.normal_(parameter, mean=0.0 if matrix else 0.5, std=0.2 if matrix else 0.3)
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs, ours


def pixels(tile_size: int = 24, count: int = 3) -> Tensor:
    return torch.rand(count, 3, tile_size, tile_size) * 2 - 1


# --- The whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile_size", "patch_size"), [(16, 4), (24, 4), (30, 5)])
def test_every_layer_and_gradient_equals_transformers(tile_size: int, patch_size: int) -> None:
    """Guards against any difference from the real tower, of which imported weights would suffer."""
    theirs, ours = pair(tile_size, patch_size)
    tiles = pixels(tile_size)
    expected, got = theirs(tiles), ours(tiles)
    assert len(got) == len(expected) == LAYERS + 2
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=5e-5, rtol=0)

    weights = torch.randn_like(expected[0])
    for tokens in (expected[0], got[0]):
        (tokens * weights).sum().backward()
    gradients = translate({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients.pop(name)).norm() / parameter.grad.norm()
        assert error < 1e-4, f"gradient of {name}: relative error {error:.1e}"
    assert not gradients


# --- Traps: where another reading of the paper or of an article differs from the code -------------

GRID, HEAD_DIM = 6, WIDTH // HEADS  # of `pair()`


def pixels_in_y_x_c_order(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ours.encoder.patch_embed.weight
    weight.data = weight.data.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)


def class_position_first(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    ours.encoder.positions.data = ours.encoder.positions.data.roll(1, 0)


def norm_before_positions(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, positions = ours.encoder.norm_pre.forward, ours.encoder.positions
    monkeypatch.setattr(ours.encoder.norm_pre, "forward", lambda x: norm(x - positions) + positions)


def rows_before_columns(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rotation(GRID, HEAD_DIM).unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    ours.encoder.rotation_bits = table.view(torch.int32)


def class_token_turned(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rotation(GRID, HEAD_DIM)
    table[:, -1] = table[:, 0]  # or, the same to attention, places that count from 0
    ours.encoder.rotation_bits = table.view(torch.int32)


def pairs_across_halves(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    def across(x: Tensor, turn: Tensor) -> Tensor:
        adjacent = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return rotate(adjacent, turn).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    monkeypatch.setattr(llama4_vit, "rotate", across)


def causal_attention(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = partial(F.scaled_dot_product_attention, is_causal=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


def tanh_gelu(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "gelu", partial(F.gelu, approximate="tanh"))


def pixel_unshuffle(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffle(features: Tensor, block: int) -> Tensor:
        planes = features.transpose(1, 2).unflatten(2, (GRID, GRID))
        return F.pixel_unshuffle(planes, block).flatten(2).transpose(1, 2)

    monkeypatch.setattr(projectors, "pixel_shuffle", shuffle)


def one_gelu_in_the_adapter(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(features: Tensor) -> Tensor:
        hidden = mlp.gelu(mlp.fc1(projectors.pixel_shuffle(features, 2)))
        return mlp.project(mlp.fc2(hidden))

    mlp = ours.projector
    monkeypatch.setattr(mlp, "forward", forward)


TRAPS = [
    pixels_in_y_x_c_order,
    class_position_first,
    norm_before_positions,
    rows_before_columns,
    class_token_turned,
    pairs_across_halves,
    causal_attention,
    tanh_gelu,
    pixel_unshuffle,
    one_gelu_in_the_adapter,
]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_parity_notices(
    trap: Callable[[Ours, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against toy weights and sizes at which a trap fallen into would look like parity."""
    theirs, ours = pair()
    tiles = pixels()
    expected = theirs(tiles)

    def error() -> float:
        outputs = zip(ours(tiles), expected, strict=True)
        return max((mine - reference).abs().max().item() for mine, reference in outputs)

    assert error() < 5e-5
    trap(ours, monkeypatch)
    assert error() > 20 * 5e-5


def test_rotation_is_as_drawn() -> None:
    """Guards against rows before columns, places from 0, and a class token that turns."""
    lines = re.findall(r"^ *(?:patch \d|class token).*?\s{4,}(.*)$", getdoc(rotation), re.MULTILINE)
    drawn = torch.tensor([[float(angle) for angle in line.split()] for line in lines])
    assert drawn.shape == (5, 4)
    pairs = torch.tensor([1.0, 0.0]).repeat(4).expand(1, 5, 1, 8)  # each turns to (cos, sin)
    turned = rotate(pairs, rotation(2, 8)).view(5, 4, 2)
    torch.testing.assert_close(turned, torch.stack((drawn.cos(), drawn.sin()), dim=-1))


def test_rotation_equals_transformers_at_the_real_size() -> None:
    """Guards against what toy sizes hide: 22 frequencies a half, and a grid of 24."""
    config = llama4.Llama4VisionConfig(
        hidden_size=1408,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    expected = torch.view_as_real(llama4.Llama4VisionRotaryEmbedding(config).freqs_ci)
    pairs = torch.tensor([1.0, 0.0]).repeat(44).expand(1, 577, 1, 88)
    turned = rotate(pairs, rotation(24, 88)).view(577, 1, 44, 2)
    torch.testing.assert_close(turned, expected, atol=5e-6, rtol=0)


# --- Building it ----------------------------------------------------------------------------------


def toy() -> Llama4Vision:
    torch.manual_seed(0)
    return Llama4Vision(tile_size=32, patch_size=8, width=24, layers=2, heads=3, hidden=40)


def test_the_real_tower_has_the_real_size() -> None:
    """Guards against a bias too many, or a default that is not Scout's and Maverick's."""
    with torch.device("meta"):
        tower = Llama4Vision()
        projector = PixelShuffleMLP(tower.width, tower.grid, 5120, hidden=4096)
    last = projector.project.weight.numel()
    both = sum(p.numel() for p in (*tower.parameters(), *projector.parameters()))
    assert (both - last, last) == (850_960_896, 20_971_520)
    assert projector.tokens_per_tile == 144


def test_norms_have_the_real_epsilon() -> None:
    """Guards against another default, which toy weights are too large to show."""
    assert {m.eps for m in toy().modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_built_on_the_meta_device() -> None:
    """Guards against a rotation left without values when a checkpoint fills a tower built there."""
    filled = toy()
    with torch.device("meta"):
        empty = toy()
    assert empty.positions.is_meta
    empty.load_state_dict(filled.state_dict(), assign=True)
    tiles = pixels(32)
    assert torch.equal(empty(tiles), filled(tiles))


def test_another_dtype_keeps_the_rotation() -> None:
    """Guards against angles rounded to three digits once the model is moved to bfloat16."""
    tower = toy()
    before = tower.rotation_bits.view(torch.float32).clone()
    after = tower.to(torch.bfloat16).float().rotation_bits.view(torch.float32)
    assert torch.equal(after, before)
    assert "rotation_bits" not in tower.state_dict()


def test_starts_at_unit_scale_at_any_depth() -> None:
    """Guards against a residual stream that grows or fades with depth before training begins."""
    torch.manual_seed(0)
    tower = Llama4Vision(tile_size=32, patch_size=8, width=64, layers=24, heads=4, hidden=256)
    scales = []
    for block in tower.layers:
        block.register_forward_hook(lambda _, __, y: scales.append(y.std().item()))
    tower(pixels(32))
    assert 0.8 < min(scales) <= max(scales) < 1.5


def test_learns_where_a_bright_patch_is() -> None:
    """Guards against a dead start: every patch must come to know where the bright one is."""
    torch.manual_seed(0)
    tower = Llama4Vision(tile_size=16, patch_size=4, width=32, layers=2, heads=2, hidden=64)
    head = nn.Linear(32, 16)
    weights = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    tiles = torch.zeros(16, 16, 16)
    for place in range(16):
        y, x = (4 * i for i in divmod(place, 4))
        tiles[place, y : y + 4, x : x + 4] = 1
    tiles = tiles.unsqueeze(1).expand(-1, 3, -1, -1)
    target = torch.arange(16).repeat_interleave(16)
    for _ in range(120):
        loss = F.cross_entropy(head(tower(tiles)).flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tile_size": 30, "patch_size": 8}, r"tile_size \(30\).*patch_size \(8\).*6 pixels"),
        ({"width": 50, "heads": 3}, r"width \(50\).*heads \(3\)"),
        ({"width": 30, "heads": 3}, r"30 / 3 = 10.*divide by 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    """Guards against cut pixels and features, and against shape errors deep inside."""
    with pytest.raises(ValueError, match=message):
        Llama4Vision(**({"tile_size": 32, "patch_size": 8, "layers": 1} | sizes))
