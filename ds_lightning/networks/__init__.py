"""Networks as plain nn.Modules."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .backbone import backbone as backbone
    from .resnet import ResNet as ResNet
    from .resnet import resnet as resnet

__all__ = ["ResNet", "backbone", "resnet"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ResNet": ".resnet",
        "backbone": ".backbone",
        "resnet": ".resnet",
    },
)
