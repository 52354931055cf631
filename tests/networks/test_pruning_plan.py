import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from ds_lightning.errors import ConfigError
from ds_lightning.networks import PruningPlan, apply_plan, plan_of
from ds_lightning.networks.pruning_plan import plan_in, save_plan, with_all_names


def cut(network, removals, attributes):
    """A plan from `name -> {dimension: kept}`, with the network's own shapes."""
    state = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
    return PruningPlan({name: tuple(state[name].shape) for name in removals}, removals, attributes)


def convnet():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(8 * 4, 2)
    )
    with torch.no_grad():
        for tensor in network[1].state_dict().values():
            if tensor.dim():
                tensor.uniform_(0.5, 1.5)
    return network


def convnet_plan(network, first, second):
    """Keep channels `first` of the first convolution and `second` of the second."""
    flat = tuple(4 * c + i for c in second for i in range(4))
    return cut(
        network,
        {
            "0.weight": {0: first},
            "0.bias": {0: first},
            **{f"1.{name}": {0: first} for name in ("weight", "bias", "running_mean", "running_var")},
            "3.weight": {0: second, 1: first},
            "3.bias": {0: second},
            "5.weight": {1: flat},
        },
        {
            "0": {"out_channels": len(first)},
            "1": {"num_features": len(first)},
            "3": {"in_channels": len(first), "out_channels": len(second)},
            "5": {"in_features": len(flat)},
        },
    )


def masked(network, first, second, x):
    """What the unpruned network says when the removed channels are zero."""
    x = network[2](network[1](network[0](x)))
    x = x * torch.tensor([float(c in first) for c in range(6)])[:, None, None]
    x = network[3](x) * torch.tensor([float(c in second) for c in range(8)])[:, None, None]
    return network[5](network[4](x))


FIRST, SECOND = (0, 2, 3, 5), (1, 2, 7)
IMAGES = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def snapshot(network):
    """Every object and value that a failed plan must leave alone."""
    return {
        path: (
            {
                key: (id(p), None if p is None else p.clone())
                for key, p in [*m._parameters.items(), *m._buffers.items()]
            },
            {key: copy.copy(value) for key, value in m.__dict__.items() if isinstance(value, int | tuple | list)},
            "_pruning_plan" in m.__dict__,
        )
        for path, m in network.named_modules(remove_duplicate=False)
    }


def assert_untouched(before, network):
    after = snapshot(network)
    assert before.keys() == after.keys()
    for path, (tensors, plain, recorded) in before.items():
        assert after[path][1:] == (plain, recorded)
        for key, (identity, value) in tensors.items():
            assert after[path][0][key][0] == identity
            assert value is None or torch.equal(value, after[path][0][key][1])


@pytest.mark.parametrize("training", [False, True])
def test_the_pruned_network_says_what_the_masked_one_says(training):
    network = convnet().train(training)
    expected = masked(copy.deepcopy(network), FIRST, SECOND, IMAGES)
    replaced = apply_plan(network, convnet_plan(network, FIRST, SECOND))
    torch.testing.assert_close(network(IMAGES), expected)
    assert len(replaced) == 7
    assert repr(network[3]) == "Conv2d(4, 3, kernel_size=(1, 1), stride=(1, 1))"


subset = partial(st.sets, min_size=1)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_chain_of_plans_is_one_plan_for_the_unpruned_network(data):
    network = convnet().eval()
    original = copy.deepcopy(network)
    first, second = tuple(range(6)), tuple(range(8))
    for _ in range(3):
        left = [tuple(sorted(data.draw(subset(st.integers(0, len(channels) - 1))))) for channels in (first, second)]
        apply_plan(network, convnet_plan(network, *left))
        first, second = (tuple(c[i] for i in kept) for c, kept in zip((first, second), left, strict=True))
    expected = masked(original, first, second, IMAGES)
    torch.testing.assert_close(network(IMAGES), expected)
    apply_plan(original, plan_of(network) or PruningPlan({}, {}, {}))
    assert original.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in original.state_dict().items())
    assert repr(original) == repr(network)


