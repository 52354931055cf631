import copy
import itertools

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks import resnet
from ds_lightning.networks.channel_costs import count_macs
from ds_lightning.networks.channel_graph import ChannelGraph
from ds_lightning.networks.channel_removal import prune_channels
from ds_lightning.networks.pruning_plan import apply_plan

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pruned(network, x=X, target=0.5, **kwargs):
    small = copy.deepcopy(network)
    apply_plan(small, prune_channels(network, x, target, **kwargs))
    return small


def params(network):
    return sum(p.numel() for p in network.parameters())


def test_resnet50_hits_half_of_the_multiply_accumulates_in_multiples_of_8():
    network, x = torchvision.models.resnet50(), torch.randn(1, 3, 64, 64)
    small = pruned(network, x)
    assert 0.495 < count_macs(small, x) / count_macs(network, x) <= 0.5
    widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert small(x).shape == (1, 1000)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_parameters_as_the_measure(scope, target):
    network = resnet(14)
    small = pruned(network, target=target, measure="params", scope=scope, round_to=1)
    assert target * 0.99 < params(small) / params(network) <= target


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(9, 40), min_size=2, max_size=3),
    target=st.floats(0.3, 0.9),
    round_to=st.sampled_from([1, 4, 8]),
    min_channels=st.integers(1, 8),
)
def test_no_larger_choice_fits_the_target(widths, target, round_to, min_channels):
    sizes = [5, *widths, 2]
    network = nn.Sequential(*[m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())])
    x = torch.zeros(1, 5)

    def macs(hidden):
        return sum(a * b for a, b in zip([5, *hidden], [*hidden, 2], strict=True))

    def allowed(width):
        return [w for w in range(min_channels, width) if w % round_to == 0] + [width]

    smallest = macs([allowed(w)[0] for w in widths])
    if smallest > target * macs(widths):
        with pytest.raises(ConfigError, match=f"can't go below {smallest / macs(widths):.3f}"):
            prune_channels(network, x, target, round_to=round_to, min_channels=min_channels)
        return
    small = pruned(network, x, target, round_to=round_to, min_channels=min_channels)
    hidden = [m.out_features for m in small if isinstance(m, nn.Linear)][:-1]
    assert all(w in allowed(full) for w, full in zip(hidden, widths, strict=True))
    assert macs(hidden) <= target * macs(widths)
    for number, full in enumerate(widths):
        larger = [w for w in allowed(full) if w > hidden[number]]
        if larger:
            assert macs([*hidden[:number], larger[0], *hidden[number + 1 :]]) > target * macs(widths)


def test_what_matters_least_goes_first():
    network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    with torch.no_grad():
        network[0].weight[::2] *= 0.01
        network[2].weight[:, ::2] *= 0.01
    plan = prune_channels(network, torch.zeros(1, 4), 0.5, round_to=1)
    assert plan.kept["0.weight"] == {0: tuple(range(1, 32, 2))}
    assert plan.kept["2.weight"] == {1: tuple(range(1, 32, 2))}


def test_layer_scope_keeps_the_same_share_of_each_layer():
    network = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2))
    with torch.no_grad():
        network[0].weight *= 0.001
    small = pruned(network, torch.zeros(1, 4), 0.26, scope="layer", round_to=1)
    assert small[0].out_features / 64 == pytest.approx(small[2].out_features / 128, abs=0.02)


def test_the_channels_of_a_group_without_a_batch_norm_stay_under_bn_scale():
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 2, 3)
    )
    small = pruned(network, target=0.6, importance="bn_scale")
    assert small[0].out_channels < 32
    assert small[3].out_channels == 32


def test_heads_and_their_attention_are_counted():
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=4)
    x = torch.randn(1, 3, 32, 32)
    small = pruned(network, x, 0.8, exclude=["patch_embed", "*.fc1"])
    gone = sum(3 - block.attn.num_heads for block in small.blocks)
    # A head of 64 columns on 65 tokens of 192 features: queries, keys, values, projection, and the two products.
    a_head = 4 * 64 * 192 * 65 + 2 * 64 * 65 * 65
    assert gone > 0
    assert count_macs(network, x) - count_macs(small, x) == gone * a_head
    assert count_macs(small, x) <= 0.8 * count_macs(network, x) < count_macs(small, x) + a_head
    assert small(x).shape == (1, 4)


def test_latency_as_the_measure(monkeypatch):
    from ds_lightning.networks import channel_graph

    # A clock that counts work, so that the test does not depend on the machine.
    monkeypatch.setattr(channel_graph, "latency", lambda network, *args, **kw: 1e-3 + 1e-9 * count_macs(network, *args))
    network = resnet(14)
    full, small = (channel_graph.latency(n, X) for n in (network, pruned(network, measure="latency", target=0.8)))
    assert 0.8 * 0.95 <= small / full <= 0.8
    with pytest.raises(ConfigError, match="latency can't go below 0"):
        prune_channels(network, X, 0.1, measure="latency")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": 1.0}, r"target is 1.0; expected the share of the macs to keep, in \(0, 1\)"),
        ({"target": float("nan")}, "target is nan"),
        ({"target": 0.01}, r"target is 0.01, and macs can't go below 0\.\d+ of the network's"),
        ({"measure": "flops"}, "measure is 'flops'; expected one of macs, params, latency"),
        ({"scope": "block"}, "scope is 'block'; expected one of global, layer"),
        ({"round_to": 0}, "round_to is 0; expected at least 1"),
        ({"min_channels": 0}, "min_channels is 0; expected at least 1"),
    ],
)
def test_arguments_that_can_not_work(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        prune_channels(resnet(8), X, **{"target": 0.5, **kwargs})


def test_a_second_removal_starts_from_what_is_left():
    network = resnet(14)
    once = pruned(network, target=0.7, round_to=1)
    twice = pruned(once, target=0.7, round_to=1)
    assert count_macs(twice, X) / count_macs(network, X) == pytest.approx(0.49, rel=0.02)


def test_the_graph_serves_more_than_one_choice():
    network = resnet(8)
    graph = ChannelGraph(network, (X,))
    plans = [graph.plan(graph.choose(graph.scores(network), target, round_to=1)) for target in (0.5, 0.8, 0.5)]
    assert plans[0] == plans[2] != plans[1]
