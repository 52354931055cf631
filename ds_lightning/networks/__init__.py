"""Networks as plain nn.Modules."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .by_name import backbone as backbone
    from .residual import ResNet as ResNet
    from .residual import resnet as resnet

__all__ = ["ResNet", "backbone", "resnet"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ResNet": ".residual",
        "backbone": ".by_name",
        "resnet": ".residual",
    },
)
