"""MAML: adapt a network to a task by gradient steps that can be differentiated themselves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.functional._maml_checkpoint import autocast_state
from ds_lightning.functional._maml_checks import (
    adapting,
    all_at_once,
    all_parameters,
    check_normalization,
    check_numbers,
    check_pair,
    check_rates,
)
from ds_lightning.functional._maml_steps import Loss, Parameters, Steps
from ds_lightning.functional._never_compiled import never_compiled


def default_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Return cross-entropy for class indices, mean squared error for real targets of the outputs' shape.

    Args:
        outputs: (N, classes), or (N, ...) for regression.
        y: (N,) int64, or (N, ...) real.

    Raises:
        ValueError: when real targets have another shape than the outputs.
    """
    if not y.is_floating_point():
        return F.cross_entropy(outputs, y)
    if outputs.shape != y.shape:
        raise ValueError(f"targets have the shape {tuple(y.shape)}; expected the outputs' {tuple(outputs.shape)}")
    return F.mse_loss(outputs, y)


# Compiled by torch 2.14, order 2 gave the gradients of order 1, without a word.
@never_compiled
def inner_adapt(
    network: nn.Module,
    support: tuple[Tensor, Tensor],
    *,
    inner_lr: float | Mapping[str, Tensor],
    steps: int = 1,
    order: int = 2,
    params: Mapping[str, Tensor] | None = None,
    adapt: Iterable[str] | None = None,
    loss_fn: Loss | None = None,
    checkpoint: bool = False,
) -> Parameters:
    """Return a network's parameters after gradient steps on one task, with the graph back to where they began.

    Under `torch.no_grad` the steps are the same and the outcome has no graph. The network itself is not changed.
    Inside `torch.compile` it runs uncompiled.

    Args:
        network: maps inputs (N, ...) to outputs (N, ...); it keeps no running statistics.
        support: inputs (N, ...) and labels, (N,) int64 or (N, ...) real.
        inner_lr: rate of the steps, at least 0; or a tensor for each name that adapts, of shape `()`, the
            parameter's (Meta-SGD), or with one leading dimension for the steps (MAML++: `(steps, 1, ...)`; steps
            beyond it keep the last). Gradients reach these tensors.
        steps: number of steps, at least 0; 0 returns the parameters as they are.
        order: 2 differentiates through the steps; 1 takes their gradients as constants (first-order MAML).
        params: where to begin; the network's own parameters where it says nothing.
        adapt: names of the parameters that adapt, all others stay (ANIL: the head's); None is all that require
            a gradient.
        loss_fn: `(outputs, labels) -> scalar`; None is `default_loss`. Where `checkpoint` is on it has no
            parameters of its own.
        checkpoint: keep only the parameters of each step and make its graph again in the backward pass, so that
            memory stays nearly flat in `steps`; costs a third to a half more time. The outcome can be
            differentiated once. Of no use, and ignored, with `order=1`.

    Returns:
        All of the network's parameters by name.

    Raises:
        ValueError: when an argument is outside its range, names or shapes do not fit, the network keeps running
            statistics, or inference mode is on.

    Paper:
        Model-Agnostic Meta-Learning, arXiv:1703.03400; Meta-SGD, arXiv:1707.09835; MAML++, arXiv:1810.09502;
        ANIL, arXiv:1909.09157.

    Example:
        >>> network, x, y = nn.Linear(2, 3), torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> adapted = inner_adapt(network, (x, y), inner_lr=0.1, steps=5)
        >>> logits = torch.func.functional_call(network, adapted, (x,))
    """
    check_numbers(inner_lr, steps, order)
    check_pair(*support, dimensions=1)
    own = dict(network.named_parameters())
    names = adapting(own, adapt)
    check_rates(own, names, inner_lr)
    check_normalization(network)
    grad = torch.is_grad_enabled()
    how = Steps(network, loss_fn or default_loss, names, inner_lr, steps, order, checkpoint, detach=not grad)
    now = start = all_parameters(own, params)
    if steps == 0:
        return start
    x, y = support
    with torch.enable_grad(), torch.autocast(**autocast_state(x.device)):
        for now in how.trajectory(start, x, y):  # noqa: B007
            pass
    return now if grad else {name: value.detach() for name, value in now.items()}


