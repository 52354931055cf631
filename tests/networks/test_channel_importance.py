import pytest
import torch
from torch import nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks.channel_graph import ChannelGraph

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network(norm=True):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    out = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        for p in out.parameters():
            p.normal_()
    return out


def scores(net, kind, **kwargs):
    return ChannelGraph(net, (X,)).scores(net, kind, **kwargs)


def test_magnitude_is_the_squared_norm_of_all_weights_of_a_channel():
    net = network()
    first, second = scores(net, "magnitude")
    expected = torch.stack(
        [net[0].weight[c].square().sum() + net[1].weight[c] ** 2 + net[3].weight[:, c].square().sum() for c in range(6)]
    )
    torch.testing.assert_close(first, (expected / expected.mean()).detach())
    # The last convolution's maps of 2x2 are flattened: a channel is four columns of the linear layer.
    expected = torch.stack(
        [net[3].weight[c].square().sum() + net[5].weight[:, 4 * c : 4 * c + 4].square().sum() for c in range(4)]
    )
    torch.testing.assert_close(second, (expected / expected.mean()).detach())


def test_taylor_is_the_change_of_the_loss_to_first_order():
    net = network()
    net(X).square().sum().backward()
    found = scores(net, "taylor")[0]
    w, g = [p.detach() for p in net.parameters()], [p.grad for p in net.parameters()]
    expected = torch.stack(
        [
            # conv weight and bias, norm weight and bias, and what the next convolution reads
            sum((w[i][c] * g[i][c]).sum().abs() for i in range(4)) + (w[4][:, c] * g[4][:, c]).sum().abs()
            for c in range(6)
        ]
    )
    torch.testing.assert_close(found, expected / expected.mean())
    given = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    torch.testing.assert_close(scores(net, "taylor", gradients=given)[0], found)


def test_bn_scale_is_the_size_of_the_norm_s_scale():
    net = network()
    first, second = scores(net, "bn_scale")
    expected = net[1].weight.detach().abs()
    torch.testing.assert_close(first, expected / expected.mean())
    assert bool(second.isinf().all())


def test_random_follows_the_seed():
    net = network()
    one, same, other = (torch.cat(scores(net, "random", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_scores_do_not_depend_on_the_scale_of_a_group():
    net = network(norm=False)
    before = scores(net, "magnitude")[0]
    with torch.no_grad():
        net[0].weight.mul_(10)
        net[3].weight.mul_(10)
    torch.testing.assert_close(scores(net, "magnitude")[0], before)


def test_what_can_not_be_scored():
    with pytest.raises(ConfigError, match="'taylor' and no parameter has a gradient"):
        scores(network(), "taylor")
    with pytest.raises(ConfigError, match="'bn_scale' and no channel"):
        scores(network(norm=False), "bn_scale")
    with pytest.raises(ConfigError, match="importance is 'norm'; expected one of magnitude, taylor"):
        scores(network(), "norm")
    broken = network()
    with torch.no_grad():
        broken[0].weight[2, 0, 0, 0] = torch.nan
    with pytest.raises(ConfigError, match="scores of 0 are not finite"):
        scores(broken, "magnitude")
