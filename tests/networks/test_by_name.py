import sys

import pytest
import torch

from ds_lightning.errors import ConfigError
from ds_lightning.networks import backbone


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("resnet8", 28, 1),
        ("torchvision/resnet18", 64, 1),
        ("mobilenet_v3_small", 64, 4),
        ("torchvision/vit_b_16", 32, 2),
        ("timm/vit_tiny_patch16_224", 32, 1),
        ("timm/resnet10t", 32, 1),
    ],
)
def test_a_name_gives_a_network_for_these_images(name: str, size: int, channels: int) -> None:
    network = backbone(name, num_classes=4, in_channels=channels, image_size=size).eval()
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 4)


def test_three_channels_leave_torchvisions_own_convolution() -> None:
    torch.manual_seed(0)
    ours = backbone("torchvision/resnet18", num_classes=4)
    torch.manual_seed(0)
    from torchvision.models import resnet18

    for mine, theirs in zip(ours.parameters(), resnet18(num_classes=4).parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_large_images_get_the_strided_stem() -> None:
    small = backbone("resnet18", num_classes=2, image_size=64, width=4)
    large = backbone("resnet18", num_classes=2, image_size=224, width=4)
    assert small.features[0].stride == (1, 1)
    assert large.features[0].stride == (2, 2)


def test_options_reach_the_builder() -> None:
    assert backbone("resnet8", num_classes=2, width=5).features[0].out_channels == 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet9", "'resnet9' is unknown; did you mean resnet8"),
        ("timm/vit_tinny", "is unknown; did you mean"),
        ("torchvision/resnet19", "did you mean resnet18"),
        ("keras/resnet50", "'keras' is not a library here"),
    ],
)
def test_an_unknown_name_is_told_with_its_neighbours(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        backbone(name, num_classes=2)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'ds-lightning\[timm\]'"):
        backbone("timm/resnet10t", num_classes=2)
    with pytest.raises(ConfigError, match="'resnet9' is unknown"):
        backbone("resnet9", num_classes=2)
