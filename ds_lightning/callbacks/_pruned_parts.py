"""Everything that hangs on a network's parameters, when channels leave it or a checkpoint of fewer is loaded."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from ds_lightning.errors import ConfigError
from ds_lightning.networks.pruning_plan import PruningPlan, apply_plan, plan_in, plan_of, with_all_names

from ._optimizer_slices import OptimizerSlices
from ._standing_still import StandingStill


def remove_channels(trainer: pl.Trainer, module: pl.LightningModule, plan: PruningPlan) -> StandingStill:
    """Apply a plan to the module, its optimizers, averages of its weights, DDP, and callbacks and module that ask.

    A module with parameters and buffers of its own that have the network's shapes, such as rates that are learned,
    adds them to the plan in `extend_pruning_plan(plan)`.

    Args:
        trainer: between two batches.
        module: whose names the plan has.
        plan: what is kept.

    Returns:
        The check of the next step.

    Raises:
        ConfigError: the plan does not fit the module or a state; nothing is touched.
    """
    plan = with_all_names(module, plan)
    extend: Callable[[PruningPlan], PruningPlan] | None = getattr(module, "extend_pruning_plan", None)
    plan = plan if extend is None else extend(plan)
    everything = dict(module.named_parameters(remove_duplicate=False))
    names = {parameter: name for name, parameter in everything.items() if name in plan.shapes}
    slices = OptimizerSlices(trainer.optimizers, names, plan)
    held = {}
    for optimizer in trainer.optimizers:
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        held[optimizer] = [name for name, parameter in module.named_parameters() if parameter in stepped]
    replaced = apply_plan(module, plan)
    slices.replace(replaced)
    for average in _averages(trainer):
        apply_plan(average, plan)
    for holder in (*trainer.callbacks, module):  # type: ignore[attr-defined]
        if hasattr(holder, "on_channels_removed"):
            holder.on_channels_removed(trainer, module, plan)
    _wrap_again(trainer, module)
    return StandingStill(held, {names[old]: old for old in replaced if old in names})


def prune_when_loaded(trainer: pl.Trainer, module: pl.LightningModule) -> RemovableHandle:
    """Let the module lose the channels that a checkpoint lacks, just before Lightning loads its weights.

    Args:
        trainer: one that may be given a checkpoint.
        module: the unpruned one; its network may still be built in `configure_model`.

    Returns:
        The hook's handle, to be removed once the run has begun.
    """

    def before_loading(*_: Any) -> None:
        # Not the file: this is what Lightning has read, with the user's checkpoint plugin and weights_only.
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        if not checkpoint:
            return
        plan = plan_in(checkpoint)
        if plan is None:
            if plan_of(module) is not None:
                raise ConfigError(f"{_other_network(trainer)}: it was saved before any were removed; {_WHAT_TO_DO}")
            return
        try:
            for network in (module, *_averages(trainer)):
                apply_plan(network, plan)
        except ConfigError as error:
            raise ConfigError(f"{_other_network(trainer)}: {error}; {_WHAT_TO_DO}") from error

    handle: RemovableHandle = module.register_load_state_dict_pre_hook(before_loading)  # type: ignore[no-untyped-call]
    return handle


_WHAT_TO_DO = "expected a new module, which loses the channels as it is loaded, or a later checkpoint"


def _other_network(trainer: pl.Trainer) -> str:
    return f"checkpoint {trainer.ckpt_path} does not have the channels of this module"


def _averages(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """Yield the copies that Lightning's WeightAveraging and StochasticWeightAveraging keep."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def _wrap_again(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # Its buckets and hooks are those of the parameters from before.
        strategy.model = module
        strategy._pl_static_graph_delay_done = False
        strategy.configure_ddp()
