"""The two networks of the few-shot papers: four convolutions for small images, and a perceptron for curves."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from ds_lightning.networks.residual import group_norm

_LAYERS = 4


_NORMS: dict[str | None, Callable[[int], nn.Module]] = {
    "group": group_norm,
    "batch": nn.BatchNorm2d,
    # Over channels and pixels of one image.
    "layer": lambda channels: nn.GroupNorm(1, channels),
    None: lambda channels: nn.Identity(),
}


class Conv4(nn.Module):
    """Four blocks of convolution, norm, ReLU and halving, then a linear head; build it with `conv4`.

    Attributes:
        features: image (B, C, H, W) -> features (B, num_features).
        head: linear layer to the classes, or the identity when `num_classes` is 0.
    """

    def __init__(
        self, in_channels: int, num_classes: int, width: int, norm: str | None, stride: bool, side: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (in_channels, *[width] * (_LAYERS - 1)):
            # Nothing in place: the inputs are needed again for second derivatives.
            layers += [nn.Conv2d(inputs, width, 3, 2 if stride else 1, padding=1), _NORMS[norm](width), nn.ReLU()]
            if not stride:
                layers.append(nn.MaxPool2d(2))
        if stride:
            layers.append(nn.AdaptiveAvgPool2d(1))
        layers.append(nn.Flatten())
        self.features = nn.Sequential(*layers)
        self.num_features = width * side**2
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def conv4(
    num_classes: int = 5,
    in_channels: int = 3,
    image_size: int | None = None,
    *,
    width: int = 64,
    norm: str | None = "group",
    stride: bool = False,
) -> Conv4:
    """Build the four-block network of the few-shot papers.

    Args:
        num_classes: outputs; 0 gives the features.
        in_channels: channels of the images, at least 1.
        image_size: height and width in pixels, at least 16; with `stride` it may be None.
        width: channels of each block, at least 1; the papers' 64 (32 for MAML on miniImageNet).
        norm: `group` (groups of 8), `layer`, both independent of the other images; `batch`, the papers'; or None.
        stride: halve by strided convolutions and average what is left, as MAML does for Omniglot, instead of
            max-pooling and flattening.

    Raises:
        ValueError: when an argument is outside its range.

    Paper:
        Matching Networks, arXiv:1606.04080; MAML, arXiv:1703.03400.

    Example:
        >>> import torch
        >>> conv4(5, in_channels=1, image_size=28)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 5])
    """
    if norm not in _NORMS:
        raise ValueError(f"norm is {norm!r}; expected group, layer, batch or None")
    for name, value, least in (("num_classes", num_classes, 0), ("in_channels", in_channels, 1), ("width", width, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    if stride:
        return Conv4(in_channels, num_classes, width, norm, stride, side=1)
    if image_size is None or image_size < 2**_LAYERS:
        raise ValueError(f"image_size is {image_size}; expected at least {2**_LAYERS}, as conv4 halves it 4 times")
    return Conv4(in_channels, num_classes, width, norm, stride, side=image_size // 2**_LAYERS)


def mlp(in_features: int, out_features: int, hidden: Sequence[int] = (40, 40)) -> nn.Sequential:
    """Build a perceptron with ReLU; by default the sinusoid network of MAML.

    Args:
        in_features: inputs, at least 1.
        out_features: outputs, at least 1.
        hidden: widths of the hidden layers, at least 1 each; may be empty.

    Returns:
        Maps (..., in_features) to (..., out_features); the last layer is named `head`.

    Raises:
        ValueError: when a size is below 1.

    Paper:
        MAML, arXiv:1703.03400, section 5.1.

    Example:
        >>> import torch
        >>> mlp(1, 1)(torch.zeros(3, 1)).shape
        torch.Size([3, 1])
    """
    sizes = [in_features, *hidden, out_features]
    if min(sizes) < 1:
        raise ValueError(f"the layers have the sizes {sizes}; expected at least 1 each")
    network = nn.Sequential()
    for number, (inputs, outputs) in enumerate(pairwise(sizes[:-1])):
        network.add_module(f"hidden{number}", nn.Linear(inputs, outputs))
        network.add_module(f"relu{number}", nn.ReLU())
    network.add_module("head", nn.Linear(sizes[-2], out_features))
    return network
