import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import resnet50

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.networks import PruningPlan, apply_plan, plan_of

subset = partial(st.sets, min_size=1)


@st.composite
def two_cuts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    cuts, sizes = [], list(shape)
    for _ in range(2):
        dims = draw(st.sets(st.integers(0, len(shape) - 1)))
        kept = {d: tuple(sorted(draw(subset(st.integers(0, sizes[d] - 1))))) for d in dims}
        cuts.append((tuple(sizes), kept))
        for d, indices in kept.items():
            sizes[d] = len(indices)
    return cuts


@given(two_cuts(), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_plans_compose_and_survive_json(cuts, width, heads):
    (shape, first), (between, second) = cuts
    x = torch.arange(math.prod(shape)).reshape(shape)
    a = PruningPlan({"m.w": shape}, {"m.w": first}, {"m": {"width": width, "shape": (width, 2)}})
    b = PruningPlan({"m.w": between}, {"m.w": second}, {"m": {"heads": heads, "shape": (heads, 2)}, "n": {"w": 1}})
    expected = x
    for kept in (first, second):
        for d, indices in kept.items():
            expected = torch.stack([expected.select(d, i) for i in indices], d)
    both = a.then(b)
    assert torch.equal(b.slice("m.w", a.slice("m.w", x)), expected)
    assert torch.equal(both.slice("m.w", x), expected)
    assert both.shapes_after.get("m.w", shape) == tuple(expected.shape)
    assert both.attributes == {"m": {"width": width, "heads": heads, "shape": (heads, 2)}, "n": {"w": 1}}
    assert PruningPlan.from_json(both.to_json()) == both
    assert PruningPlan.from_dict(both.to_dict()) == both
    assert both.under("a.b").under("c") == both.under("c.a.b")


@pytest.mark.parametrize("indices", [(), (1, 0), (0, 0), (-1, 0), (0, 3)])
def test_indices_that_make_no_sense_are_refused(indices):
    with pytest.raises(ConfigError, match="at least one index, ascending, from 0 to 2"):
        PruningPlan({"w": (3, 2)}, {"w": {0: indices}}, {})


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="dimension 2; expected 0 to 1"):
        PruningPlan({"w": (3, 2)}, {"w": {2: (0,)}}, {})
    with pytest.raises(ConfigError, match="'w' in only one of shapes and kept"):
        PruningPlan({"w": (3, 2)}, {}, {})
    with pytest.raises(ConfigError, match=r"sets m.width to 1.5; expected an int"):
        PruningPlan({}, {}, {"m": {"width": 1.5}})
    plan = PruningPlan({"w": (3, 2)}, {"w": {0: (0, 2)}}, {})
    with pytest.raises(ConfigError, match="chain plans in the order"):
        plan.then(plan)
    with pytest.raises(ConfigError, match=r"has the shape \(2, 3\); the pruning plan expects \(3, 2\)"):
        plan.slice("w", torch.zeros(2, 3))
    other = torch.zeros(5)
    assert plan.slice("b", other) is other


def test_what_keeps_everything_is_no_change():
    plan = PruningPlan({"w": (3, 2)}, {"w": {0: (0, 1, 2), 1: (0, 1)}}, {"m": {}})
    assert not plan
    assert plan == PruningPlan({}, {}, {})
    assert PruningPlan.from_json(plan.to_json()) == plan


GOOD = PruningPlan({"w": (3, 2)}, {"w": {0: (0, 2)}}, {"m": {"width": 2}}).to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2; expected 1; update ds-lightning"),
        ({"version": None}, "it has no version"),
        ({"indices": [[0, 10**15]]}, "broken"),
        ({"indices": [[2, 0]]}, "broken"),
        ({"indices": [[0]]}, "broken"),
        ({"indices": [[]]}, "broken"),
        ({"indices": [["0", "2"]]}, "broken"),
        ({"indices": []}, "broken"),
        ({"tensors": {"w": [[3, 2], {"0": -1}]}}, "broken"),
        ({"tensors": {"w": [[3, 2], {"5": 0}]}}, "broken"),
        ({"tensors": {"w": [[3, 2], {"x": 0}]}}, "broken"),
        ({"tensors": {"w": [3, 2]}}, "broken"),
        ({"tensors": {"w": [[3, -2], {"0": 0}]}}, "broken"),
        ({"tensors": ["w"]}, "broken"),
        ({"attributes": {"m": {"width": "2"}}}, "broken"),
        ({"attributes": {"m": {"width": None}}}, "broken"),
        ({"attributes": {"m": 3}}, "broken"),
        ({"attributes": None}, "broken"),
    ],
)
def test_a_broken_description_is_one_line(change, words):
    with pytest.raises(DataError, match=words) as caught:
        PruningPlan.from_dict({**GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"version": true}', '{"version": 1}'])
def test_a_text_that_is_no_plan_is_one_line(text):
    with pytest.raises(DataError, match=r"no JSON|no pruning plan|broken") as caught:
        PruningPlan.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_plan_of_resnet50_is_small_and_quick():
    """Half of the channels drawn at random, which leaves the most ranges: inside the blocks and of the stages."""
    with torch.device("meta"):
        network = resnet50()
    draws = torch.Generator().manual_seed(0)

    def half(size):
        return tuple(torch.randperm(size, generator=draws)[: size // 2].sort().values.tolist())

    removals, attributes = {}, {}

    def conv(path, norm, out, into):
        removals[f"{path}.weight"] = {0: out} | ({1: into} if into else {})
        for name in ("weight", "bias", "running_mean", "running_var"):
            removals[f"{norm}.{name}"] = {0: out}
        attributes[path] = {"out_channels": len(out)} | ({"in_channels": len(into)} if into else {})
        attributes[norm] = {"num_features": len(out)}

    before = half(64)
    conv("conv1", "bn1", before, None)
    for stage, blocks, width in ((1, 3, 64), (2, 4, 128), (3, 6, 256), (4, 3, 512)):
        after = half(4 * width)
        for block in range(blocks):
            path, a, b = f"layer{stage}.{block}", half(width), half(width)
            conv(f"{path}.conv1", f"{path}.bn1", a, after if block else before)
            conv(f"{path}.conv2", f"{path}.bn2", b, a)
            conv(f"{path}.conv3", f"{path}.bn3", after, b)
            if not block:
                conv(f"{path}.downsample.0", f"{path}.downsample.1", after, before)
        before = after
    removals["fc.weight"] = {1: before}
    attributes["fc"] = {"in_features": len(before)}
    state = network.state_dict()
    plan = PruningPlan({name: tuple(state[name].shape) for name in removals}, removals, attributes)
    text = plan.to_json()
    assert len(text) < 60_000
    assert PruningPlan.from_json(text) == plan
    apply_plan(network, plan)
    with torch.device("meta"):
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    assert plan_of(network) == plan