@never_compiled
def adapted_outputs(
    network: nn.Module,
    support: tuple[Tensor, Tensor],
    query: Tensor,
    *,
    inner_lr: float | Mapping[str, Tensor],
    after: Sequence[int] = (1,),
    order: int = 2,
    adapt: Iterable[str] | None = None,
    loss_fn: Loss | None = None,
    checkpoint: bool = False,
    tasks: Literal["auto", "vmap", "loop"] = "auto",
) -> Tensor:
    """Adapt to many tasks, each from the network's own parameters, and return the outputs of their query sets.

    A meta-training loss is the loss of these outputs: after the last step alone, or after every step, weighted
    (`multi_step_weights`). Under `torch.no_grad` the outputs are the same, without a graph.

    Args:
        network: as for `inner_adapt`.
        support: inputs (T, N, ...) and labels (T, N) int64 or (T, N, ...) real of T tasks.
        query: inputs (T, M, ...).
        inner_lr: as for `inner_adapt`.
        after: the numbers of steps, each at least 0 and rising, after which outputs are wanted; the last is the
            number of steps.
        order: as for `inner_adapt`.
        adapt: as for `inner_adapt`.
        loss_fn: of one task, as for `inner_adapt`.
        checkpoint: as for `inner_adapt`; the graphs of the query sets are kept.
        tasks: `vmap` takes all tasks at once, 5 to 10 times faster for small networks on a GPU and for small fully
            connected ones anywhere; `loop` one after the other, faster for convolutions on a CPU; `auto` takes vmap
            for networks of torch's own layers without recurrence, on a CPU also without convolutions. Both give the
            same, but for dropout's random numbers.

    Returns:
        Outputs (S, T, M, ...), S = `len(after)`.

    Raises:
        ValueError: as `inner_adapt`, and when `after` is not rising or shapes do not fit.

    Example:
        >>> x, y = torch.randn(4, 6, 2), torch.tensor([[0, 1, 2, 0, 1, 2]] * 4)
        >>> adapted_outputs(nn.Linear(2, 3), (x, y), x, inner_lr=0.1, after=(0, 5)).shape
        torch.Size([2, 4, 6, 3])
    """
    x, y = support
    if not after or list(after) != sorted(set(after)):
        raise ValueError(f"after is {tuple(after)}; expected rising numbers of steps, at least one")
    check_numbers(inner_lr, min(after), order)
    check_pair(x, y, dimensions=2)
    if query.dim() < 2 or len(query) != len(x):
        raise ValueError(f"query has the shape {tuple(query.shape)}; expected (T, M, ...) of {len(x)} tasks")
    own: Parameters = dict(network.named_parameters())
    names = adapting(own, adapt)
    check_rates(own, names, inner_lr)
    check_normalization(network)
    many = all_at_once(network, tasks, len(x), x.device.type)
    grad = torch.is_grad_enabled()
    how = Steps(network, loss_fn or default_loss, names, inner_lr, after[-1], order, checkpoint, many, not grad)
    with torch.enable_grad(), torch.autocast(**autocast_state(x.device)):
        if many:
            own |= {name: own[name].expand(len(x), *own[name].shape) for name in names}
            return _query_outputs(how, own, x, y, query, after)
        each = [_query_outputs(how, own, *task, after) for task in zip(x, y, query, strict=True)]
        return torch.stack(each, dim=1)


def _query_outputs(how: Steps, start: Parameters, x: Tensor, y: Tensor, query: Tensor, after: Sequence[int]) -> Tensor:
    found = []
    for step, now in enumerate(how.trajectory(start, x, y)):
        if step in after:
            outputs = how.outputs(now, query)
            found.append(outputs.detach() if how.detach else outputs)
    return torch.stack(found)


def multi_step_weights(steps: int, progress: float) -> Tensor:
    """Return the weights of the query losses after each inner step, as MAML++ anneals them.

    All are equal at first; those of the earlier steps fall linearly to 3% of that, and the last takes the rest.

    Args:
        steps: number of inner steps, at least 1.
        progress: share of the annealing that is done, in [0, 1].

    Returns:
        (steps,), with the sum 1.

    Raises:
        ValueError: when an argument is outside its range.

    Paper:
        How to train your MAML, arXiv:1810.09502.

    Example:
        >>> multi_step_weights(4, 0.0)
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; expected a share in [0, 1]")
    early = max(1.0 - progress, 0.03) / steps
    return torch.tensor([early] * (steps - 1) + [1.0 - early * (steps - 1)])


def use_batch_statistics(network: nn.Module) -> nn.Module:
    """Make normalization layers use the statistics of each batch always, and keep none; changes the network.

    This is the paper's setting (transductive: a query sample's outcome depends on the others of its set). Layers
    that normalise each sample (GroupNorm, LayerNorm) are better where queries come one by one.

    Args:
        network: the module whose BatchNorm and InstanceNorm layers lose their running statistics.

    Returns:
        The same network.

    Example:
        >>> use_batch_statistics(nn.BatchNorm1d(4)).running_mean is None
        True
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return network
