"""Residual networks for small images (28 to 64 pixels) and for ImageNet-sized ones."""

from collections.abc import Callable

from torch import Tensor, nn

# depth -> blocks a stage, and whether the block is the three-convolution bottleneck
_IMAGENET_STAGES: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
_SMALL_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
DEPTHS = tuple(sorted([*_SMALL_DEPTHS, *_IMAGENET_STAGES]))

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Return a GroupNorm of 8 groups, or of the most that divide the channels."""
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


_NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": group_norm}


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class _Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels at its end."""

    def __init__(self, inputs: int, channels: int, stride: int, bottleneck: bool, norm: Norm) -> None:
        super().__init__()
        outputs = channels * 4 if bottleneck else channels
        if bottleneck:
            plan = [(inputs, channels, 1, 1), (channels, channels, 3, stride), (channels, outputs, 1, 1)]
        else:
            plan = [(inputs, channels, 3, stride), (channels, outputs, 3, 1)]
        layers: list[nn.Module] = []
        for fan_in, fan_out, size, step in plan:
            layers += [_conv(fan_in, fan_out, size, step), norm(fan_out), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))
        self.activation = nn.ReLU(inplace=True)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A residual network with a linear classifier; build it with `resnet`.

    Attributes:
        features: image (B, C, H, W) -> pooled features (B, num_features).
        head: linear layer to the classes, or the identity when `num_classes` is 0.
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        *,
        bottleneck: bool,
        small_input: bool,
        in_channels: int,
        num_classes: int,
        width: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        if small_input:
            layers: list[nn.Module] = [_conv(in_channels, width, 3), norm(width), nn.ReLU(inplace=True)]
        else:
            layers = [
                _conv(in_channels, width, 7, 2),
                norm(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, 2, 1),
            ]
        channels = width
        for stage, blocks in enumerate(stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                unit = _Block(channels, width * 2**stage, stride, bottleneck, norm)
                layers.append(unit)
                channels = unit.outputs
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.num_features = channels
        self.head: nn.Module = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def resnet(
    depth: int,
    small_input: bool = True,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int | None = None,
    norm: str = "batch",
) -> ResNet:
    """Build a residual network.

    Args:
        depth: 8, 14, 20, 26, 32, 44, 56 or 110: three stages of basic blocks, the paper's networks for
            CIFAR; 18, 34 (basic blocks), 50 or 101 (bottlenecks): four stages, those for ImageNet.
        small_input: keep the resolution in the stem (3x3, stride 1), for images up to about 64 pixels;
            otherwise 7x7 with stride 2 and a max-pool.
        in_channels: channels of the images, at least 1.
        num_classes: outputs; 0 gives pooled features.
        width: channels of the first stage; the paper's 16 (three stages) or 64 (four) when None.
        norm: `batch` or `group` (groups of 8; independent of the batch, for few-shot or tiny batches).

    Raises:
        ValueError: when an argument is outside its range.

    Paper:
        Deep Residual Learning for Image Recognition, arXiv:1512.03385.

    Example:
        >>> resnet(8, in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth is {depth}; expected one of {', '.join(map(str, DEPTHS))}")
    if norm not in _NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(_NORMS)}")
    for name, value, least in (("in_channels", in_channels, 1), ("num_classes", num_classes, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    if depth in _IMAGENET_STAGES:
        stages, bottleneck = _IMAGENET_STAGES[depth]
        default_width = 64
    else:
        stages, bottleneck, default_width = ((depth - 2) // 6,) * 3, False, 16
    width = default_width if width is None else width
    if width < 1:
        raise ValueError(f"width is {width}; expected at least 1")
    return ResNet(
        stages,
        bottleneck=bottleneck,
        small_input=small_input,
        in_channels=in_channels,
        num_classes=num_classes,
        width=width,
        norm=_NORMS[norm],
    )
