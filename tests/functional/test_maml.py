from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ds_lightning.functional import adapted_outputs, inner_adapt, multi_step_weights, use_batch_statistics
from ds_lightning.functional._maml_checks import all_at_once
from ds_lightning.functional.maml import default_loss

DOUBLE = torch.float64
TASKS, SHOTS, QUERIES = 3, 6, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def perceptron(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE)


def convolutional(norm: nn.Module) -> nn.Module:
    layers = (nn.Conv2d(1, 4, 3, padding=1), norm, nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    return nn.Sequential(*layers).to(DOUBLE)


def episodes(*shape: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return (support inputs, support labels), query inputs and query labels of TASKS tasks."""
    x = torch.randn(TASKS, SHOTS + QUERIES, *shape, dtype=DOUBLE)
    y = torch.randint(0, 2, (TASKS, SHOTS + QUERIES))
    return (x[:, :SHOTS], y[:, :SHOTS]), x[:, SHOTS:], y[:, SHOTS:]


def meta_loss(network: nn.Module, data: Any, **how: Any) -> Tensor:
    support, query, labels = data
    outputs = adapted_outputs(network, support, query, **{"inner_lr": 0.3, "after": (2,), **how})[-1]
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def gradients(network: nn.Module, data: Any, **how: Any) -> Tensor:
    found = torch.autograd.grad(meta_loss(network, data, **how), list(network.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def finite_differences(loss: Callable[[], Tensor], values: list[Tensor], step: float = 1e-5) -> Tensor:
    """Central differences of a loss in every number of `values`, which are changed in place and put back."""
    found = []
    for value in values:
        numbers = value.detach().view(-1)
        for index in range(len(numbers)):
            kept = numbers[index].item()
            numbers[index] = kept + step
            above = loss().item()
            numbers[index] = kept - step
            below = loss().item()
            numbers[index] = kept
            found.append((above - below) / (2 * step))
    return torch.tensor(found, dtype=DOUBLE)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (perceptron, (3,)),
    "LayerNorm": (lambda: perceptron(nn.LayerNorm(4)), (3,)),
    "BatchNorm1d": (lambda: perceptron(nn.BatchNorm1d(4, track_running_stats=False)), (3,)),
    "BatchNorm2d": (lambda: convolutional(nn.BatchNorm2d(4, track_running_stats=False)), (1, 4, 4)),
    "InstanceNorm2d": (lambda: convolutional(nn.InstanceNorm2d(4, affine=True)), (1, 4, 4)),
    "GroupNorm": (lambda: convolutional(nn.GroupNorm(2, 4)), (1, 4, 4)),
}


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("name", NETWORKS)
def test_second_order_is_that_of_finite_differences(name: str, tasks: str) -> None:
    make, shape = NETWORKS[name]
    network, data = make(), episodes(*shape)
    expected = finite_differences(lambda: meta_loss(network, data).detach(), list(network.parameters()))
    torch.testing.assert_close(gradients(network, data, tasks=tasks), expected, rtol=1e-6, atol=1e-8)


def test_first_order_takes_the_inner_gradients_as_constants() -> None:
    network, ((x, y), query, labels) = perceptron(), episodes(3)
    names, start = zip(*network.named_parameters(), strict=True)
    total = [torch.zeros_like(value) for value in start]
    for task in range(TASKS):
        now = [value.detach().requires_grad_() for value in start]
        for _ in range(2):
            loss = F.cross_entropy(functional_call(network, dict(zip(names, now, strict=True)), (x[task],)), y[task])
            slopes = torch.autograd.grad(loss, now)
            now = [(v - 0.3 * s).detach().requires_grad_() for v, s in zip(now, slopes, strict=True)]
        loss = F.cross_entropy(
            functional_call(network, dict(zip(names, now, strict=True)), (query[task],)), labels[task]
        )
        for sum_, slope in zip(total, torch.autograd.grad(loss, now), strict=True):
            sum_ += slope / TASKS
    expected = torch.cat([value.flatten() for value in total])
    for tasks in ("vmap", "loop"):
        found = gradients(network, ((x, y), query, labels), order=1, tasks=tasks)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (gradients(network, ((x, y), query, labels)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("only_head", [False, True])
def test_a_checkpoint_changes_nothing(tasks: str, only_head: bool) -> None:
    network, data = perceptron(nn.LayerNorm(4)), episodes(3)
    rates = {name: torch.full_like(value, 0.3, requires_grad=True) for name, value in network.named_parameters()}
    adapt = ["3.weight", "3.bias"] if only_head else None
    how = {"tasks": tasks, "adapt": adapt, "inner_lr": rates, "after": (4,)}
    wanted = [*network.parameters(), *(rates[name] for name in adapt or rates)]
    plain = torch.autograd.grad(meta_loss(network, data, **how), wanted)
    again = torch.autograd.grad(meta_loss(network, data, **how, checkpoint=True), wanted)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_checkpoint_repeats_dropout_and_leaves_the_random_state() -> None:
    network, data = perceptron(nn.Dropout(0.5)), episodes(3)
    found, states = [], []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        found.append(gradients(network, data, checkpoint=checkpoint))
        states.append(torch.get_rng_state())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert torch.equal(*states)


def saved_bytes(network: nn.Module, data: Any, steps: int, checkpoint: bool) -> int:
    """Bytes of distinct storages that the graph of a meta-loss keeps until its backward pass."""
    loss = meta_loss(network, data, after=(steps,), checkpoint=checkpoint)
    seen: set[Any] = set()
    alive: dict[int, int] = {}
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        for value in saved:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        nodes += [parent for parent, _ in node.next_functions]
    return sum(alive.values())


def test_with_a_checkpoint_memory_hardly_grows_with_the_steps() -> None:
    network, data = convolutional(nn.GroupNorm(2, 4)), episodes(1, 4, 4)
    one, ten = (saved_bytes(network, data, steps, checkpoint=False) for steps in (1, 10))
    assert ten > 5 * one
    assert saved_bytes(network, data, 10, checkpoint=True) < 1.3 * one


def test_learned_rates_get_the_gradients_of_finite_differences() -> None:
    network, data = perceptron(), episodes(3)
    sizes = {"0.weight": (4, 3), "0.bias": (), "2.weight": (2, 1, 1), "2.bias": (2, 2)}
    rates = {name: torch.full(shape, 0.3, dtype=DOUBLE, requires_grad=True) for name, shape in sizes.items()}
    for tasks in ("vmap", "loop"):
        found = torch.autograd.grad(meta_loss(network, data, inner_lr=rates, tasks=tasks), list(rates.values()))
        expected = finite_differences(lambda: meta_loss(network, data, inner_lr=rates).detach(), list(rates.values()))
        flat = torch.cat([gradient.flatten() for gradient in found])
        torch.testing.assert_close(flat, expected, rtol=1e-6, atol=1e-8)


def test_a_rate_of_each_step_is_used_in_its_step_and_the_last_one_beyond() -> None:
    network, ((x, y), _, _) = perceptron(), episodes(3)
    rates = {
        name: torch.tensor([0.1, 0.4], dtype=DOUBLE).view(2, *[1] * v.dim()) for name, v in network.named_parameters()
    }
    now: Any = None
    for rate in (0.1, 0.4, 0.4):
        now = inner_adapt(network, (x[0], y[0]), inner_lr=rate, params=now)
    found = inner_adapt(network, (x[0], y[0]), inner_lr=rates, steps=3)
    for name, value in now.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_linear_regression_has_a_closed_form() -> None:
    network = nn.Linear(3, 1, bias=False).to(DOUBLE)
    x, query = torch.randn(8, 3, dtype=DOUBLE), torch.randn(9, 3, dtype=DOUBLE)
    best, best_query = torch.randn(3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    curvature, curvature_query = 2 * x.T @ x / 8, 2 * query.T @ query / 9
    theta, rate, steps = network.weight[0].detach(), 0.1, 3
    shrink = torch.linalg.matrix_power(torch.eye(3, dtype=DOUBLE) - rate * curvature, steps)
    adapted = inner_adapt(network, (x, (x @ best)[:, None]), inner_lr=rate, steps=steps)
    expected = best + shrink @ (theta - best)
    torch.testing.assert_close(adapted["weight"][0], expected, rtol=1e-12, atol=1e-14)
    loss = F.mse_loss(functional_call(network, adapted, (query,)), (query @ best_query)[:, None])
    (gradient,) = torch.autograd.grad(loss, [network.weight])
    slope = shrink @ curvature_query @ (expected - best_query)
    torch.testing.assert_close(gradient[0], slope, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=12)
@given(
    tasks=st.integers(1, 3), shots=st.integers(1, 4), queries=st.integers(1, 3), ways=st.integers(1, 3),
    after=st.sets(st.integers(0, 3), min_size=1), order=st.sampled_from([1, 2]), checkpoint=st.booleans(),
)  # fmt: skip
def test_all_tasks_at_once_are_the_tasks_one_by_one(
    tasks: int, shots: int, queries: int, ways: int, after: set[int], order: Any, checkpoint: bool
) -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, ways)).to(DOUBLE)
    x, query = torch.randn(tasks, shots, 2, dtype=DOUBLE), torch.randn(tasks, queries, 2, dtype=DOUBLE)
    y = torch.randint(0, ways, (tasks, shots))
    how: Any = {"inner_lr": 0.2, "after": sorted(after), "order": order, "checkpoint": checkpoint}
    ways_of_going = [adapted_outputs(network, (x, y), query, tasks=way, **how) for way in ("vmap", "loop", "auto")]
    weights = torch.randn_like(ways_of_going[0])
    slopes = [torch.autograd.grad((out * weights).sum(), list(network.parameters())) for out in ways_of_going]
    for out, slope in zip(ways_of_going, slopes, strict=True):
        assert out.shape == (len(after), tasks, queries, ways)
        torch.testing.assert_close(out, ways_of_going[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(slope, slopes[0], rtol=1e-11, atol=1e-12)
    for index, steps in enumerate(sorted(after)):
        adapted = inner_adapt(network, (x[0], y[0]), inner_lr=0.2, steps=steps)
        torch.testing.assert_close(ways_of_going[1][index, 0], functional_call(network, adapted, (query[0],)))


def test_tasks_go_at_once_where_that_is_known_to_work_and_to_be_faster() -> None:
    class Own(nn.Module):
        pass

    for network, on_a_cpu, on_a_gpu in (
        (perceptron(nn.BatchNorm1d(4)), True, True),
        (convolutional(nn.GroupNorm(2, 4)), False, True),
        (nn.LSTM(2, 3), False, False),
        (nn.Sequential(nn.Linear(2, 2), Own()), False, False),
    ):
        assert all_at_once(network, "auto", 4, "cpu") == on_a_cpu
        assert all_at_once(network, "auto", 4, "cuda") == on_a_gpu
        assert not all_at_once(network, "auto", 1)
        assert all_at_once(network, "vmap", 4)
        assert not all_at_once(network, "loop", 4)


def test_only_what_is_named_adapts_and_nothing_is_changed_in_place() -> None:
    network, ((x, y), _, _) = perceptron(), episodes(3)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    adapted = inner_adapt(network, (x[0], y[0]), inner_lr=0.3, steps=2, adapt=["2.weight", "2.bias"])
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name])
        assert torch.equal(adapted[name], before[name]) == name.startswith("0")
    network[0].requires_grad_(False)  # type: ignore[index]
    by_default = inner_adapt(network, (x[0], y[0]), inner_lr=0.3, steps=2)
    assert all(torch.equal(by_default[name], adapted[name]) for name in adapted)


def test_a_head_that_adapts_alone_gives_the_body_the_gradient_of_finite_differences() -> None:
    network, data = perceptron(), episodes(3)
    adapt = ["2.weight", "2.bias"]
    expected = finite_differences(lambda: meta_loss(network, data, adapt=adapt).detach(), list(network.parameters()))
    for tasks in ("vmap", "loop"):
        found = gradients(network, data, adapt=adapt, tasks=tasks)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_no_step_is_the_network_itself() -> None:
    network, ((x, y), query, _) = perceptron(), episodes(3)
    adapted = inner_adapt(network, (x[0], y[0]), inner_lr=0.3, steps=0)
    assert all(adapted[name] is value for name, value in network.named_parameters())
    assert torch.equal(
        adapted_outputs(network, (x, y), query, inner_lr=0.3, after=(0,), tasks="loop")[0, 1], network(query[1])
    )


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_without_gradients_the_outputs_are_the_same_and_have_no_graph(tasks: Any) -> None:
    network, (support, query, _) = perceptron(), episodes(3)
    with_graph = adapted_outputs(network, support, query, inner_lr=0.3, after=(0, 3), tasks=tasks)
    with torch.no_grad():
        without = adapted_outputs(network, support, query, inner_lr=0.3, after=(0, 3), tasks=tasks)
        adapted = inner_adapt(network, (support[0][0], support[1][0]), inner_lr=0.3)
    torch.testing.assert_close(without, with_graph, rtol=1e-12, atol=1e-14)
    assert not without.requires_grad
    assert not any(value.requires_grad for value in adapted.values())


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("order", [1, 2])
def test_under_autocast_adaptation_is_that_of_32_bits_but_for_rounding(tasks: Any, order: Any) -> None:
    network = perceptron().float()
    (x, y), query, labels = episodes(3)
    data = ((x.float(), y), query.float(), labels)
    expected = gradients(network, data, order=order)
    found = []
    for checkpoint in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                network(data[1])  # fills autocast's cache with weights that have no gradient
            loss = meta_loss(network, data, order=order, tasks=tasks, checkpoint=checkpoint)
        slopes = torch.autograd.grad(loss, list(network.parameters()))
        found.append(torch.cat([slope.flatten() for slope in slopes]))
    torch.testing.assert_close(found[0], expected, rtol=0.1, atol=0.01)
    assert (found[0] - expected).abs().max() > 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = adapted_outputs(network, *data[:2], inner_lr=0.3, after=(0, 3), tasks=tasks)
    high = adapted_outputs(network, *data[:2], inner_lr=0.3, after=(0, 3))
    torch.testing.assert_close(low.float(), high, rtol=0.1, atol=0.03)


def test_compiled_code_keeps_the_second_order() -> None:
    network, data = perceptron(), episodes(3)
    compiled = torch.compile(lambda: meta_loss(network, data), backend="aot_eager")
    found = torch.cat([slope.flatten() for slope in torch.autograd.grad(compiled(), list(network.parameters()))])
    torch.testing.assert_close(found, gradients(network, data), rtol=1e-12, atol=1e-14)
    assert (found - gradients(network, data, order=1)).abs().max() > 1e-3


def test_weights_of_the_steps_are_those_of_the_paper() -> None:
    torch.testing.assert_close(multi_step_weights(5, 0.0), torch.full((5,), 0.2))
    torch.testing.assert_close(multi_step_weights(5, 0.5), torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6]))
    torch.testing.assert_close(multi_step_weights(5, 1.0), torch.tensor([0.006, 0.006, 0.006, 0.006, 0.976]))
    assert multi_step_weights(1, 0.3).tolist() == [1.0]


def test_batch_statistics_are_those_of_a_layer_without_running_ones() -> None:
    norm = use_batch_statistics(nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm2d(3))).eval()[0]  # type: ignore[index]
    x = torch.randn(7, 3)
    torch.testing.assert_close(norm(x), (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())
    assert sorted(norm.state_dict()) == ["bias", "weight"]


def bad(network: nn.Module | None = None, x: Tensor | None = None, y: Tensor | None = None, **how: Any) -> None:
    x = torch.zeros(4, 3) if x is None else x
    y = torch.zeros(4, dtype=torch.int64) if y is None else y
    inner_adapt(network or perceptron().float(), (x, y), **{"inner_lr": 0.1, **how})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": -1}, "steps is -1; expected at least 0"),
        ({"inner_lr": -0.1}, "inner_lr is -0.1; expected a finite rate of at least 0"),
        ({"inner_lr": float("nan")}, "inner_lr is nan"),
        ({"order": 3}, "order is 3; expected 1"),
        ({"adapt": ["head.weight"]}, r"adapt has \['head.weight'\]; expected names among 0.weight, 0.bias"),
        ({"adapt": []}, "adapt has no name"),
        ({"params": {"w": torch.zeros(1)}}, "params has 'w', which the network has not"),
        ({"params": {"0.bias": torch.zeros(1)}}, r"params has '0.bias' of shape \(1,\); expected \(4,\)"),
        ({"inner_lr": {"0.bias": torch.zeros(4)}}, "inner_lr has no rate for '0.weight'"),
        (
            {"inner_lr": {"0.bias": torch.zeros(5)}, "adapt": ["0.bias"]},
            r"inner_lr for '0.bias' has the shape \(5,\); expected \(\), \(4,\), or \(steps, ...\)",
        ),
        ({"y": torch.zeros(3, dtype=torch.int64)}, r"support has inputs of shape \(4, 3\) and labels of shape \(3,\)"),
        ({"x": torch.zeros(0, 3), "y": torch.zeros(0, dtype=torch.int64)}, "at least one task and one sample"),
        ({"network": nn.BatchNorm1d(3)}, r"the network \(BatchNorm1d\) keeps running statistics"),
        ({"network": nn.Linear(3, 2).requires_grad_(False)}, "adapt is None and no parameter"),
        ({"y": torch.zeros(4)}, r"targets have the shape \(4,\); expected the outputs' \(4, 2\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad(**given)


def test_many_tasks_that_do_not_fit_are_refused() -> None:
    network, (support, query, _) = perceptron(), episodes(3)
    for given_, message in (
        ({"after": ()}, "after is \\(\\)"),
        ({"after": (2, 1)}, "after is \\(2, 1\\); expected rising"),
        ({"after": (-1, 2)}, "steps is -1"),
        ({"tasks": "map"}, "tasks is 'map'; expected one of auto, vmap, loop"),
        ({"query": query[:2]}, "query has the shape"),
        ({"support": (support[0], support[1][:, 0])}, r"labels of shape \(3,\); expected \(T, N, ...\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adapted_outputs(network, **{"support": support, "query": query, "inner_lr": 0.1, **given_})  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode is on"):
        adapted_outputs(network, support, query, inner_lr=0.1)
    with pytest.raises(ValueError, match="steps is 0"):
        multi_step_weights(0, 0.0)
    with pytest.raises(ValueError, match="progress is 2"):
        multi_step_weights(3, 2.0)


def test_the_default_loss_goes_by_the_kind_of_labels() -> None:
    outputs = torch.tensor([[0.0, 0.0]])
    assert default_loss(outputs, torch.tensor([1])).item() == pytest.approx(0.6931472)
    assert default_loss(outputs, torch.tensor([[1.0, 3.0]])).item() == 5.0
