"""The exact diagonal Fisher information against one backward pass a sample, written out here."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_lightning.functional import fisher_diagonal, fisher_sums, label_loss, model_labels
from ds_lightning.functional._fisher_squares import RULES
from ds_lightning.networks import resnet


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def square_loss(net, x):
    return net(x).flatten(1).square().sum(1)


def one_by_one(net, batch, per_sample_loss=loss) -> dict[str, torch.Tensor]:
    """Mean of the squared gradients of single samples, on a copy."""
    net = copy.deepcopy(net)
    pieces = batch if isinstance(batch, tuple) else (batch,)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for i in range(len(pieces[0])):
        net.zero_grad()
        single = tuple(piece[i : i + 1] for piece in pieces)
        per_sample_loss(net, single if isinstance(batch, tuple) else single[0]).sum().backward()
        for name, p in net.named_parameters():
            total[name] += 0 if p.grad is None else p.grad**2
    return {name: value / len(pieces[0]) for name, value in total.items()}


def assert_same(found, expected, rtol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).norm()
        assert error <= rtol * value.norm() + 1e-24, f"{name}: {error} of {value.norm()}"


def disturb(net: nn.Module) -> nn.Module:
    """Make every parameter and running statistic something of its own, in float64."""
    net = net.double().eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for layer in net.modules():
        if isinstance(getattr(layer, "running_mean", None), torch.Tensor):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return net


class TiedTransformer(nn.Module):
    """Token and position embeddings, attention, and a head that shares the tokens' weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.norm(self.block(self.tokens(ids) + self.places))).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Twice(nn.Module):
    """One layer called twice, one bypassed by its weight, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused, self.plain = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.plain(F.linear(self.shared(self.shared(x).tanh()), self.bypassed.weight).tanh())


class SequenceFirst(nn.Module):
    """The sample axis is the second inside, and there are as many places as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x.transpose(0, 1)).tanh().mean(0))


