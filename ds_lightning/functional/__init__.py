"""Pure functions on tensors; they import torch alone."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .batch import as_batch as as_batch
    from .batch import input_of as input_of
    from .gradient_statistics import layer_gradient_moments as layer_gradient_moments
    from .mixing import cutmix as cutmix
    from .mixing import mixup as mixup

__all__ = ["as_batch", "cutmix", "input_of", "layer_gradient_moments", "mixup"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "as_batch": ".batch",
        "cutmix": ".mixing",
        "input_of": ".batch",
        "layer_gradient_moments": ".gradient_statistics",
        "mixup": ".mixing",
    },
)
