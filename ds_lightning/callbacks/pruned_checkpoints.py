"""Any LightningModule from a checkpoint whose network has lost channels."""

import io
import warnings
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from ds_lightning.checkpoint_check import check_loadable
from ds_lightning.networks.pruning_plan import apply_plan, plan_in

Module = TypeVar("Module", bound=pl.LightningModule)


def load_pruned(module_class: type[Module], checkpoint_path: str | Path, strict: bool = True, **options: Any) -> Module:
    """Load a module from a checkpoint of `ProgressivePruning`, as `load_from_checkpoint` does for an unpruned one.

    Modules of ds_lightning need it not. Another module does without when it says in its own `on_load_checkpoint`:
    `if plan := plan_in(checkpoint): apply_plan(self, plan)` (both from `ds_lightning.networks.pruning_plan`).

    Args:
        module_class: whose `__init__` or `configure_model` builds the unpruned network; its `on_load_checkpoint` sees
            a checkpoint without weights.
        checkpoint_path: a file of tensors and plain Python; also one that was saved before any removal.
        strict: whether the names of the weights must be the module's.
        **options: of `__init__`, in place of the saved hyperparameters.

    Returns:
        The module, on the CPU, in train mode as Lightning's.

    Raises:
        ConfigError: the plan does not fit the module.
        DataError: the file is torn, holds pickled classes, or is no checkpoint.

    Example:
        >>> module = load_pruned(MyModule, "last.ckpt")  # doctest: +SKIP
    """
    check_loadable(checkpoint_path, trusted=False)
    checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    # Lightning makes the module, hyperparameters and all, and loads none of the weights, which do not fit yet.
    bare = {**checkpoint, "state_dict": {}, "optimizer_states": []}
    file = io.BytesIO()
    torch.save(bare, file)
    file.seek(0)
    with warnings.catch_warnings():
        # They come below.
        warnings.filterwarnings("ignore", message="(?s)Found keys that are in the model|.*contains no parameters")
        module = module_class.load_from_checkpoint(file, strict=False, **options)
    if plan := plan_in(checkpoint):
        apply_plan(module, plan)
    module.load_state_dict(weights, strict=strict)
    return module
