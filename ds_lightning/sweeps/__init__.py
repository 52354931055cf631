"""Optuna sweeps from a YAML search space, logged to MLflow."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .space import SearchSpace as SearchSpace
    from .sweep import Sweep as Sweep

__all__ = ["SearchSpace", "Sweep"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SearchSpace": ".space",
        "Sweep": ".sweep",
    },
)