def test_a_checkpoint_rebuilds_the_network_from_its_unpruned_class(tmp_path):
    network = convnet().eval()
    checkpoint = {}
    save_plan(checkpoint, network)
    assert checkpoint == {}
    assert plan_in(checkpoint) is None
    assert plan_of(network) is None
    apply_plan(network, convnet_plan(network, FIRST, SECOND))
    apply_plan(network, convnet_plan(network, (1, 2), (0, 1)))
    save_plan(checkpoint, network)
    torch.save({**checkpoint, "state_dict": network.state_dict()}, tmp_path / "pruned.ckpt")
    loaded = torch.load(tmp_path / "pruned.ckpt", weights_only=True)
    fresh = convnet().eval()
    apply_plan(fresh, plan_in(loaded))
    fresh.load_state_dict(loaded["state_dict"])
    assert torch.equal(fresh(IMAGES), network(IMAGES))
    assert plan_of(fresh) == plan_of(network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_new_parameters_are_as_the_old_ones_were(dtype):
    network = convnet().to(dtype)
    network[0].weight.requires_grad_(False)
    network[0].bias.no_decay = True
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    old = {name: (p, p.detach().clone(), p.grad.clone()) for name, p in network.named_parameters()}
    plan = convnet_plan(network, FIRST, SECOND)
    replaced = apply_plan(network, plan)
    new = dict(network.named_parameters())
    assert {id(old[name][0]): id(new[name]) for name in new if name in plan.shapes} == {
        id(a): id(b) for a, b in replaced.items()
    }
    for name, (before, value, grad) in old.items():
        rows = plan.kept.get(name, {}).get(0, range(len(value)))
        columns = plan.kept.get(name, {}).get(1)
        for got, whole in ((new[name], value), (new[name].grad, grad)):
            whole = whole[list(rows)]
            assert torch.equal(got, whole if columns is None else whole[:, list(columns)])
            assert got.dtype == dtype
        assert type(new[name]) is nn.Parameter
        assert new[name].is_leaf
        assert new[name].requires_grad == before.requires_grad
    assert new["0.bias"].no_decay
    assert network[5].bias is old["5.bias"][0]


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 1), nn.Conv3d(6, 8, 2), nn.Conv2d(1, 8, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_memory_formats_are_those_of_a_new_layer_of_that_size(layer, last):
    layer = copy.deepcopy(layer)
    form = torch.contiguous_format
    if last:
        form = torch.channels_last if layer.weight.dim() == 4 else torch.channels_last_3d
    layer.to(memory_format=form)
    plan = cut(layer, {"weight": {0: (1, 4, 5)}, "bias": {0: (1, 4, 5)}}, {"": {"out_channels": 3}})
    apply_plan(layer, plan)
    fresh = type(layer)(layer.in_channels, 3, layer.kernel_size).to(memory_format=form)
    assert layer.weight.stride() == fresh.weight.stride()


def test_buffers_that_are_not_saved_and_those_that_are_none():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    norm.register_buffer("scratch", torch.arange(4), persistent=False)
    apply_plan(norm, cut(norm, {"weight": {0: (0, 3)}, "scratch": {0: (0, 3)}}, {"": {"num_features": 2}}))
    assert norm.scratch.tolist() == [0, 3]
    assert norm.running_mean is None
    assert "scratch" not in norm.state_dict()
    with pytest.raises(ConfigError, match="no such parameter or buffer"):
        apply_plan(norm, PruningPlan({"running_mean": (4,)}, {"running_mean": {0: (0,)}}, {}))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.block = nn.Linear(6, 6)
        self.same_block = self.block
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.same_block(self.block(self.embedding(x))))


@pytest.mark.parametrize("names", [("embedding", "block"), ("head", "same_block"), ("embedding", "same_block")])
def test_what_is_shared_stays_shared_whatever_its_name_in_the_plan(names):
    table, block = names
    network, kept = Tied(), (1, 2, 5)
    attributes = {
        block: {"in_features": 3, "out_features": 3},
        "embedding": {"embedding_dim": 3},
        "head": {"in_features": 3},
    }
    plan = cut(
        network,
        {f"{table}.weight": {1: kept}, f"{block}.weight": {0: kept, 1: kept}, f"{block}.bias": {0: kept}},
        attributes,
    )
    index, x = list(kept), torch.arange(10)
    table, block = network.embedding.weight[:, index], network.block.weight[index][:, index]
    bias = network.block.bias[index]
    expected = F.linear(F.linear(F.embedding(x, table), block, bias), block, bias) @ table.T
    replaced = apply_plan(network, plan)
    torch.testing.assert_close(network(x), expected)
    assert network.head.weight is network.embedding.weight
    assert network.same_block is network.block
    assert len(replaced) == 3 == len(list(network.parameters()))
    whole = plan_of(network)
    assert whole == with_all_names(Tied(), plan) == with_all_names(network, plan)
    assert set(whole.shapes) == set(network.state_dict())
    again = Tied()
    apply_plan(again, PruningPlan.from_json(whole.to_json()))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x), network(x))


