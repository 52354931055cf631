import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks import AudioEncoder, TableEncoder, TextEncoder, backbone, resnet, token_encoder
from ds_lightning.networks.token_encoders import FeatureTokens, ImageTokens, TextTokens

INPUTS = {
    "image": torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
    "text": torch.tensor([[3, 4, 0], [5, 6, 7]]),
    "audio": torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(0)),
    "series": torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)),
    "table": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize(
    ("modality", "name", "options", "shape"),
    [
        ("image", None, {"in_channels": 1}, (2, 49, 64)),
        ("image", "resnet14", {"in_channels": 1, "width": 8, "norm": "batch"}, (2, 49, 32)),
        ("text", None, {"vocab_size": 9, "width": 16}, (2, 3, 16)),
        ("text", "bag", {"vocab_size": 9}, (2, 3, 128)),
        ("audio", None, {}, (2, 7, 128)),
        ("audio", "audio", {"mels": 40, "depth": 1}, (2, 25, 128)),
        ("series", None, {"channels": 3}, (2, 13, 128)),
        ("table", None, {"columns": 5, "width": 12}, (2, 5, 12)),
        ("table", "features", {"width_in": 5}, (2, 1, 5)),
    ],
)
def test_a_modality_has_an_encoder_by_name(
    modality: str, name: str | None, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    network = token_encoder(modality, name, **options)
    tokens, mask = network(INPUTS[modality])
    assert tokens.shape == shape
    assert network.num_features == shape[-1]
    if modality == "text":
        assert torch.equal(mask, INPUTS["text"] != 0)
    else:
        assert mask is None


def test_the_places_of_an_image_are_what_the_network_pools() -> None:
    torch.manual_seed(0)
    network = resnet(8, in_channels=1, num_classes=0).eval()
    blind = ImageTokens(network)
    tokens, _ = blind(INPUTS["image"])
    places, _ = blind(torch.zeros(1, 1, 28, 28))
    map_of_nothing = network.features[:-2](torch.zeros(1, 1, 28, 28)).flatten(2).transpose(1, 2)
    # What is left of a token without its place.
    pooled = (tokens - (places - map_of_nothing)).mean(dim=1)
    assert torch.allclose(pooled, network(INPUTS["image"]), atol=1e-5)


class _Map(nn.Module):
    """An image network whose feature map is the channels of the image."""

    def __init__(self, num_features: int, channels_last: bool = False) -> None:
        super().__init__()
        self.num_features, self.channels_last = num_features, channels_last

    def forward_features(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.channels_last else x


def test_the_places_of_an_image_differ_by_row_and_column() -> None:
    tokens, _ = ImageTokens(_Map(8))(torch.zeros(1, 8, 5, 6))
    assert tokens.shape == (1, 30, 8)
    grid = tokens.view(5, 6, 8)
    # The first half tells the row alone, the second the column alone.
    assert torch.equal(grid[:, :1, :4].expand(-1, 6, -1), grid[..., :4])
    assert torch.equal(grid[:1, :, 4:].expand(5, -1, -1), grid[..., 4:])
    assert (torch.cdist(tokens, tokens)[0] + torch.eye(30)).min() > 0.01


def test_channels_may_be_last_in_a_feature_map() -> None:
    image = torch.rand(2, 8, 5, 6)
    first, _ = ImageTokens(_Map(8))(image)
    last, _ = ImageTokens(_Map(8, channels_last=True))(image)
    assert torch.equal(first, last)
    with pytest.raises(ValueError, match=r"_Map gives a feature map of shape \(2, 8, 5, 6\); expected 7 features"):
        ImageTokens(_Map(7))(image)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("timm/resnet10t", 64, (2, 4, 512)),
        # Its class token is one of them.
        ("timm/vit_tiny_patch16_224", 32, (2, 5, 192)),
    ],
)
def test_timms_networks_give_tokens(name: str, size: int, shape: tuple[int, ...]) -> None:
    network = token_encoder("image", name, image_size=size).eval()
    images = torch.rand(2, 3, size, size)
    tokens, mask = network(images)
    assert tokens.shape == shape
    assert network.num_features == shape[-1]
    assert mask is None
    if "vit" in name:
        assert torch.equal(tokens[:, 0], network.features(images))


def test_our_image_networks_do_not_see_the_neighbours_in_training() -> None:
    torch.manual_seed(0)
    network = token_encoder("image", in_channels=1).train()
    image = INPUTS["image"]
    other = torch.cat([image[:1], torch.full_like(image[:1], torch.nan)])
    assert torch.allclose(network(image)[0][0], network(other)[0][0], atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1])
def test_text_tokens_are_what_the_encoder_pools(depth: int) -> None:
    torch.manual_seed(0)
    network = TextEncoder(9, width=16, depth=depth, num_classes=2).eval()
    tokens, mask = TextTokens(network)(INPUTS["text"])
    if depth:
        expected = torch.stack([row[real].mean(0) for row, real in zip(tokens, mask, strict=True)])
        assert torch.allclose(network.features(INPUTS["text"]), expected, atol=1e-6)
    else:
        # The mean of one token is the token.
        for row, column in ((0, 0), (1, 2)):
            alone = network.features(INPUTS["text"][row : row + 1, column : column + 1])
            assert torch.allclose(tokens[row, column], alone[0], atol=1e-6)


