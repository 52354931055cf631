"""Callbacks for any LightningModule."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .durable_checkpoint import DurableCheckpoint as DurableCheckpoint
    from .exact_resume import ExactResume as ExactResume
    from .finite import FiniteGuard as FiniteGuard
    from .layer_lr import DynamicLayerLR as DynamicLayerLR
    from .preemption import Preemption as Preemption

__all__ = ["DurableCheckpoint", "DynamicLayerLR", "ExactResume", "FiniteGuard", "Preemption"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ExactResume": ".exact_resume",
        "DurableCheckpoint": ".durable_checkpoint",
        "DynamicLayerLR": ".layer_lr",
        "FiniteGuard": ".finite",
        "Preemption": ".preemption",
    },
)
