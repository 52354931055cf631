import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ds_lightning.callbacks._layers import find_layers
from ds_lightning.callbacks._trained_norms import norms_are_trained


def trained(net: nn.Module, **patterns: list[str]) -> bool:
    return norms_are_trained(net, find_layers(net, net.parameters(), **patterns))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4)]
)
def test_a_norm_is_trained_when_its_channels_differ(norm):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm)
    assert not trained(net)
    with torch.no_grad():
        norm.weight.zero_()  # as the last norm of a residual branch may begin
    assert not trained(net)
    with torch.no_grad():
        norm.weight[2] = 1e-6
    assert trained(net)
    assert trained(net.bfloat16())
    norm.weight.requires_grad_(False)  # fine-tuning often freezes norms
    assert trained(net)


@given(st.integers(1, 600), st.floats(1e-6, 1e3), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_no_rounding_looks_like_training(channels, scale, dtype):
    norm = nn.LayerNorm(channels, dtype=dtype)
    nn.init.constant_(norm.weight, scale)
    assert not trained(nn.Sequential(nn.Linear(2, channels), norm))


def test_one_step_is_seen():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    net(torch.randn(8, 2)).square().sum().backward()
    assert not trained(net)
    optimizer.step()
    assert trained(net)


def test_random_scales_are_new_until_the_statistics_have_seen_a_batch():
    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16))
    nn.init.normal_(net[1].weight, 1.0, 0.02)  # as generators of images often begin
    assert not trained(net)
    weights = {name: value for name, value in net.state_dict().items() if "num_batches" not in name}
    net(torch.randn(8, 2))
    assert trained(net)
    weights["1.running_mean"] = torch.ones(16)  # published weights without a count of batches
    net[1].num_batches_tracked.zero_()
    net.load_state_dict(weights, strict=False)
    assert trained(net)


@pytest.mark.parametrize("name", ["gamma", "scale"])
def test_other_names_of_a_scale(name):
    net = nn.Sequential(nn.Linear(2, 3), nn.Module())
    net[1].register_parameter(name, nn.Parameter(torch.ones(3)))
    assert not trained(net)
    with torch.no_grad():
        getattr(net[1], name)[0] = 2.0
    assert trained(net)


def test_what_is_no_scale_says_nothing():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.BatchNorm1d(3, affine=False), nn.Module())
    net[3].weight = nn.Parameter(torch.tensor(0.3))  # a gain
    net[3].token = nn.Parameter(torch.randn(4))
    nn.init.normal_(net[1].bias)
    net[:3](torch.randn(8, 2))
    assert not trained(net)
    assert not trained(nn.Linear(2, 3))


class Net(nn.Module):
    """A trained encoder of two blocks, its norms wrapped, and a new decoder."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.Linear(3, 3), nn.Sequential(nn.LayerNorm(3))]
        self.encoder = nn.Sequential(nn.Sequential(*block), nn.Linear(3, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.head = nn.Linear(3, 2)
        nn.init.normal_(self.encoder[0][1][0].weight)


def test_norms_count_beside_the_layers_that_are_asked_for():
    net = Net()
    assert trained(net)
    assert not trained(net, include=["decoder.*", "head.*"])
    assert not trained(net, include=["encoder.1.*"])
    assert trained(net, include=["encoder.0.0.weight"])
    assert trained(net, exclude=["*.1.0.weight"])  # a norm that no layer's pattern names
    assert not norms_are_trained(net, [])


def test_a_norm_at_the_root_stands_beside_all_layers():
    net = Net()
    net.norm = nn.LayerNorm(2)
    assert not trained(net, include=["head.*"])
    nn.init.normal_(net.norm.weight)
    assert trained(net, include=["head.*"])
    assert trained(net, include=["encoder.1.*"])