def test_a_mask_makes_padding_of_words() -> None:
    network = token_encoder("text", vocab_size=9, width=16).eval()
    text = torch.tensor([[3, 4, 8]])
    tokens, mask = network(text, torch.tensor([[True, True, False]]))
    expected, _ = network(text[:, :2])
    assert mask.tolist() == [[True, True, False]]
    assert torch.allclose(tokens[:, :2], expected, atol=1e-6)


def test_a_column_has_its_own_vector() -> None:
    torch.manual_seed(0)
    network = TableEncoder(3, width=4)
    rows = torch.tensor([[1.0, -2.0, torch.nan]])
    mask = torch.tensor([[True, True, False]])
    tokens, token_mask = network(rows, mask)
    assert token_mask is mask
    for column in range(2):
        expected = rows[0, column] * network.weight[column] + network.bias[column]
        assert torch.allclose(tokens[0, column], expected)
    tokens[token_mask].sum().backward()
    assert torch.equal(network.weight.grad, torch.tensor([[1.0], [-2.0], [0.0]]).expand(3, 4))
    with pytest.raises(ValueError, match=r"table has the shape \(1, 4\) .* expected float \(B, 3\)"):
        network(torch.zeros(1, 4))


def test_a_module_gives_what_it_can() -> None:
    audio = AudioEncoder(40, width=8)
    assert token_encoder("audio", audio) is audio
    assert isinstance(token_encoder("text", TextEncoder(9)), TextTokens)
    assert isinstance(token_encoder("image", backbone("resnet8", num_classes=0)), ImageTokens)
    assert isinstance(token_encoder("image", backbone("timm/resnet10t", num_classes=0)), ImageTokens)
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(150, 6))
    tokens, mask = token_encoder("series", foreign, width_in=6)(INPUTS["series"])
    assert torch.equal(tokens[:, 0], foreign(INPUTS["series"]))
    assert mask is None
    real = torch.zeros(2, 50, dtype=torch.bool)
    real[0, 3] = True
    assert token_encoder("series", foreign, width_in=6)(INPUTS["series"], real)[1].tolist() == [[True], [False]]
    foreign.num_features = 6
    assert isinstance(token_encoder("series", foreign), FeatureTokens)


@pytest.mark.parametrize("modality", INPUTS)
def test_a_copy_is_the_same(modality: str) -> None:
    options = {
        "image": {"in_channels": 1},
        "text": {"vocab_size": 9},
        "series": {"channels": 3},
        "table": {"columns": 5},
    }
    network = token_encoder(modality, **options.get(modality, {})).eval()
    twin = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert not torch.equal(twin(INPUTS[modality])[0], network(INPUTS[modality])[0])
    network.load_state_dict(twin.state_dict())
    assert torch.equal(twin(INPUTS[modality])[0], network(INPUTS[modality])[0])


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("images",), {}, "modality 'images' is unknown; expected one of image, .*; did you mean image"),
        (("audio", "audoi"), {}, "audio encoder 'audoi' is unknown; expected audio, features .*; did you mean audio"),
        (("audio",), {"mel": 3}, "do not fit the audio encoder 'audio': .*unexpected keyword argument 'mel'"),
        (("audio",), {"mels": 0}, "mels is 0; expected at least 1"),
        (("series",), {}, "series encoder 'series': .*missing .*'channels'"),
        (("text",), {}, "needs the option vocab_size"),
        (("text", "bagg"), {"vocab_size": 9}, "expected text, bag, features .*; did you mean bag"),
        (("image", "resnet9"), {}, "network 'resnet9' is unknown"),
        (("image", "mobilenet_v3_small"), {}, "'mobilenet_v3_small' gives no feature map; expected resnet8"),
        (("image", resnet(8)), {"width": 3}, r"options \['width'\] are for an encoder by name"),
        (("audio", AudioEncoder()), {"width_in": 3}, r"options \['width_in'\] are for an encoder by name"),
        (("table", nn.Linear(5, 3)), {"width": 3}, "Linear takes width_in alone"),
        (("table", nn.Linear(5, 3)), {}, "Linear does not say how many features it gives; set its `num_features`"),
        (("table", "features"), {"width_in": 0}, "width_in is 0"),
    ],
)
def test_what_can_not_be_built_is_refused(arguments: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        token_encoder(*arguments, **options)


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features are the shape \(2, 3, 50\); expected \(B, 7\), or an encoder"):
        FeatureTokens(7)(INPUTS["series"])
    with pytest.raises(ValueError, match="image has a mask; expected none"):
        token_encoder("image", in_channels=1)(INPUTS["image"], torch.ones(2, 3, dtype=torch.bool))
