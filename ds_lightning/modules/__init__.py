"""A LightningModule for each training mode."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .classifier import Classifier as Classifier

__all__ = ["Classifier"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Classifier": ".classifier",
    },
)
