"""A copy of a network on the CPU, with random weights, on which everything about removing channels is tried."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ds_lightning.errors import ConfigError

_SEED = 20250


def shadow_of(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, float32 on the CPU, without hooks; the network is only read."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        # A hook is often a method of a callback: copying it would copy the trainer.
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(on_cpu(parameter), requires_grad=parameter.is_floating_point())
    for buffer in network.buffers():
        memo[id(buffer)] = on_cpu(buffer)
    try:
        shadow = _copied(network, memo)
    except Exception as error:
        raise ConfigError(
            f"{type(network).__name__} can't be copied ({short(error)}); channels are removed on a copy first: "
            "expected a network that copy.deepcopy takes"
        ) from error
    shadow.eval()
    _randomize(shadow)
    return shadow


def same_tensors(network: nn.Module) -> nn.Module:
    """Return a copy with modules of its own that holds the very same tensors: for a plan, which replaces them."""
    tensors = [*network.parameters(), *network.buffers()]
    return _copied(network, {id(tensor): tensor for tensor in tensors})


def _copied(network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy deeply, but share what can't be copied: a command line's optimizer, a generator, a lock."""
    try:
        return copy.deepcopy(network, dict(memo))
    except Exception:
        shared: dict[int, Any] = {}
        for module in network.modules():
            # Not vars: a LightningModule leaves its Trainer out here.
            state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
            for name, value in state.items():
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    shared[id(value)] = value
        if not shared:
            raise
        return copy.deepcopy(network, memo | shared)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return an own copy on the CPU, floats as float32."""
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", kind, copy=True)


def example_on_cpu(example: Any) -> Any:
    """Return the example inputs with every tensor copied to the CPU."""
    return pytree.tree_map(lambda leaf: on_cpu(leaf) if isinstance(leaf, Tensor) else leaf, example)


def _randomize(shadow: nn.Module) -> None:
    # Zero-initialised layers, or weights that are all alike, would hide a wrong removal.
    generator = torch.Generator().manual_seed(_SEED)
    buffers = [
        buffer
        for module in shadow.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
    ]
    with torch.no_grad():
        for tensor in [*shadow.parameters(), *buffers]:
            if not tensor.is_floating_point():
                continue
            if tensor.dim() < 2:
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                fan_in = max(tensor[0].numel(), 1)
                tensor.normal_(0.0, math.sqrt(2.0 / fan_in) if fan_in > 1 else 1.0, generator=generator)


@contextlib.contextmanager
def same_random_numbers(grad: bool) -> Iterator[None]:
    """Run forward passes of a shadow that draw the same random numbers each time, and leave the generator alone."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the accelerators too.
            torch.default_generator.manual_seed(_SEED)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output: a tensor, or tensors in tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of one forward pass."""
    with same_random_numbers(grad=False):
        args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return tensors_in(network(*args, **kwargs))


def short(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
