import pytest
import torch
from torch import nn

from ds_lightning.callbacks._layers import check_patterns, find_layers, find_vectors
from ds_lightning.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(4, 3)
        self.position = nn.Parameter(torch.zeros(5, 4))
        self.head = nn.Linear(4, 3, bias=False)
        self.head_too = self.head


def layers_of(net: nn.Module, **patterns: list[str]) -> dict[str, tuple[int, int]]:
    """Name -> (numbers in the weight, in the bias)."""
    found = find_layers(net, net.parameters(), **patterns)
    return {layer.name: (layer.weight.numel(), 0 if layer.bias is None else layer.bias.numel()) for layer in found}


def test_layers_are_weights_with_their_bias_named_by_module():
    assert layers_of(Net()) == {
        "position": (20, 0),
        "conv": (18, 2),
        "attention.in_proj_weight": (48, 12),
        "attention.out_proj": (16, 4),
        "rnn.weight_ih_l0": (48, 12),
        "rnn.weight_hh_l0": (36, 12),
        "head": (12, 0),
    }


def test_only_parameters_of_the_optimizer_count():
    net = Net()
    found = find_layers(net, [net.conv.weight, net.norm.weight, net.head.weight])
    assert [(layer.name, layer.bias) for layer in found] == [("conv", None), ("head", None)]


def test_vectors_are_what_no_layer_has():
    net = Net()
    found = find_vectors(net, net.parameters())
    assert [id(vector) for vector in found] == [id(net.norm.weight), id(net.norm.bias)]
    held = [net.norm.bias, net.conv.bias, net.rnn.weight_hh_l0, net.rnn.bias_hh_l0]
    assert [id(vector) for vector in find_vectors(net, held)] == [id(net.conv.bias), id(net.norm.bias)]
    assert find_vectors(net, net.parameters(), exclude=["norm.*"]) == []
    assert [id(vector) for vector in find_vectors(net, net.parameters(), include=["*.weight"])] == [id(net.norm.weight)]


def test_patterns_choose_by_parameter_name():
    chosen = layers_of(Net(), include=["conv.*", "rnn.*"], exclude=["*_hh_*"])
    assert list(chosen) == ["conv", "rnn.weight_ih_l0"]
    assert layers_of(Net(), include=["conv.weight"])["conv"] == (18, 2)
    assert layers_of(Net(), exclude=["*bias"])["conv"] == (18, 0)


def test_a_compiled_module_has_the_same_names():
    net = nn.Sequential(nn.Linear(2, 2))
    wrapped = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert list(layers_of(net)) == list(layers_of(wrapped)) == ["0"]


def test_a_bare_linear_is_a_layer():
    assert layers_of(nn.Linear(3, 2)) == {"weight": (6, 2)}


def test_a_pattern_that_matches_nothing_is_refused():
    check_patterns(Net(), "include", ["conv.*"])
    with pytest.raises(ConfigError, match=r"exclude has the pattern 'backbone\.\*', which matches no parameter"):
        check_patterns(Net(), "exclude", ["conv.*", "backbone.*"])
