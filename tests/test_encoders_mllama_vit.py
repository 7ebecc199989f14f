"""Llama 3.2 Vision's tower: parity with transformers, and the grouping of tiles into images."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from encoders.mllama_vit import MllamaVision
from tests.crossing import grouped

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
FEATURES, GRADIENT = 5e-5, 1e-4  # agreement in fp32: absolute, and relative by L2 norm

# 17 tokens a tile are padded to 24; an epsilon large enough that another one would show.
HIDDEN, MAX_TILES = 32, 4
TOY = {
    "tile_size": 32,
    "patch_size": 8,
    "hidden": HIDDEN,
    "layers": 4,
    "global_layers": 2,
    "heads": 4,
    "ffn_hidden": 48,
    "intermediate_layers": [0, 2, 1],
    "max_tiles": MAX_TILES,
    "norm_eps": 0.01,
}
NAMES = {
    "patch_embedding": "patch_embed",
    "class_embedding": "class_token",
    "gated_positional_embedding.embedding": "position.patch",
    "gated_positional_embedding.tile_embedding": "position.tile",
    "gated_positional_embedding.gate": "position.gate",
    "pre_tile_positional_embedding.embedding": "tile_before.table",
    "pre_tile_positional_embedding.gate": "tile_before.gate",
    "post_tile_positional_embedding.embedding": "tile_after.table",
    "post_tile_positional_embedding.gate": "tile_after.gate",
    "layernorm_pre": "norm_before",
    "layernorm_post": "norm_after",
    "global_transformer.layers": "global_layers",
    "transformer.layers": "layers",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.fc1": "ffn.up",
    "mlp.fc2": "ffn.down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate_attn": "attention_gate",
    "gate_ffn": "ffn_gate",
}


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' tensors under our names; their shapes are the same."""
    ours = {}
    for name, tensor in state.items():
        for theirs, mine in NAMES.items():
            name = name.replace(theirs, mine)
        ours[name] = tensor
    return ours


def pair():
    """Transformers' tower and ours on the same random weights, gates open."""
    torch.manual_seed(0)
    theirs = transformers.MllamaVisionModel(
        transformers.MllamaVisionConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=TOY["layers"],
            num_global_layers=TOY["global_layers"],
            attention_heads=TOY["heads"],
            intermediate_size=TOY["ffn_hidden"],
            vision_output_dim=4 * HIDDEN,
            image_size=TOY["tile_size"],
            patch_size=TOY["patch_size"],
            norm_eps=TOY["norm_eps"],
            max_num_tiles=MAX_TILES,
            intermediate_layers_indices=TOY["intermediate_layers"],
            attn_implementation="eager",
        )
    )
    for name, parameter in theirs.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean=around, std=0.6 if "gate" in name else 0.2)
    ours = MllamaVision(**TOY)
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs, ours


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run_theirs(theirs, tiles: Tensor, arrangement: list[tuple[int, int]]) -> Tensor:
    """Features of the real tiles, from transformers' padded ones."""
    counts = [rows * columns for rows, columns in arrangement]
    padded = torch.zeros(1, len(counts), MAX_TILES, *tiles.shape[1:])
    mask = torch.zeros(1, len(counts), MAX_TILES, dtype=torch.int64)
    for image, part in enumerate(tiles.split(counts)):
        padded[0, image, : len(part)] = part
        mask[0, image, : len(part)] = 1
    supported = theirs.config.supported_aspect_ratios
    kinds = torch.tensor([[supported.index(list(a)) + 1 for a in arrangement]])
    features = theirs(padded, kinds, mask).last_hidden_state[0]
    return torch.cat([features[image, :count] for image, count in enumerate(counts)])


@pytest.mark.parametrize(
    "arrangement",
    [[(1, 1)], [(2, 1)], [(1, 3)], [(2, 2)], [(1, 3), (1, 1), (2, 1), (2, 2)]],
    ids=["1x1", "2x1", "1x3", "2x2", "mixed"],
)
def test_features_and_gradients_equal_transformers(arrangement: list[tuple[int, int]]) -> None:
    """Guards against lost padding, a swapped gate, another tile's embedding, joined the wrong way.

    Padding counts: the mask hides it from padding alone, so real patches attend to it.
    """
    theirs, ours = pair()
    tiles = pixels(sum(rows * columns for rows, columns in arrangement))
    expected = run_theirs(theirs, tiles, arrangement)
    features = ours(tiles, arrangement)
    assert features.shape == (len(tiles), 17, 4 * HIDDEN) == (len(tiles), 1 + 16, ours.width)
    torch.testing.assert_close(features, expected, atol=FEATURES, rtol=0)

    pull = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * pull).sum().backward()
    (expected * pull).sum().backward()
    wanted = translate({name: p.grad for name, p in theirs.named_parameters()})
    got = {name: p.grad for name, p in ours.named_parameters()}
    for name, (mine, reference) in grouped(got, wanted).items():
        error = (mine - reference).norm() / reference.norm()
        assert error < GRADIENT, f"gradient of {name}: relative error {error:.1e}"


def test_every_weight_has_its_place_byte_for_byte() -> None:
    """Guards against a checkpoint that loses or reshapes weights on the way in."""
    theirs, ours = pair()
    state, expected = ours.state_dict(), translate(theirs.state_dict())
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def test_alone_each_tile_is_an_image() -> None:
    """Guards against tiles of different images that attend to each other by default."""
    _, ours = pair()
    tiles = pixels(3)
    assert torch.equal(ours(tiles), ours(tiles, [(1, 1)] * 3))
    together = ours(tiles, [(1, 3)])
    assert not torch.allclose(together, ours(tiles), atol=1e-3)


def test_tiles_of_an_image_see_each_other_and_no_other_image() -> None:
    """Guards against images mixed up by their padding or by their order."""
    _, ours = pair()
    tiles = pixels(5)
    features = ours(tiles, [(2, 1), (1, 3)])
    torch.testing.assert_close(features[:2], ours(tiles[:2], [(2, 1)]), atol=1e-5, rtol=0)
    torch.testing.assert_close(features[2:], ours(tiles[2:], [(1, 3)]), atol=1e-5, rtol=0)
    tiles[4] += 1
    moved = (ours(tiles, [(2, 1), (1, 3)]) - features).abs().amax((1, 2)) > 1e-3
    assert moved.tolist() == [False, False, True, True, True]


def test_weights_may_follow_after_building_without_memory() -> None:
    """Guards against tables that no checkpoint holds and that the meta device leaves empty."""
    _, ours = pair()
    with torch.device("meta"):
        empty = MllamaVision(**TOY)
    empty.load_state_dict(ours.state_dict(), assign=True)
    tiles = pixels(2)
    assert torch.equal(empty(tiles, [(2, 1)]), ours(tiles, [(2, 1)]))


def test_a_pretrained_towers_sizes() -> None:
    """Guards against defaults that are not Llama 3.2 Vision's: 7680 features, 32 x 32 patches."""
    with torch.device("meta"):
        ours = MllamaVision()
        config = transformers.MllamaVisionConfig()
        theirs = transformers.MllamaVisionModel(config)
    assert (ours.width, ours.grid) == (config.vision_output_dim, 32)
    assert ours.arrangements == [tuple(a) for a in config.supported_aspect_ratios]
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {n: tensor.shape for n, tensor in translate(theirs.state_dict()).items()}


@pytest.mark.parametrize(
    ("arrangement", "message"),
    [
        ([(2, 1), (1, 1)], r"take 3 tiles, but 4 are given"),
        ([(1, 1)] * 5, r"take 5 tiles, but 4 are given"),
        ([(3, 2)], r"arrangement of \(3, 2\) tiles .*this tower has \[\(1, 1\), \(1, 2\)"),
    ],
)
def test_tiles_must_add_up(arrangement: list[tuple[int, int]], message: str) -> None:
    """Guards against tiles that silently join the wrong image."""
    with pytest.raises(ValueError, match=message):
        MllamaVision(**TOY)(pixels(4), arrangement)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 7}, r"tile_size by patch_size .* 32 / 7"),
        ({"heads": 3}, r"hidden by heads .* 32 / 3"),
        ({"intermediate_layers": [4]}, r"\[4\]: the layers are 0 to 3"),
        ({"intermediate_layers": [-1]}, r"\[-1\]: the layers are 0 to 3"),
        ({"arrangements": [[1, 1], [3, 2]]}, r"exceed max_tiles=4"),
    ],
)
def test_sizes_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    """Guards against a tower that is built and then fails deep inside, or ignores an argument."""
    with pytest.raises(ValueError, match=message):
        MllamaVision(**TOY | arguments)
