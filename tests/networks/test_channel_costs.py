import copy
import io
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model, resnet50

from ds_lightning.errors import ConfigError
from ds_lightning.networks import TextEncoder, count_macs
from ds_lightning.networks.channel_costs import latency, layer_macs, saved_bytes

X = torch.zeros(2, 6, 9, 7)
TOKENS = torch.zeros(2, 5, 8)
ATTENTION = 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize(
    ("network", "inputs", "expected"),
    [
        (nn.Conv2d(6, 4, 3), (X,), 2 * 4 * 6 * 9 * 7 * 5),
        (nn.Conv2d(6, 4, 3, groups=2, stride=2, padding=1), (X,), 2 * 4 * 3 * 9 * 5 * 4),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=2), (X,), 2 * 6 * 1 * 9 * 5 * 3),
        (nn.Conv1d(6, 4, 3), (X[..., 0],), 2 * 4 * 6 * 3 * 7),
        (nn.ConvTranspose2d(6, 4, 3), (X,), 2 * 4 * 6 * 9 * 9 * 7),
        (nn.Linear(8, 3), (TOKENS,), 2 * 5 * 8 * 3),
        (nn.Linear(8, 3, bias=False), (TOKENS[0, 0],), 8 * 3),
        (nn.LSTM(8, 4, batch_first=True), (TOKENS,), 2 * 5 * 4 * 4 * (8 + 4)),
        (nn.GRU(8, 4, num_layers=2, batch_first=True), (TOKENS,), 2 * 5 * 3 * 4 * (8 + 4 + 4 + 4)),
        (Attends(), (torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 7, 6)), 2 * 3 * 5 * 7 * 10),
        (Attends(is_causal=True), (torch.zeros(2, 3, 5, 4),) * 3, 2 * 3 * 5 * 5 * 8),
        (nn.MultiheadAttention(8, 2, batch_first=True), (TOKENS,) * 3, ATTENTION),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (TOKENS,), ATTENTION + 2 * 5 * 2 * 8 * 16),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
            (TOKENS,),
            3 * (ATTENTION + 2 * 5 * 2 * 8 * 16),
        ),
        (
            TextEncoder(9, 8, 1, 2, num_classes=3),
            (torch.ones(2, 5).long(),),
            ATTENTION + 2 * 5 * 64 * 8 + 2 * 5 * 8 + 2 * 8 * 3,
        ),
        (nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)), (X,), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("training", [False, True])
def test_counts_are_those_of_the_closed_form(network, inputs, expected, training):
    assert count_macs(network.train(training), *inputs) == expected
    assert network.training is training


@pytest.mark.parametrize(
    ("name", "published"),
    # The GMACs that torchvision publishes with its weights.
    [("resnet50", 4.089), ("mobilenet_v2", 0.301), ("densenet121", 2.834), ("vit_b_16", 17.564)],
)
def test_counts_are_those_that_torchvision_publishes(name, published):
    with torch.device("meta"):
        network, image = get_model(name, weights=None), torch.zeros(1, 3, 224, 224)
    assert count_macs(network, image) / 1e9 == pytest.approx(published, abs=6e-4)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.table = nn.Parameter(torch.zeros(4, 5))

    def forward(self, x, *, times=1):
        for _ in range(times):
            x = self.stem(x)
        x = x @ self.table @ self.table.T
        return {"out": self.body(x)}


@pytest.mark.filterwarnings("ignore:.*global hooks on modules:UserWarning")
def test_each_module_has_its_own_count():
    x = torch.zeros(3, 4)
    own = {"stem": 2 * 3 * 16, "": 2 * 3 * 20, "body.0": 3 * 32, "body.2": 3 * 32}
    assert layer_macs(Nested(), x, times=2) == own
    assert count_macs(Nested(), x, times=2) == sum(own.values())
    network = Nested()
    network.body.compile(backend="eager")
    network.stem = torch.compile(network.stem, backend="eager")
    assert layer_macs(network, x, times=2) == own


def test_attention_and_layers_have_their_own_counts():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    expected = {"self_attn": ATTENTION, "linear1": 2 * 5 * 8 * 16, "linear2": 2 * 5 * 8 * 16}
    assert layer_macs(layer, TOKENS) == expected


def test_counting_and_timing_leave_everything_as_it_was():
    network = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.RReLU(), nn.LSTM(5, 2))
    network[1].eval()
    network[0].weight.grad = torch.ones_like(network[0].weight)
    network[4].forward = lambda x: torch.rand_like(x)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    switches = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    torch.manual_seed(3)
    draws = torch.get_rng_state()
    count_macs(network, X)
    latency(network, X, repeats=2, warmup=0)
    assert torch.equal(torch.get_rng_state(), draws)
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert switches == (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )
    assert torch.is_grad_enabled()


def test_a_network_that_fails_is_left_as_it_was():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5), nn.LSTM(5, 5)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_macs(network, torch.zeros(2, 4))
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


class Sleeps(nn.Module):
    def __init__(self, *seconds):
        super().__init__()
        self.seconds = list(seconds)

    def forward(self, x, by_name):
        assert not torch.is_grad_enabled()
        assert by_name == "given"
        time.sleep(self.seconds.pop(0))


def test_latency_is_the_median_after_warming_up():
    network = Sleeps(0.4, 0.02, 0.4, 0.02)
    # The mean of the three would be 0.15 and more; sleeping may take longer on a busy machine, but not less.
    assert 0.02 <= latency(network, X, repeats=3, warmup=1, by_name="given") < 0.14
    assert network.seconds == []


@pytest.mark.parametrize(("name", "value"), [("repeats", 0), ("warmup", -1)])
def test_counts_of_passes_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}; expected at least {value + 1}"):
        latency(nn.Linear(2, 2), torch.zeros(1, 2), **{name: value})


def test_saved_bytes_are_those_of_the_file():
    tied = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False))
    tied[1].weight = tied[0].weight
    tied.register_buffer("scratch", torch.zeros(10**6), persistent=False)
    assert saved_bytes(tied) == 256_000
    for network in (tied, resnet50(), nn.Linear(300, 300).half()):
        file = io.BytesIO()
        torch.save(network.state_dict(), file)
        share = file.tell() / saved_bytes(network)
        assert 1 <= share < 1.02
