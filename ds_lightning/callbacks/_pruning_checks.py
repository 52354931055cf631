"""What progressive pruning can't work with, and the example inputs that it traces, before a weight is touched."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_leaves, tree_map

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import as_batch, input_of

from ._eval_mode import eval_mode
from ._optimizer_slices import check_optimizers
from ._strategies import SHARDED

_SAMPLES = 2
_CHOICES = {
    "measure": ("macs", "params", "latency"),
    "schedule": ("cubic", "linear", "one-shot"),
    "importance": ("magnitude", "taylor", "bn_scale", "random"),
    "scope": ("global", "layer"),
}
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def check_arguments(
    target: float,
    choices: Mapping[str, str],
    start: int | float,
    end: int | float,
    every: int | None,
    counts: Mapping[str, int],
    sparsity: float,
    exclude: Any,
    report_batches: int,
) -> None:
    """Check the constructor's arguments.

    Raises:
        ConfigError: names the argument, the range and the value.
    """
    for name, number in (("target", target), ("start", start), ("end", end), ("sparsity", sparsity)):
        if not isinstance(number, int | float):
            raise ConfigError(f"{name} is {number!r}; expected a number")
    whole = {**counts, "report_batches": report_batches, **({} if every is None else {"every": every})}
    for name, number in whole.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(f"{name} is {number!r}; expected a whole number")
    if not 0 < target < 1:
        raise ConfigError(f"target is {target}; expected the share to keep, a number in (0, 1)")
    for name, value in choices.items():
        if value not in _CHOICES[name]:
            raise ConfigError(f"{name} is {value!r}; expected {' or '.join(map(repr, _CHOICES[name]))}")
    for name, at in (("start", start), ("end", end)):
        if isinstance(at, bool) or at < 0 or (isinstance(at, float) and not at <= 1):
            raise ConfigError(
                f"{name} is {at}; expected a share of the fit's steps (float in [0, 1]) or an optimizer step (int >= 0)"
            )
    if choices["schedule"] != "one-shot" and isinstance(start, float) is isinstance(end, float) and end <= start:
        raise ConfigError(f"end is {end} and start is {start}; expected end after start")
    if every is not None and every < 1:
        raise ConfigError(f"every is {every}; expected a number of optimizer steps >= 1, or None for 8 removals")
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}; expected a number of channels >= 1")
    if not 0 <= sparsity < math.inf:
        raise ConfigError(f"sparsity is {sparsity}; expected a number >= 0, where 0 is off")
    if isinstance(exclude, str):
        raise ConfigError(f"exclude is the string {exclude!r}; expected a list, [{exclude!r}]")
    if report_batches < 0:
        raise ConfigError(f"report_batches is {report_batches}; expected a number of batches >= 0, where 0 is off")


def check_alone(trainer: pl.Trainer, kind: type[pl.Callback]) -> None:
    """Refuse a second pruning callback.

    Raises:
        ConfigError: the Trainer has more than one.
    """
    count = sum(isinstance(callback, kind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if count > 1:
        raise ConfigError(
            f"this Trainer has {count} ProgressivePruning, which would share one state and cut into each other's "
            "network; expected one for all of it, with exclude for what stays, or one fit after the other"
        )


def check_fit(trainer: pl.Trainer, module: pl.LightningModule, path: str | None) -> None:
    """Check the strategy, the Trainer, the optimizers and the module at the start of a fit.

    Raises:
        ConfigError: says what can't work.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SHARDED):
        raise ConfigError(
            f"ProgressivePruning can't work with {type(strategy).__name__}, which gives each rank parts of a "
            "parameter; expected a strategy with whole parameters, such as ddp"
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            "ProgressivePruning can't work with processes that are spawned or forked from this one (ddp_spawn, "
            "ddp_fork, ddp_notebook): the smaller network would not get back; expected strategy='ddp' in a script"
        )
    if isinstance(strategy, DDPStrategy) and strategy._ddp_comm_state is not None:
        raise ConfigError(
            f"ProgressivePruning can't work with a DDP communication state ({type(strategy._ddp_comm_state).__name__}),"
            " which holds tensors of the parameters' sizes; remove ddp_comm_state from the strategy"
        )
    compiled = [name or "the module" for name, part in module.named_modules() if _is_compiled(part)]
    if compiled or module._compiler_ctx is not None:
        raise ConfigError(
            f"{compiled[0] if compiled else type(module).__name__} is compiled, and a compiled network can't lose "
            "channels; train without torch.compile, and compile the pruned network"
        )
    limit = trainer.limit_train_batches
    if 0 in (trainer.max_epochs, trainer.max_steps, limit):
        raise ConfigError("this Trainer makes no step, so nothing could be removed; expected max_epochs >= 1 and data")
    if not is_overridden("on_save_checkpoint", module):
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise ConfigError(
                    "ModelCheckpoint(save_weights_only=True) leaves the pruning plan out, without which the weights "
                    f"fit no network; set it to False, or call save_plan(checkpoint, self) in on_save_checkpoint of "
                    f"{type(module).__name__}"
                )
    check_optimizers(trainer.optimizers)
    network_at(module, path)