class Branching(nn.Module):
    """Which layer works depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.one, self.two = nn.Parameter(torch.ones(3)), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        rows = [self.one(row * self.scale) if row.sum() > 0 else self.two(row) for row in x]
        return torch.stack(rows)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 1, groups=2),
        nn.InstanceNorm2d(6, affine=True),
        nn.Conv2d(6, 6, 3, stride=2, padding_mode="circular", padding=1),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.LayerNorm([6, 2, 2]),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def images(size: int, channels: int = 4, samples: int = 5):
    return torch.randn(samples, channels, size, size).double(), torch.arange(samples) % 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True), nn.BatchNorm1d(7), nn.Linear(7, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple], set[str]]] = {
    "mlp": (mlp, lambda: (torch.randn(9, 6).double(), torch.arange(9) % 3), {"layers"}),
    "cnn": (cnn, lambda: images(8), {"layers"}),
    "resnet18": (lambda: resnet(18, num_classes=3, width=8), lambda: images(12, 3, 3), {"layers"}),
    "transformer": (lambda: TiedTransformer(tied=False), lambda: (torch.randint(0, 11, (4, 5)), torch.arange(4)),
                    {"layers", "vmap"}),
    "tied transformer": (TiedTransformer, lambda: (torch.randint(0, 11, (4, 5)), torch.arange(4)), {"layers", "vmap"}),
    "lstm": (Recurrent, lambda: (torch.randn(4, 5, 3).double(), torch.arange(4) % 3), {"layers", "loop"}),
    "twice": (Twice, lambda: (torch.randn(4, 4).double(), torch.arange(4) % 3), {"layers", "vmap"}),
    "sequence first": (SequenceFirst, lambda: (torch.randn(4, 4, 3).double(), torch.arange(4) % 3),
                       {"layers", "vmap"}),
    "branching": (Branching, lambda: (torch.randn(6, 3).double(), torch.arange(6) % 3), {"loop"}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_every_way_equals_single_samples(name):
    torch.manual_seed(0)
    build, data, ways = NETS[name]
    net, batch = disturb(build()), data()
    expected = one_by_one(net, batch)
    assert sum(float(v.sum()) for v in expected.values()) > 0
    auto = fisher_sums(net, [batch], loss)
    assert_same(auto.mean(), expected)
    assert set(auto.methods.values()) == ways
    assert_same(fisher_diagonal(net, [batch], loss, method="loop"), expected)
    if "loop" not in ways:
        assert_same(fisher_diagonal(net, [batch], loss, method="vmap"), expected)
    if ways == {"layers"}:
        assert_same(fisher_diagonal(net, [batch], loss, method="layers"), expected)
    else:
        with pytest.raises(ValueError, match="method='layers' can't take"):
            fisher_diagonal(net, [batch], loss, method="layers")


def test_each_parameter_goes_its_own_way():
    torch.manual_seed(0)
    methods = fisher_sums(disturb(Twice()), [NETS["twice"][1]()], loss).methods
    assert {name for name, way in methods.items() if way == "vmap"} == {
        "shared.weight", "shared.bias", "bypassed.weight", "bypassed.bias", "unused.weight", "unused.bias",
    }  # fmt: skip
    methods = fisher_sums(disturb(TiedTransformer()), [NETS["tied transformer"][1]()], loss).methods
    assert methods["block.linear1.weight"] == methods["norm.weight"] == methods["head.bias"] == "layers"
    assert methods["tokens.weight"] == methods["block.self_attn.out_proj.weight"] == "vmap"


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_convolutions_of_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    axes = draw(1, 3)
    groups = draw(1, 3)
    kernel, stride, dilation = ([draw(1, 3) for _ in range(axes)] for _ in range(3))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = data.draw(st.booleans()) and set(stride) == {1}
    padding = "same" if same else [draw(0, 2) for _ in range(axes)]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        groups * draw(1, 2), groups * draw(1, 2), kernel, stride, padding, dilation, groups, draw(0, 1) == 1, mode
    )
    sizes = [draw(7, 8) for _ in range(axes)]
    torch.manual_seed(draw(0, 100))
    x = torch.randn(draw(1, 3), layer.in_channels, *sizes, dtype=torch.float64)
    if axes == 2 and data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    layer = layer.double().eval()
    expected = one_by_one(layer, x, square_loss)
    assert_same(fisher_diagonal(layer, [x], square_loss, method="layers"), expected, rtol=1e-9)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    samples=st.integers(1, 4),
    kind=st.sampled_from(["linear", "layer norm", "rms norm", "embedding"]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=40)
def test_layers_with_more_axes(shape, samples, kind, seed):
    torch.manual_seed(seed)
    x = torch.randn(samples, *shape, dtype=torch.float64)
    if kind == "embedding":
        x = torch.randint(0, 3, x.shape)
    layer = {
        "linear": lambda: nn.Linear(shape[-1], 3),
        "layer norm": lambda: nn.LayerNorm(shape[-2:]),
        "rms norm": lambda: nn.RMSNorm(shape[-1], eps=1e-5),
        "embedding": lambda: nn.Embedding(3, 2, padding_idx=1),
    }[kind]()
    layer = disturb(layer)
    expected = one_by_one(layer, x, square_loss)
    assert_same(fisher_diagonal(layer, [x], square_loss, method="layers"), expected, rtol=1e-9)


@pytest.mark.parametrize("method", ["layers", "vmap", "loop"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_cutting_the_samples_changes_nothing(method, chunk):
    torch.manual_seed(0)
    net, (x, y) = disturb(mlp()), NETS["mlp"][1]()
    batches = [{"x": x[:7], "rest": [y[:7]]}, {"x": x[7:], "rest": [y[7:]]}]
    seen = []

    def counted(net, batch):
        seen.append(len(batch["x"]))
        return loss(net, (batch["x"], batch["rest"][0]))

    found = fisher_sums(net, batches, counted, method=method, chunk_size=chunk)
    assert found.samples == 9
    assert max(seen) <= max(chunk, 3)  # the look at the structure takes three samples
    assert_same(found.mean(), one_by_one(net, (x, y)))


def test_it_is_not_the_square_of_the_batch_gradient():
    torch.manual_seed(0)
    net, (x, y) = disturb(mlp()), (torch.randn(64, 6).double(), torch.randint(3, (64,)))
    found = fisher_diagonal(net, [(x, y)], loss)
    batched = torch.autograd.grad(loss(net, (x, y)).mean(), list(net.parameters()))
    assert sum(float(g.square().sum()) for g in batched) < 0.3 * sum(float(v.sum()) for v in found.values())


def test_nothing_of_the_module_changes():
    torch.manual_seed(0)
    net, batch = disturb(TiedTransformer()), NETS["tied transformer"][1]()
    net.head.bias.requires_grad_(False)
    net.norm.weight.grad = torch.ones_like(net.norm.weight)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    parameters = dict(net.named_parameters())
    found = fisher_diagonal(net, [batch], loss)
    assert "head.bias" not in found
    assert {id(p) for p in net.parameters()} == {id(p) for p in parameters.values()}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["norm.weight"]
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert not any(layer._forward_hooks for layer in net.modules())
    assert torch.backends.mha.get_fastpath_enabled()

    def broken(net, batch):
        net(batch[0])
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        fisher_diagonal(net, [batch], broken)
    assert not any(layer._forward_hooks for layer in net.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["cnn", "tied transformer"])
def test_works_where_gradients_are_off(mode, name):
    torch.manual_seed(0)
    build, data, _ = NETS[name]
    net, batch = disturb(build()), data()
    expected = one_by_one(net, batch)
    with mode():
        batch = tuple(piece.clone() for piece in batch)
        found = fisher_diagonal(net, [batch], loss)
    assert not any(value.is_inference() for value in found.values())
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["cnn", "transformer", "mlp"])
def test_half_precision_is_summed_in_single(name):
    torch.manual_seed(0)
    build, data, _ = NETS[name]
    net, (x, y) = disturb(build()).bfloat16(), data()
    x = x.bfloat16() if x.is_floating_point() else x
    found = fisher_diagonal(net, [(x, y)], loss)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    double = x.double() if x.is_floating_point() else x
    expected = one_by_one(copy.deepcopy(net).double(), (double, y))
    total = sum(float(v.sum()) for v in expected.values())
    assert sum(float(v.sum()) for v in found.values()) == pytest.approx(total, rel=0.1)


def test_autocast_does_not_hide_a_shared_weight():
    torch.manual_seed(0)
    net, (x, y) = disturb(Twice()).float(), NETS["twice"][1]()
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher_sums(net, [(x.float(), y)], loss)
    assert found.methods["shared.weight"] == "vmap"
    expected = one_by_one(net, (x.float(), y))
    for name in ("shared.weight", "plain.weight"):
        torch.testing.assert_close(found.mean()[name].sum(), expected[name].sum(), rtol=0.1, atol=0.0)


class Wrapped(nn.Module):
    """A reparametrised weight, an activation checkpoint and a user's hook that changes an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.register_forward_hook(lambda layer, args, output: output * 2)

    def forward(self, x):
        x = self.first(x)
        return self.head(checkpoint(lambda x: self.second(x).tanh(), x, use_reentrant=False))


