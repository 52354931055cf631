"""The diagonal Fisher information: the mean over samples of the squared gradient of each sample's own loss.

Not the square of a mini-batch's mean gradient, which is smaller by about the batch size.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ._fisher_generic import LossOf, PerSampleLoss, accumulation_type, loop_squares, vmap_chunk, vmap_squares
from ._fisher_layers import closed_form_names, layer_squares

Method = Literal["auto", "layers", "vmap", "loop"]
METHODS = ("auto", "layers", "vmap", "loop")


class FisherSum(NamedTuple):
    """Squared per-sample gradients summed over samples: what ranks add up before they divide.

    Args:
        sums: parameter name to the sum of squares, shaped like the parameter; float32, or float64 for such a parameter.
        samples: number of samples, >= 1.
        methods: parameter name to the way it was computed: layers, vmap or loop.
    """

    sums: dict[str, Tensor]
    samples: int
    methods: dict[str, str]

    def mean(self) -> dict[str, Tensor]:
        """Return the diagonal Fisher information of each parameter."""
        with torch.inference_mode(False), torch.no_grad():
            return {name: value / self.samples for name, value in self.sums.items()}


def fisher_diagonal(
    module: nn.Module,
    batches: Iterable[Any],
    per_sample_loss: PerSampleLoss,
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    method: Method = "auto",
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Compute the exact diagonal Fisher information, `mean over samples of (d loss_b / d theta)^2`.

    Three ways give the same number. `layers` needs one backward pass a batch: the squares come from each layer's
    input and output gradient (Linear, Conv, BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm, Embedding), and
    no gradient of a single sample is kept. `vmap` keeps those of one chunk. `loop` takes one backward pass a sample.
    `auto` takes `layers` for every parameter that it can, `vmap` for the others (shared weights, bare parameters,
    attention's input projection), and `loop` where vmap fails (control flow that depends on data, recurrent layers).

    Nothing of the module changes: no `.grad`, no mode, no buffer. Works under `no_grad` and inference mode.

    Args:
        module: the module, in eval mode throughout, since dropout and batch statistics would change the loss.
        batches: each any nesting of dicts, lists and tuples of tensors, sample axis first, on the module's device.
        per_sample_loss: `(module, batch) -> (B,)`: the negative log-likelihood of each sample, which depends on that
            sample alone. For labels drawn from the model see `model_labels`.
        parameters: what to compute, any key to a parameter of the module; default: all that require a gradient,
            by name.
        method: auto, layers, vmap or loop.
        chunk_size: samples at a time, >= 1; a larger batch is cut. None: `layers` takes the batch as it comes (memory
            as of one training step), `vmap` so many samples that their gradients stay below 64 MiB, at most 32.

    Returns:
        Parameter key to a tensor shaped like the parameter; float32, or float64 for float64 parameters.

    Raises:
        ValueError: a wrong argument, a submodule in training mode, a BatchNorm without running statistics, a batch or
            loss of the wrong shape, no samples at all, or `method="layers"` for a parameter that it can't take.

    Paper: Kirkpatrick et al. 2017, arXiv 1612.00796; on the kinds of Fisher: Kunstner et al. 2019, arXiv 1905.12558.

    Example:
        >>> net = nn.Linear(2, 2, bias=False).eval()
        >>> batch = (torch.eye(2), torch.tensor([0, 1]))
        >>> nll = nn.CrossEntropyLoss(reduction="none")
        >>> fisher = fisher_diagonal(net, [batch], lambda m, b: nll(m(b[0]), b[1]))
        >>> fisher["weight"].shape
        torch.Size([2, 2])
    """
    return fisher_sums(
        module, batches, per_sample_loss, parameters=parameters, method=method, chunk_size=chunk_size
    ).mean()