def test_two_entries_for_one_tensor_are_refused():
    network = Tied()
    before = snapshot(network)
    plan = cut(network, {"embedding.weight": {1: (0, 1)}, "head.weight": {1: (0, 2)}}, {})
    with pytest.raises(ConfigError, match=r"different entries for head.weight and embedding.weight"):
        apply_plan(network, plan)
    assert_untouched(before, network)


def test_attention_loses_a_head_and_half_of_its_width():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    width, head = (0, 1, 4, 7), (4, 5, 6, 7)
    rows = tuple(8 * part + i for part in range(3) for i in head)
    x = torch.randn(2, 5, 4)
    q, k, v = F.linear(
        x, attention.in_proj_weight[list(rows)][:, list(width)], attention.in_proj_bias[list(rows)]
    ).chunk(3, -1)
    out = attention.out_proj
    seen = (q @ k.mT / 2).softmax(-1) @ v
    expected = F.linear(seen, out.weight[list(width)][:, list(head)], out.bias[list(width)])
    plan = cut(
        attention,
        {
            "in_proj_weight": {0: rows, 1: width},
            "in_proj_bias": {0: rows},
            "out_proj.weight": {0: width, 1: head},
            "out_proj.bias": {0: width},
        },
        {
            "": {"embed_dim": 4, "kdim": 4, "vdim": 4, "num_heads": 1},
            "out_proj": {"in_features": 4, "out_features": 4},
        },
    )
    apply_plan(attention, plan)
    torch.testing.assert_close(attention(x, x, x)[0], expected)


def test_a_recurrent_layer_uses_its_new_weights():
    torch.manual_seed(0)
    lstm, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
    kept = (0, 2, 3)
    rows = tuple(4 * gate + i for gate in range(4) for i in kept)
    removals = {"weight_ih_l0": {0: rows}, "weight_hh_l0": {0: rows, 1: kept}}
    removals |= {"bias_ih_l0": {0: rows}, "bias_hh_l0": {0: rows}}
    apply_plan(lstm, cut(lstm, removals, {"": {"hidden_size": 3}}))
    fresh = nn.LSTM(3, 3, batch_first=True)
    fresh.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm(x)[0], fresh(x)[0])
    lstm(x)[0].sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())


@pytest.mark.parametrize("kind", [tuple, list, torch.Size])
def test_a_tuple_stays_what_it_was(kind):
    norm = nn.LayerNorm(4)
    norm.normalized_shape = kind((4,))
    plan = cut(norm, {"weight": {0: (0, 3)}, "bias": {0: (0, 3)}}, {"": {"normalized_shape": (2,)}})
    apply_plan(norm, plan)
    assert norm.normalized_shape == kind((2,))
    assert type(norm.normalized_shape) is kind
    assert apply_plan(norm, plan) == {}


class Holder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = convnet()


def test_a_module_that_holds_the_network_and_a_copy_for_averages():
    module, average = Holder(), AveragedModel(convnet())
    plan = convnet_plan(module.network, FIRST, SECOND)
    apply_plan(module, plan.under("network"))
    apply_plan(average, plan.under("module"))
    average.update_parameters(module.network)
    assert plan_of(module) == plan.under("network")
    assert plan_of(module.network) == plan
    more = convnet_plan(module.network, (0, 3), (1,))
    apply_plan(module.network, more)
    assert plan_of(module) == plan.then(more).under("network")
    assert plan_of(copy.deepcopy(module)) == plan_of(module)
    apply_plan(average.module, more)
    assert average.module[0].weight.shape == module.network[0].weight.shape


def test_a_plan_that_is_applied_already_changes_nothing():
    network = convnet()
    first = convnet_plan(network, FIRST, SECOND)
    apply_plan(network, first)
    second = convnet_plan(network, (1, 2), (0, 1))
    apply_plan(network, second)
    before = snapshot(network)
    for plan in (second, first.then(second), PruningPlan({}, {}, {})):
        assert apply_plan(network, plan) == {}
        assert_untouched(before, network)
    assert plan_of(network) == first.then(second)
    other = convnet_plan(convnet(), (0, 1), (0, 1))
    with pytest.raises(ConfigError, match="another plan to the same shape"):
        apply_plan(network, other)
    with pytest.raises(ConfigError, match=r"expects 0.weight in the shape"):
        apply_plan(network, first)
    assert_untouched(before, network)