def test_reparametrisation_checkpoints_and_other_hooks():
    torch.manual_seed(0)
    net, batch = disturb(Wrapped()), NETS["twice"][1]()
    found = fisher_sums(net, [batch], loss)
    assert_same(found.mean(), one_by_one(net, batch))
    assert found.methods["second.weight"] == found.methods["head.weight"] == "layers"


def test_chosen_parameters_keep_the_callers_keys():
    torch.manual_seed(0)
    net, batch = disturb(mlp()), NETS["mlp"][1]()
    found = fisher_diagonal(net, [batch], loss, parameters={"last": net[3].weight})
    assert_same(found, {"last": one_by_one(net, batch)["3.weight"]})


def test_true_fisher_of_a_softmax_in_closed_form():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4).double().eval(), torch.randn(50, 3).double()

    def logits(net, x):
        return net(x)

    p = net(x).softmax(1).detach()
    expected = {"weight": (p * (1 - p)).T @ x.square() / 50, "bias": (p * (1 - p)).mean(0)}  # Var of onehot(y)
    exact = model_labels(net, [x[:30], x[30:]], logits, generator=None, draws=None)
    assert_same(fisher_diagonal(net, exact, label_loss(logits)), expected, rtol=1e-9)
    drawn = model_labels(net, [x], logits, generator=torch.Generator().manual_seed(0), draws=100)
    found = fisher_sums(net, drawn, label_loss(logits))
    assert found.samples == 50 * 100
    assert_same(found.mean(), expected, rtol=0.08)
    again = model_labels(net, [x], logits, generator=torch.Generator().manual_seed(0), draws=100)
    assert_same(fisher_diagonal(net, again, label_loss(logits)), found.mean(), rtol=0.0)


def test_wrong_arguments_are_named():
    net, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), torch.ones(3, 2)
    with pytest.raises(ValueError, match="method is 'fast'; expected one of auto, layers, vmap, loop"):
        fisher_diagonal(net, [x], square_loss, method="fast")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        fisher_diagonal(net, [x], square_loss, chunk_size=0)
    with pytest.raises(ValueError, match="batches holds no samples"):
        fisher_diagonal(net, [], square_loss)
    with pytest.raises(ValueError, match=r"per_sample_loss returned \(\); expected one loss a sample"):
        fisher_diagonal(net, [x], lambda m, b: square_loss(m, b).mean())
    with pytest.raises(ValueError, match=r"the batch has sizes \[2, 3\] along the first axis"):
        fisher_diagonal(net, [(x, x[:2])], square_loss)
    with pytest.raises(ValueError, match="the batch has a str without a sample axis"):
        fisher_diagonal(net, [(x, "name")], square_loss)
    with pytest.raises(ValueError, match="parameters has \\['other'\\]"):
        fisher_diagonal(net, [x], square_loss, parameters={"other": nn.Parameter(x)})
    with pytest.raises(ValueError, match="draws is 0"):
        next(model_labels(net, [x], square_loss, generator=None, draws=0))
    net[1].train()
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) is in training mode"):
        fisher_diagonal(net, [x], square_loss)
    with pytest.raises(ValueError, match="no running statistics"):
        fisher_diagonal(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)).eval(), [x], square_loss)


def test_every_closed_form_is_tested_here():
    tested = {type(layer) for build, _, _ in NETS.values() for layer in build().modules()}
    tested |= {nn.Conv1d, nn.Conv3d}  # in the test of convolutions of any shape
    tested |= {nn.SyncBatchNorm, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm3d}  # the same functions as 1-d, 2-d
    assert tested >= set(RULES)


def test_a_layer_with_two_names_keeps_its_parameters():
    net = nn.Module()
    net.a = nn.Linear(3, 2)
    net.b = net.a
    net.eval()
    before = list(net.parameters())
    x = torch.randn(4, 3)
    fisher_diagonal(net, [x], lambda m, b: m.b(b).square().sum(1), method="vmap")
    assert all(p is q for p, q in zip(net.parameters(), before, strict=True))
    assert net.b.weight is net.a.weight is before[0]
