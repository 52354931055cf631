"""Callbacks for any LightningModule."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .layer_lr import DynamicLayerLR as DynamicLayerLR

__all__ = ["DynamicLayerLR"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DynamicLayerLR": ".layer_lr",
    },
)