def test_a_network_that_was_built_small_learns_its_plan():
    plan = PruningPlan({"weight": (3, 2)}, {"weight": {0: (0, 2)}}, {"": {"out_features": 2}})
    layer = nn.Linear(2, 2, bias=False)
    assert apply_plan(layer, plan) == {}
    assert plan_of(layer) == plan


def test_a_compiled_network_goes_by_the_names_of_what_it_wraps():
    network = convnet().eval()
    expected = masked(copy.deepcopy(network), FIRST, SECOND, IMAGES)
    plan = convnet_plan(network, FIRST, SECOND)
    module = Holder()
    module.network = torch.compile(network, backend="eager")
    module.network(IMAGES)
    assert plan.under("network._orig_mod") == plan.under("network")
    apply_plan(module, plan.under("network"))
    torch.testing.assert_close(module.network(IMAGES), expected)
    assert plan_of(module) == plan.under("network")
    assert plan_of(module.network) == plan
    assert plan.slice("_orig_mod.0.bias", torch.arange(6)).tolist() == list(FIRST)


def test_what_was_pruned_in_inference_mode_can_be_trained():
    network = convnet()
    with torch.inference_mode():
        apply_plan(network, convnet_plan(network, FIRST, SECOND))
    network(IMAGES).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_pruned_network_exports_and_scripts():
    network = convnet().eval()
    apply_plan(network, convnet_plan(network, FIRST, SECOND))
    exported = torch.export.export(network, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), network(IMAGES))
    torch.testing.assert_close(torch.jit.script(network)(IMAGES), network(IMAGES))


BAD = {
    "another shape": ({"0.weight": {0: (0,)}}, {}, {"0.weight": (7, 3, 3, 3)}, "expects 0.weight in the shape"),
    "no module": ({"9.weight": {0: (0,)}}, {}, {"9.weight": (7, 3)}, "has no module '9'"),
    "no tensor": ({"0.scale": {0: (0,)}}, {}, {"0.scale": (7,)}, "0 has no such parameter"),
    "no module for attributes": ({}, {"9": {"out_features": 1}}, {}, "names the module 9"),
    "no attribute": ({}, {"0": {"out_features": 1}}, {}, r"sets 0.out_features to 1; the network has None"),
    "another type": ({}, {"0": {"kernel_size": 1}}, {}, r"the network has \(3, 3\)"),
    "an int for a tuple": ({}, {"0": {"out_channels": (1,)}}, {}, r"sets 0.out_channels to \(1,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_plan_that_does_not_fit_leaves_the_network_as_it_was(case):
    kept, attributes, shapes, words = BAD[case]
    network = convnet()
    before = snapshot(network)
    good = convnet_plan(network, FIRST, SECOND)
    plan = PruningPlan({**good.shapes, **shapes}, {**good.kept, **kept}, {**good.attributes, **attributes})
    with pytest.raises(ConfigError, match=words) as caught:
        apply_plan(network, plan)
    assert "\n" not in str(caught.value)
    assert_untouched(before, network)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
)
def test_weights_that_are_computed_are_refused(make):
    network = nn.Sequential(make(nn.Linear(4, 4)))
    before = snapshot(network)
    for name in [*dict(network.named_parameters()), "0.weight"]:
        with pytest.raises(ConfigError, match="is computed from other tensors"):
            apply_plan(network, PruningPlan({name: (4, 4)}, {name: {0: (0, 1)}}, {}))
    with pytest.raises(ConfigError, match="is computed from other tensors"):
        apply_plan(network, PruningPlan({}, {}, {"0": {"out_features": 3}}))
    assert_untouched(before, network)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_parameters_that_can_not_be_sliced_are_refused():
    lazy = nn.LazyLinear(4)
    with pytest.raises(ConfigError, match="is a UninitializedParameter"):
        apply_plan(lazy, PruningPlan({"weight": (4, 2)}, {"weight": {0: (0,)}}, {}))
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="gradient of weight is sparse"):
        apply_plan(table, cut(table, {"weight": {1: (0,)}}, {"": {"embedding_dim": 1}}))
    script = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="prune before scripting"):
        apply_plan(script, PruningPlan({"weight": (2, 2)}, {"weight": {0: (0,)}}, {}))