def fisher_sums(
    module: nn.Module,
    batches: Iterable[Any],
    per_sample_loss: PerSampleLoss,
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    method: Method = "auto",
    chunk_size: int | None = None,
) -> FisherSum:
    """Sum the squared per-sample gradients: `fisher_diagonal` before its division, for ranks to add up.

    Args:
        module: as in `fisher_diagonal`.
        batches: as in `fisher_diagonal`.
        per_sample_loss: as in `fisher_diagonal`.
        parameters: as in `fisher_diagonal`.
        method: as in `fisher_diagonal`.
        chunk_size: as in `fisher_diagonal`.

    Returns:
        The sums, the number of samples, and the way each parameter was computed.

    Raises:
        ValueError: as in `fisher_diagonal`.

    Example:
        >>> net = nn.Linear(2, 1).eval()
        >>> fisher_sums(net, [torch.ones(3, 2)], lambda m, x: m(x).flatten()).samples
        3
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected a whole number >= 1, or None")
    _check_mode(module)
    names = _names(module, parameters)
    with _gradients_on():
        work = _Work(LossOf(module, per_sample_loss), names, method, chunk_size)
    for batch in batches:
        with _gradients_on(), _kept_parameters(module):
            # Tensors made in inference mode can't enter a graph; their copies can.
            own = tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, batch)
            work.add(own, _count(own))
    if work.samples == 0:
        raise ValueError("batches holds no samples; expected at least one")
    keys = list(names)
    return FisherSum(
        {key: work.sums[names[key]] for key in keys}, work.samples, {key: work.methods[names[key]] for key in keys}
    )


class _Work:
    """The running sums, and which way each parameter goes."""

    def __init__(self, loss: LossOf, names: Mapping[str, str], method: Method, chunk_size: int | None) -> None:
        own = dict(loss.module.named_parameters())
        self.loss, self.method, self.chunk_size = loss, method, chunk_size
        self.leaves = {name: own[name].detach() for name in names.values()}
        self.ids = {id(own[name]): name for name in names.values()}
        self.sums = {name: torch.zeros_like(v, dtype=accumulation_type(v)) for name, v in self.leaves.items()}
        self.samples = 0
        self.methods = dict.fromkeys(self.leaves, "loop" if method == "loop" else "vmap")
        self.generic = "loop" if method == "loop" else "vmap"
        self.closed: set[str] | None = None if method in ("auto", "layers") else set()

    def add(self, batch: Any, samples: int) -> None:
        if self.closed is None and samples:
            self.closed = closed_form_names(self.loss, batch, samples, self.ids)
        size = self.chunk_size or max(1, samples)
        for start in range(0, samples, size):
            count = min(size, samples - start)
            part = batch if count == samples else tree_map(lambda x, s=start: x[s : s + size], batch)
            self._add_chunk(part, count)

    def _add_chunk(self, batch: Any, samples: int) -> None:
        found: dict[str, Tensor] = {}
        if self.closed:
            leaves = {name: leaf for name, leaf in self.leaves.items() if name in self.closed}
            found = layer_squares(self.loss, batch, samples, leaves, self.ids)
            self.closed &= found.keys()  # what fails once is not tried again
        rest = {name: leaf for name, leaf in self.leaves.items() if name not in found}
        if rest and self.method == "layers":
            raise ValueError(
                f"method='layers' can't take {', '.join(rest)}: shared between calls, used outside a known layer, or "
                "the sample axis is not the first; expected a parameter of one such layer: use method='auto'"
            )
        self.methods.update(dict.fromkeys(found, "layers"))
        if rest:
            generic = self._generic_squares(batch, samples, rest)
            self.methods.update(dict.fromkeys(rest, self.generic))
            found = {**found, **generic}
        for name, value in found.items():
            self.sums[name].add_(value)
        self.samples += samples

    def _generic_squares(self, batch: Any, samples: int, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.generic == "vmap":
            try:
                return vmap_squares(self.loss, batch, samples, leaves, self.chunk_size or vmap_chunk(leaves))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if self.method == "vmap":
                    raise
                self.generic = "loop"  # an error of the module's own comes again there
        return loop_squares(self.loss, batch, samples, leaves)


def _check_mode(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if layer.training:
            raise ValueError(
                f"{name or 'the module'} ({type(layer).__name__}) is in training mode, where dropout and batch "
                "statistics change the loss of a sample; expected eval mode: call module.eval() first"
            )
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise ValueError(
                f"{name} ({type(layer).__name__}) has no running statistics, so it mixes the samples of a batch and "
                "no sample has a loss of its own; expected track_running_stats=True, or another normalisation"
            )


def _names(module: nn.Module, parameters: Mapping[str, nn.Parameter] | None) -> dict[str, str]:
    """Return the caller's keys with the module's name of each parameter."""
    if parameters is None:
        names = {name: name for name, p in module.named_parameters() if p.requires_grad}
        if not names:
            raise ValueError("module has no parameter that requires a gradient; expected at least one")
        return names
    own = {id(p): name for name, p in module.named_parameters()}
    foreign = [key for key, p in parameters.items() if id(p) not in own]
    if foreign or not parameters:
        raise ValueError(f"parameters has {foreign or 'no entry'}; expected parameters of the module itself")
    return {key: own[id(p)] for key, p in parameters.items()}


def _count(batch: Any) -> int:
    """Return the number of samples in a batch."""
    leaves = tree_leaves(batch)
    wrong = next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor) or leaf.ndim == 0), None)
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if wrong is not None or len(sizes) != 1:
        got = f"a {wrong} without a sample axis" if wrong else f"sizes {sorted(sizes)} along the first axis"
        raise ValueError(f"the batch has {got}; expected tensors only, all with the samples along the first axis")
    return sizes.pop()


@contextmanager
def _kept_parameters(module: nn.Module) -> Iterator[None]:
    """Put the parameters back: torch's functional_call leaves its own tensor in a layer that has two names."""
    owned = [(part, name, p) for part in module.modules() for name, p in part._parameters.items()]
    try:
        yield
    finally:
        for part, name, p in owned:
            part._parameters[name] = p


@contextmanager
def _gradients_on() -> Iterator[None]:
    """Allow graphs whatever the caller's mode; without the fused attention, which calls no layer's forward."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
