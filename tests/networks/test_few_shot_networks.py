import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks import backbone, conv4, mlp


@settings(deadline=None, max_examples=12)
@given(st.integers(16, 50), st.sampled_from([1, 3]), st.sampled_from(["group", "layer", "batch", None]), st.booleans())
def test_any_size_from_16_pixels(size: int, channels: int, norm: str | None, stride: bool) -> None:
    network = conv4(4, channels, size, width=6, norm=norm, stride=stride).eval()
    x = torch.zeros(2, channels, size, size)
    assert network(x).shape == (2, 4)
    assert network.features(x).shape == (2, network.num_features)
    assert conv4(0, channels, size, width=6, norm=norm, stride=stride).eval()(x).shape == (2, network.num_features)


def test_the_papers_counts() -> None:
    # Four 3x3 convolutions of 64 with bias, BatchNorm's two vectors, and a head on 64 features (28 px) or 1600 (84 px).
    body = lambda channels: (9 * channels * 64 + 64) + 3 * (9 * 64 * 64 + 64) + 4 * 2 * 64  # noqa: E731
    count = lambda network: sum(value.numel() for value in network.parameters())  # noqa: E731
    assert count(conv4(5, 1, 28, norm="batch")) == body(1) + 64 * 5 + 5
    assert count(conv4(5, 3, 84, norm="batch")) == body(3) + 1600 * 5 + 5
    assert count(conv4(20, 1, None, norm="batch", stride=True)) == body(1) + 64 * 20 + 20


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_an_image_does_not_depend_on_the_others(norm: str) -> None:
    torch.manual_seed(0)
    network = conv4(3, 1, 16, width=8, norm=norm)
    x = torch.randn(4, 1, 16, 16)
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-6)


def test_layer_norm_is_over_the_whole_image() -> None:
    torch.manual_seed(0)
    network = conv4(3, 1, 16, width=4, norm="layer")
    inside = network.features[0](torch.randn(2, 1, 16, 16))
    assert torch.allclose(
        network.features[1](inside), torch.nn.functional.layer_norm(inside, inside.shape[1:]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 15}, "image_size is 15; expected at least 16"),
        ({"image_size": None}, "image_size is None"),
        ({"norm": "instance"}, "norm is 'instance'; expected group, layer, batch or None"),
        ({"width": 0}, "width is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_bad_arguments_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        conv4(**{"image_size": 28, **options})


def test_by_name() -> None:
    network = backbone("conv4", num_classes=5, in_channels=1, image_size=28, width=8, norm="batch")
    assert isinstance(network.features[1], nn.BatchNorm2d)
    assert network.head.in_features == 8
    with pytest.raises(ConfigError, match="did you mean conv4"):
        backbone("conv44", num_classes=5)


def test_the_sinusoid_network() -> None:
    assert sum(value.numel() for value in mlp(1, 1).parameters()) == (1 * 40 + 40) + (40 * 40 + 40) + (40 + 1)
    assert [name for name, _ in mlp(1, 1).named_children()] == ["hidden0", "relu0", "hidden1", "relu1", "head"]
    assert mlp(3, 2, hidden=())(torch.zeros(5, 7, 3)).shape == (5, 7, 2)
    with pytest.raises(ValueError, match=r"the layers have the sizes \[1, 0, 1\]"):
        mlp(1, 1, hidden=(0,))
