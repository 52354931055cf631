"""Any network by its name, with the right channels, image size and classes."""

import difflib
from typing import Any

from torch import nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks.few_shot_networks import conv4
from ds_lightning.networks.residual import DEPTHS, resnet
from ds_lightning.networks.text_encoder import TextEncoder

_OURS = {f"resnet{depth}": depth for depth in DEPTHS}
#: Names of networks of token ids, which have no channels, and the options that the name stands for.
TEXT_NETWORKS: dict[str, dict[str, Any]] = {"text": {}, "bag": {"depth": 0}}


def backbone(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of ours (`resnet8` to `resnet110`, `conv4`; for texts `text`, a Transformer, and `bag`, the mean
            of the embeddings, both with the option `vocab_size`), `torchvision/NAME` or `timm/NAME` (needs the extra
            `timm`). A bare name that is not ours is looked up in torchvision, then in timm.
        num_classes: outputs, at least 1; 0 gives the features, except for torchvision's.
        in_channels: channels of the images; a torchvision network's first convolution is replaced to fit.
        image_size: height and width in pixels. Ours keep the resolution in the stem up to 64 pixels;
            vision transformers need it; convolutional networks of the others do not use it.
        **options: passed to the network's own builder (`width=32`, `weights=...`, `pretrained=True`).

    Raises:
        ConfigError: on an unknown name, or when a library is not installed.

    Example:
        >>> network = backbone("resnet14", num_classes=4, in_channels=1, image_size=28)
    """
    library, _, rest = name.rpartition("/")
    if library not in ("", "torchvision", "timm"):
        raise ConfigError(f"network {name!r}: {library!r} is not a library here; expected torchvision/ or timm/")
    if not library and name in _OURS:
        options.setdefault("small_input", image_size is None or image_size <= 64)
        return resnet(_OURS[name], in_channels=in_channels, num_classes=num_classes, **options)
    if name == "conv4":
        return conv4(num_classes, in_channels, image_size, **options)
    if not library and name in TEXT_NETWORKS:
        if "vocab_size" not in options:
            raise ConfigError(f"network {name!r} needs the option vocab_size, the number of token ids")
        return TextEncoder(num_classes=num_classes, **{**TEXT_NETWORKS[name], **options})
    if library in ("", "torchvision"):
        from torchvision.models import get_model_builder, list_models

        if rest in list_models():
            return _torchvision(get_model_builder(rest), num_classes, in_channels, image_size, options)
        known = [*_OURS, "conv4", *TEXT_NETWORKS, *list_models()]
    if library in ("", "timm"):
        try:
            import timm
        except ModuleNotFoundError as error:
            if library == "timm":
                raise ConfigError(
                    f"network {name!r} needs timm; install it with `pip install 'ds-lightning[timm]'`"
                ) from error
        else:
            if timm.is_model(rest):
                return _timm(timm.create_model, rest, num_classes, in_channels, image_size, options)
            known = [*(known if not library else []), *timm.list_models()]
    close = difflib.get_close_matches(rest, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; expected resnet8, torchvision/NAME or timm/NAME"
    raise ConfigError(f"network {name!r} is unknown{hint}")


def _torchvision(
    builder: Any, num_classes: int, in_channels: int, image_size: int | None, options: dict[str, Any]
) -> nn.Module:
    # Of torchvision's classes only the vision transformer has an image size.
    if builder.__name__.startswith("vit_") and image_size is not None:
        options = {"image_size": image_size, **options}
    network: nn.Module = builder(num_classes=num_classes, **options)
    _fit_first_convolution(network, in_channels)
    return network


def _fit_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Replace the convolution that takes the image when it has another number of input channels."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels == in_channels:
                return
            parent = network.get_submodule(name.rpartition(".")[0])
            fitted = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                dilation=module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            setattr(parent, name.rpartition(".")[2], fitted)
            return
    raise ConfigError(f"{type(network).__name__} has no convolution to take {in_channels} channels")


def _timm(
    create: Any,
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int | None,
    options: dict[str, Any],
) -> nn.Module:
    common = {"num_classes": num_classes, "in_chans": in_channels, **options}
    if image_size is not None and "img_size" not in options:
        try:
            network: nn.Module = create(name, img_size=image_size, **common)
            return network
        except TypeError as error:
            # Convolutional networks take any size and have no such argument.
            if "img_size" not in str(error):
                raise
    network = create(name, **common)
    return network
