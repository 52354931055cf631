"""Networks as plain nn.Modules."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .by_name import backbone as backbone
    from .few_shot_networks import Conv4 as Conv4
    from .few_shot_networks import conv4 as conv4
    from .few_shot_networks import mlp as mlp
    from .residual import ResNet as ResNet
    from .residual import resnet as resnet
    from .text_encoder import TextEncoder as TextEncoder

__all__ = ["Conv4", "ResNet", "TextEncoder", "backbone", "conv4", "mlp", "resnet"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Conv4": ".few_shot_networks",
        "ResNet": ".residual",
        "TextEncoder": ".text_encoder",
        "backbone": ".by_name",
        "conv4": ".few_shot_networks",
        "mlp": ".few_shot_networks",
        "resnet": ".residual",
    },
)
