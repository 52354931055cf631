"""Whether a network was trained before: its norm layers tell."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ._layer_shards import is_sharded, local_part, norms_over_shards, reading_device
from ._layers import Layer

_SCALES = ("weight", "gamma", "scale")
_SAME = 1e-10  # share of the squares that is no mean: channels differ by 1e-5 of it, far above rounding


def norms_are_trained(module: nn.Module, layers: Sequence[Layer]) -> bool:
    """Tell whether a norm layer beside one of these layers was trained before.

    A new one has one scale for all channels, or running statistics that have seen nothing. It stands beside the layers
    of the innermost module that holds it and any layer. This waits for the device; where parameters are sharded all
    processes must ask.

    Args:
        module: the module to search.
        layers: some of its layers.
    """
    found = list(_scales_beside(module, layers))
    if not found:
        return False
    scales = [scale for _, scale in found]
    # Sums say it of a shard, too; on the host, because not every device has float64.
    parts = [local_part(scale.detach()).cpu().double() for scale in scales]
    rows = {
        "sum": torch.stack([part.sum() for part in parts]),
        "inner": torch.stack([part.square().sum() for part in parts]),
    }
    sharded = [scale for scale in scales if is_sharded(scale)]
    if sharded:
        rows = {name: row.to(reading_device(sharded[0])) for name, row in rows.items()}
    rows = {name: row.cpu() for name, row in norms_over_shards(rows, scales).items()}
    count = torch.tensor([scale.numel() for scale in scales], dtype=torch.float64)
    differ = (count * rows["inner"] - rows["sum"] ** 2 > _SAME * count * rows["inner"]).tolist()
    return any(unlike and _has_seen_batches(norm) for (norm, _), unlike in zip(found, differ, strict=True))


def _scales_beside(module: nn.Module, layers: Sequence[Layer]) -> Iterator[tuple[nn.Module, Tensor]]:
    wanted = {id(layer.weight) for layer in layers}
    with_layers: set[str] = set()
    with_wanted: set[str] = set()
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            with_layers.update(_homes(name))
            if id(parameter) in wanted:
                with_wanted.update(_homes(name))
    for path, part in module.named_modules():
        for name in _SCALES:
            scale = part._parameters.get(name)
            if scale is None or scale.ndim != 1:
                continue
            home = next((home for home in _homes(path) if home in with_layers), None)
            if home in with_wanted:
                yield part, scale


def _homes(path: str) -> Iterator[str]:
    """Yield the paths of the modules around one, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _has_seen_batches(norm: nn.Module) -> bool:
    """Tell that a norm layer's running statistics are not those of a new one, or that it has none."""
    # Not by num_batches_tracked, which older published weights lack.
    mean = norm._buffers.get("running_mean")
    return mean is None or bool((mean != 0).any())
