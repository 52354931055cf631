import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ds_lightning.errors import ConfigError
from ds_lightning.networks.channel_graph import ChannelGraph, Choice
from ds_lightning.networks.pruning_plan import apply_plan

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(fan_in, fan_out, **kwargs):
    return nn.Conv2d(fan_in, fan_out, 3, padding=1, **kwargs)


class Residual(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, groups=1):
        super().__init__()
        self.stem, self.norm = conv(3, 16), norm(16)
        self.inner, self.inner_norm = conv(16, 32, groups=groups), norm(32)
        self.outer = conv(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner_norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """Two branches side by side, one of them twice, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.mixed = conv(3, 8), conv(3, 16), conv(24, 16)
        self.head = nn.Linear(16 + 8, 2)

    def forward(self, x):
        left, right = self.left(x).relu(), self.right(x).relu()
        mixed = self.mixed(torch.cat([left, right], 1)).relu()
        return self.head(torch.cat([mixed, left], 1).mean((2, 3)))


class Gated(nn.Module):
    """Halves of one layer that gate each other."""

    def __init__(self):
        super().__init__()
        self.both, self.head = conv(3, 32), nn.Linear(16, 3)

    def forward(self, x):
        value, gate = self.both(x).chunk(2, 1)
        return self.head((value * gate.sigmoid()).mean((2, 3)))


def widths(graph):
    return {group.name: (group.units, group.width) for group in graph.groups}


def zeroed(network, group, gone):
    """The network with zeros in every weight that reads the removed units, found by brute force from the slices."""
    out = copy.deepcopy(network)
    tensors = dict(out.named_parameters())
    with torch.no_grad():
        for piece in group.slices:
            if piece.reads:
                for index, unit in enumerate(piece.units.tolist()):
                    if unit in gone:
                        tensors[piece.tensor].select(piece.dim, index).zero_()
    return out


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Residual(), {"stem": (16, 1), "inner": (32, 1)}),
        # A group of a convolution goes whole: its 4 inputs, which the stem gives, and its 8 outputs.
        (Residual(groups=4), {"stem": (4, 4)}),
        # A block of a GroupNorm goes whole, and the others keep their statistics.
        (Residual(lambda c: nn.GroupNorm(4, c)), {"stem": (4, 4), "inner": (4, 8)}),
        (Joined(), {"left": (8, 1), "right": (16, 1), "mixed": (16, 1)}),
        (Gated(), {"both": (16, 2)}),
    ],
    ids=["residual", "grouped", "group_norm", "concatenated", "gated"],
)
def test_what_is_left_computes_what_the_network_does_when_nothing_reads_the_rest(network, expected):
    network = network.eval()
    graph = ChannelGraph(network, (X,))
    assert widths(graph) == expected
    for number, group in enumerate(graph.groups):
        gone = {0, group.units // 2}
        kept = [torch.arange(g.units) for g in graph.groups]
        kept[number] = torch.tensor([unit for unit in range(group.units) if unit not in gone])
        small = copy.deepcopy(network)
        apply_plan(small, graph.plan(Choice(tuple(kept))))
        torch.testing.assert_close(small(X), zeroed(network, group, gone)(X), rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())


def test_the_output_is_protected_without_being_named_and_the_reason_is_kept():
    graph = ChannelGraph(Residual(), (X,))
    assert graph.refused == {"head": "its channels are the network's output"}

    class TwoHeads(Residual):
        def forward(self, x):
            return {"logits": super().forward(x), "maps": [self.stem(x)]}

    assert list(widths(ChannelGraph(TwoHeads(), (X,)))) == ["inner"]


def test_channels_that_something_else_reads_stay():
    class Normalized(Residual):
        def forward(self, x):
            hidden = self.norm(self.stem(x)).softmax(dim=1)
            return self.head((hidden + self.outer(self.inner(hidden).relu())).mean((2, 3)))

    graph = ChannelGraph(Normalized(), (X,))
    assert list(widths(graph)) == ["inner"]
    assert "softmax" in graph.refused["stem"]


def test_a_network_that_asks_for_its_width_keeps_it():
    class Fixed(Residual):
        def forward(self, x):
            x = self.norm(self.stem(x)).relu()
            return self.head((x + self.outer(self.inner(x))).reshape(-1, 16, 64).mean(2))

    graph = ChannelGraph(Fixed(), (X,))
    assert list(widths(graph)) == ["inner"]
    assert "does not run" in graph.refused["stem"]


def test_attention_goes_by_whole_heads():
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=4).eval()
    graph = ChannelGraph(network, (torch.randn(2, 3, 32, 32),))
    # 3 heads of 64 columns, in queries, keys and values.
    assert widths(graph)["blocks.0.attn.qkv"] == (3, 192)


def test_the_network_and_the_random_numbers_stay_as_they_are():
    network = Residual().train()
    network.stem.weight.requires_grad_(False)
    network.norm.eval()
    seen = []
    network.register_forward_hook(lambda *_: seen.append(1))
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.no_grad():
        graph = ChannelGraph(network, (X,))
        graph.choose(graph.scores(network), 0.5)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in network.modules()] == [True, True, False, *[True] * 4]
    assert not network.stem.weight.requires_grad
    assert network.norm.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert seen == []
    assert all(p.grad is None for p in network.parameters())


def test_inputs_by_name_and_in_dicts():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Residual()

        def forward(self, batch, *, scale):
            return self.net(batch["image"] * scale)

    graph = ChannelGraph(Named(), ({"image": X},), {"scale": torch.ones(1)})
    assert widths(graph) == {"net.stem": (16, 1), "net.inner": (32, 1)}


def test_an_excluded_layer_keeps_its_outputs():
    assert list(widths(ChannelGraph(Residual(), (X,), exclude=["inner"]))) == ["stem"]
    # The residual stream ends in `outer` too.
    assert list(widths(ChannelGraph(Residual(), (X,), exclude=["out*"]))) == ["inner"]
    nested = nn.Sequential(Residual(), nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    assert list(widths(ChannelGraph(nested, (X,), exclude=["0"]))) == ["1"]


def test_exclude_that_leaves_nothing_or_matches_nothing():
    with pytest.raises(ConfigError, match=r"no channels that can be removed \(.*stem: it is in exclude"):
        ChannelGraph(Residual(), (X,), exclude=["*"])
    with pytest.raises(ConfigError, match=r"'ine' matches no module; expected .* such as inner"):
        ChannelGraph(Residual(), (X,), exclude=["ine"])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize(
    ("network", "x", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), X, "no channels that can be removed .1: its channels are"),
        (nn.ReLU(), X, "no convolution or linear layer|can't trace ReLU"),
        (Residual(), X[:, :2], "does not run on the example inputs"),
        (Recurrent(), torch.randn(2, 5, 8), "no channels that can be removed|can't trace"),
    ],
    ids=["one layer", "no layer", "wrong input", "recurrent"],
)
def test_networks_without_channels_to_remove(network, x, message):
    with pytest.raises(ConfigError, match=message):
        ChannelGraph(network, (x,))


def test_what_cant_be_copied_is_shared_with_the_copy():
    network = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    network.lock, network.stream = threading.Lock(), (number for number in range(3))
    network.make = functools.partial(map, (number for number in range(3)))
    graph = ChannelGraph(network, (torch.zeros(2, 3),))
    choice = graph.choose(graph.scores(network), 0.6, round_to=1, min_channels=1)
    assert len(choice.kept[0]) < 16
    assert next(network.stream) == 0


class Gives(nn.Module):
    """A perceptron with an output of any kind."""

    def __init__(self, output):
        super().__init__()
        self.inner, self.head, self.output = nn.Linear(4, 16), nn.Linear(16, 3), output

    def forward(self, x):
        return self.output(self.head(F.relu(self.inner(x))))


class Wrapped:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("output", [Wrapped, lambda y: y.argmax(1), lambda y: None])
def test_an_output_that_cant_be_compared_is_refused(output):
    with pytest.raises(ConfigError, match="Gives gives no floating-point tensor that could be compared; expected a"):
        ChannelGraph(Gives(output), (torch.randn(2, 4),))


def test_an_empty_output_beside_another_is_no_hindrance():
    graph = ChannelGraph(Gives(lambda y: {"logits": y, "boxes": y[:0], "count": 0}), (torch.randn(2, 4),))
    assert [(group.name, group.units) for group in graph.groups] == [("inner", 16)]
    assert graph.refused == {"head": "its channels are the network's output"}


def test_no_generator_is_touched(monkeypatch):
    seeded = []
    # What torch.manual_seed calls for the accelerators; it would do so before there is one, too.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    network, before = Residual(), torch.get_rng_state()
    ChannelGraph(network, (X,))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []
