"""Any encoder as one that gives tokens, and the default one of each modality."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import MODALITIES
from ds_lightning.networks._positions import grid_positions
from ds_lightning.networks._time_convolutions import check_mask
from ds_lightning.networks.audio_encoder import AudioEncoder
from ds_lightning.networks.by_name import TEXT_NETWORKS, backbone
from ds_lightning.networks.residual import DEPTHS, ResNet
from ds_lightning.networks.series_encoder import SeriesEncoder
from ds_lightning.networks.table_encoder import TableEncoder
from ds_lightning.networks.text_encoder import PADDING, TextEncoder

_OUR_IMAGES = [f"resnet{depth}" for depth in DEPTHS]


class ImageTokens(nn.Module):
    """The last feature map of an image network, each place a token.

    Args:
        network: `resnet8` to `resnet110`, or `timm/NAME`; or such a network, built with `num_classes=0`: the head is
            not used. Ours get `norm="group"` unless the options say otherwise: `batch`, and the norms of most
            pretrained networks, let the images of a batch see each other in training, absent ones too.
        in_channels: channels of the images, for a network by name.
        image_size: height and width in pixels, for a network by name; vision transformers need it.
        **options: of a network by name, as for `backbone`.

    Attributes:
        num_features: channels of the feature map.

    Raises:
        ConfigError: when the network is unknown or has no feature map; in `forward`, ValueError when its feature map
            has another form than (B, num_features, H, W), (B, H, W, num_features) or (B, N, num_features).

    Example:
        >>> import torch
        >>> tokens, mask = ImageTokens("resnet8", in_channels=1)(torch.zeros(2, 1, 28, 28))
        >>> tokens.shape
        torch.Size([2, 49, 64])
    """

    def __init__(
        self,
        network: str | nn.Module = "resnet8",
        in_channels: int = 3,
        image_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name = network if isinstance(network, str) else type(network).__name__
        if isinstance(network, str):
            if network in _OUR_IMAGES:
                options.setdefault("norm", "group")
            network = backbone(network, num_classes=0, in_channels=in_channels, image_size=image_size, **options)
        elif options:
            raise ConfigError(f"options {sorted(options)} are for a network by name, and {name} is built already")
        if isinstance(network, ResNet):
            # Without the pooling and the flattening.
            self.features: nn.Module = network.features[:-2]
        elif hasattr(network, "forward_features"):
            self.features = network
        else:
            raise ConfigError(
                f"image network {name!r} gives no feature map; expected resnet8 to resnet110 or timm/NAME"
            )
        self.num_features = int(network.num_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map images (B, C, H, W) to tokens (B, N, num_features); there is no mask."""
        if mask is not None:
            raise ValueError("image has a mask; expected none: an image has no padding")
        # timm's networks pool in forward.
        out = getattr(self.features, "forward_features", self.features)(x)
        if out.dim() == 4 and out.shape[1] == self.num_features:
            out = out.movedim(1, -1)
        if out.shape[-1] != self.num_features or out.dim() not in (3, 4):
            raise ValueError(
                f"{type(self.features).__name__} gives a feature map of shape {tuple(out.shape)}; expected "
                f"{self.num_features} features a place, as its num_features says"
            )
        if out.dim() == 3:
            return out, None
        return out.flatten(1, 2) + grid_positions(out.shape[1], out.shape[2], self.num_features, out), None


class TextTokens(nn.Module):
    """The tokens of a text encoder before they are pooled.

    Args:
        network: the encoder; its head is not used.

    Attributes:
        num_features: features of a token.

    Example:
        >>> import torch
        >>> tokens, mask = TextTokens(TextEncoder(100))(torch.tensor([[4, 7, 0], [5, 1, 9]]))
        >>> tokens.shape, mask[0]
        (torch.Size([2, 3, 128]), tensor([ True,  True, False]))
    """

    def __init__(self, network: TextEncoder) -> None:
        super().__init__()
        self.features = network.features
        self.num_features = network.num_features

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map token ids (B, L), 0 for padding, to tokens (B, L, num_features) and where they are real, (B, L).

        Args:
            x: the token ids.
            mask: (B, L) bool, what is False is taken as padding; None for no more padding than the zeros.
        """
        if mask is not None:
            check_mask(mask, (x.shape[0], x.shape[-1]), "text")
            x = x.masked_fill(~mask, PADDING)
        hidden, real = self.features.tokens(x)
        if not self.features.blocks:
            hidden = self.features.bag(self.features.norm(hidden))
        return hidden, real


class FeatureTokens(nn.Module):
    """Features (B, D) as one token: precomputed ones, or those of any network.

    Args:
        width_in: D, at least 1.
        network: gives the features; None where the input is them.

    Attributes:
        num_features: `width_in`.

    Raises:
        ValueError: when `width_in` is below 1; in `forward`, when the features have another shape.

    Example:
        >>> import torch
        >>> tokens, mask = FeatureTokens(512)(torch.zeros(2, 512))
        >>> tokens.shape
        torch.Size([2, 1, 512])
    """

    def __init__(self, width_in: int, network: nn.Module | None = None) -> None:
        super().__init__()
        if width_in < 1:
            raise ValueError(f"width_in is {width_in}; expected at least 1")
        self.num_features = width_in
        self.network = nn.Identity() if network is None else network

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map inputs to a token each, (B, 1, width_in), which is real where the mask (B, T) has a real frame."""
        features = self.network(x)
        if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[1] != self.num_features:
            shape = f"the shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"features are {shape}; expected (B, {self.num_features}), or an encoder with `num_features` "
                "whose forward takes (x, mask) and returns (tokens, mask)"
            )
        return features[:, None], None if mask is None else mask.any(dim=1, keepdim=True)


def _text(name: str, **options: Any) -> TextTokens:
    network = backbone(name, num_classes=0, **options)
    assert isinstance(network, TextEncoder)
    return TextTokens(network)


_BUILDERS: dict[str, type[nn.Module]] = {"audio": AudioEncoder, "series": SeriesEncoder, "table": TableEncoder}


def token_encoder(modality: str, network: str | nn.Module | None = None, **options: Any) -> nn.Module:
    """Build the encoder of a modality, or make one of any network.

    Args:
        modality: image, text, audio, series or table.
        network: by name: for images `resnet8` to `resnet110` or `timm/NAME`, for texts `text` or `bag`, for the
            others the modality's own name, for any `features` (the batch holds features (B, width_in)); None for
            the first of these. Or a module: one with `num_features` whose forward takes (x, mask) and returns
            (tokens, mask) is taken as it is; a TextEncoder, and an image network with a feature map, give their
            tokens; any other that gives features (B, D) gives one token.
        **options: of an encoder by name (`in_channels` and `image_size`, `vocab_size`, `mels`, `channels`, `columns`,
            `width`, `depth`, ...); for a module that gives features and has no `num_features`, `width_in`.

    Raises:
        ConfigError: on an unknown modality, network or option, or a value outside its range.

    Example:
        >>> token_encoder("audio", mels=64).num_features
        128
    """
    if modality not in MODALITIES:
        raise ConfigError(
            f"modality {modality!r} is unknown; expected one of {', '.join(MODALITIES)}{_near(modality, MODALITIES)}"
        )
    if isinstance(network, nn.Module):
        return _from_module(modality, network, options)
    name = network or ("resnet8" if modality == "image" else modality)
    try:
        if name == "features":
            return FeatureTokens(**options)
        if modality == "image":
            return ImageTokens(name, **options)
        if modality == "text" and name in TEXT_NETWORKS:
            return _text(name, **options)
        if name == modality:
            return _BUILDERS[modality](**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the options {options} do not fit the {modality} encoder {name!r}: {error}") from error
    known = [*(TEXT_NETWORKS if modality == "text" else [modality]), "features"]
    raise ConfigError(
        f"{modality} encoder {name!r} is unknown; expected {', '.join(known)} or a module{_near(name, known)}"
    )


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _from_module(modality: str, network: nn.Module, options: dict[str, Any]) -> nn.Module:
    kind = type(network).__name__
    size = getattr(network, "num_features", None)
    is_map = modality == "image" and (isinstance(network, ResNet) or hasattr(network, "forward_features"))
    gives_tokens = isinstance(size, int) and "mask" in inspect.signature(network.forward).parameters
    if isinstance(network, TextEncoder) or is_map or gives_tokens:
        if options:
            raise ConfigError(f"options {sorted(options)} are for an encoder by name, and {kind} is built already")
        if gives_tokens:
            return network
        return TextTokens(network) if isinstance(network, TextEncoder) else ImageTokens(network)
    width = options.get("width_in", size)
    if set(options) - {"width_in"}:
        raise ConfigError(f"options {sorted(options)} are for an encoder by name; {kind} takes width_in alone")
    if not isinstance(width, int):
        raise ConfigError(f"{kind} does not say how many features it gives; set its `num_features`, or give width_in")
    return FeatureTokens(width, network)
