"""What removing channels means for each kind of layer: which dimensions of which tensors, and which attributes."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

IN, OUT = "in", "out"


@dataclass(frozen=True)
class TensorDim:
    """A dimension of a tensor that follows the channels of a layer.

    Attributes:
        tensor: name of the parameter or buffer, without the layer's path.
        dim: the dimension.
        reads: whether the layer reads its input along it, so that zeros there cut the channel off.
    """

    tensor: str
    dim: int
    reads: bool = False


def channels(layer: nn.Module, side: str) -> int | None:
    """Return how many channels a layer takes (`in`) or gives (`out`); None for a layer that can't lose any."""
    match layer:
        case _ConvNd():
            return layer.in_channels if side == IN else layer.out_channels
        case nn.Linear():
            return layer.in_features if side == IN else layer.out_features
        case _NormBase():
            return layer.num_features
        case nn.LayerNorm() if len(layer.normalized_shape) == 1:
            return layer.normalized_shape[0]
        case nn.GroupNorm():
            return layer.num_channels
        case nn.PReLU() if layer.num_parameters > 1:
            return layer.num_parameters
        case nn.Embedding():
            return layer.embedding_dim
    return None


def blocks(layer: nn.Module) -> int:
    """Return into how many blocks a layer splits its channels, which only go as a whole; 1 for no blocks."""
    if isinstance(layer, _ConvNd):
        return layer.groups
    # A norm over all channels at once has no block that could go.
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else 1


def tensor_dims(layer: nn.Module, side: str) -> list[TensorDim]:
    """Return which tensor dimensions follow the channels of one side of a layer."""
    match layer:
        case _ConvNd():
            transposed, grouped = isinstance(layer, _ConvTransposeNd), layer.groups > 1
            found = []
            # With groups, the other dimension of the weight counts channels within a group, and a group goes whole.
            if side == (IN if transposed else OUT) or not grouped:
                dim = int((side == IN) != transposed)
                found.append(TensorDim("weight", dim, reads=side == IN and not grouped))
            if side == OUT:
                found.append(TensorDim("bias", 0))
        case nn.Linear():
            found = (
                [TensorDim("weight", 1, reads=True)] if side == IN else [TensorDim("weight", 0), TensorDim("bias", 0)]
            )
        case nn.Embedding():
            found = [TensorDim("weight", 1)]
        case _:
            found = [TensorDim(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    return [item for item in found if getattr(layer, item.tensor, None) is not None]


def attributes(layer: nn.Module, kept: dict[str, int]) -> dict[str, Any]:
    """Return the attributes of a layer that keeps so many channels on the sides named."""
    match layer:
        case _ConvNd():
            found = {f"{side}_channels": count for side, count in kept.items()}
            if layer.groups > 1:
                (side, count), *_ = kept.items()
                groups = layer.groups * count // (channels(layer, side) or 1)
                found = {
                    "groups": groups,
                    "in_channels": layer.in_channels // layer.groups * groups,
                    "out_channels": layer.out_channels // layer.groups * groups,
                }
        case nn.Linear():
            found = {f"{side}_features": count for side, count in kept.items()}
        case _NormBase():
            found = {"num_features": kept[OUT]}
        case nn.LayerNorm():
            return {"normalized_shape": (kept[OUT],)}
        case nn.GroupNorm():
            found = {"num_channels": kept[OUT]}
            if layer.num_groups > 1:
                found["num_groups"] = layer.num_groups * kept[OUT] // layer.num_channels
        case nn.PReLU():
            found = {"num_parameters": kept[OUT]}
        case nn.Embedding():
            found = {"embedding_dim": kept[OUT]}
        case _:
            raise TypeError(f"no attributes for {type(layer).__name__}")
    return found