def _is_compiled(part: nn.Module) -> bool:
    return isinstance(part, OptimizedModule) or part._compiled_call_impl is not None


def network_at(module: nn.Module, path: str | None) -> nn.Module:
    """Return the submodule at a path, or the module itself.

    Raises:
        ConfigError: there is none.
    """
    try:
        return module.get_submodule(path or "")
    except AttributeError:
        known = ", ".join(name for name, _ in module.named_children())
        raise ConfigError(
            f"network is {path!r}, and {type(module).__name__} has no such submodule; expected the path of one, which "
            f"begins with {known}"
        ) from None


def example_inputs(module: pl.LightningModule, path: str | None, batch: Any) -> Inputs:
    """Return what the network is called with for two samples; nothing of the module changes.

    Args:
        module: called with the one input of the batch, or else with its `example_input_array`.
        path: of the submodule whose inputs are wanted, None for the module's own.
        batch: as it comes from the loader, on the device.

    Returns:
        Positional and keyword arguments.

    Raises:
        ConfigError: the module can be called with neither; or it does not call the submodule.
    """
    reasons: list[str] = []
    for args, kwargs in _candidates(module, batch, reasons):
        seen: list[Inputs] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[Inputs] = seen) -> None:
            seen.append(tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs)))

        handle = network_at(module, path).register_forward_pre_hook(note, with_kwargs=True)
        try:
            with isolate_rng(include_cuda=module.device.type == "cuda"), eval_mode(module), torch.no_grad():
                module(*args, **kwargs)
        except Exception as error:  # a user's forward may raise anything
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        finally:
            handle.remove()
        if not seen:
            raise ConfigError(f"{type(module).__name__}.forward does not call {path}; expected a network that it calls")
        return seen[0]
    raise ConfigError(
        f"ProgressivePruning can't call {type(module).__name__} to see how its channels hang together "
        f"({'; '.join(reasons)}); expected a forward that takes the one input of a batch, or example_input_array"
    )


def _candidates(module: pl.LightningModule, batch: Any, reasons: list[str]) -> list[Inputs]:
    found: list[Inputs] = []
    try:
        found.append(((input_of(as_batch(batch))[:_SAMPLES],), {}))
    except (TypeError, ValueError) as error:
        reasons.append(str(error))
    example: Any = module.example_input_array
    if example is not None:
        example = tree_map(lambda x: x.to(module.device) if isinstance(x, Tensor) else x, example)
        if isinstance(example, dict):
            found.append(((), example))
        else:
            found.append((tuple(example) if isinstance(example, Sequence) else (example,), {}))
    return found


def samples_in(inputs: Inputs) -> int:
    """Return the batch size of example inputs."""
    return next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def one_sample(inputs: Inputs) -> Inputs:
    """Return the first sample of example inputs."""
    count = samples_in(inputs)

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, Tensor) and x.ndim and len(x) == count else x

    args, kwargs = tree_map(first, inputs)
    return args, kwargs
