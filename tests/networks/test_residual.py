import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_lightning.networks import resnet


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_imagenet_depths_equal_torchvisions_layer_by_layer(depth: int) -> None:
    ours = resnet(depth, small_input=False, num_classes=7)
    peer = torchvision.models.get_model(f"resnet{depth}", num_classes=7)
    assert parameters(ours) == parameters(peer)
    _copy_torchvision(peer, ours)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), peer.eval()(x), rtol=1e-4, atol=1e-4)


def _copy_torchvision(peer: nn.Module, ours: nn.Module) -> None:
    """Copy weights by walking both networks in the order of their forward pass."""

    def leaves(network: nn.Module, x: torch.Tensor) -> list[nn.Module]:
        called: list[nn.Module] = []
        hooks = [
            m.register_forward_hook(lambda m, *_: called.append(m))
            for m in network.modules()
            if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
        ]
        network.eval()(x)
        for hook in hooks:
            hook.remove()
        return called

    x = torch.zeros(1, 3, 64, 64)
    for theirs, mine in zip(leaves(peer, x), leaves(ours, x), strict=True):
        mine.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(("depth", "layers"), [(8, 7), (20, 19), (56, 55)])
def test_small_depths_count_their_layers(depth: int, layers: int) -> None:
    network = resnet(depth)
    on_the_path = [m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    assert len(on_the_path) == layers  # and the linear layer makes `depth`


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.integers(9, 33),
    channels=st.integers(1, 4),
    norm=st.sampled_from(["batch", "group"]),
)
def test_any_shape_goes_through(batch: int, size: int, channels: int, norm: str) -> None:
    network = resnet(8, in_channels=channels, num_classes=3, width=4, norm=norm).eval()
    assert network(torch.zeros(batch, channels, size, size + 1)).shape == (batch, 3)


def test_group_norm_samples_do_not_see_each_other() -> None:
    network = resnet(8, width=8, norm="group").train()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))


def test_no_classes_gives_features() -> None:
    network = resnet(8, num_classes=0, width=4)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, network.num_features)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"depth": 9}, "depth is 9; expected one of 8, 14"),
        ({"depth": 8, "norm": "layer"}, "norm is 'layer'; expected one of batch, group"),
        ({"depth": 8, "in_channels": 0}, "in_channels is 0; expected at least 1"),
        ({"depth": 8, "width": 0}, "width is 0; expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        resnet(**kwargs)
