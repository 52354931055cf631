"""Removals that are proven on the shadow: the small network computes what the large one does without those channels."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ds_lightning.errors import ConfigError
from ds_lightning.networks._channel_group import ChannelGroup, cut_off, plan_for
from ds_lightning.networks._channel_shadow import run, same_tensors, short
from ds_lightning.networks.pruning_plan import apply_plan

_SEED = 7
# Rounding differs between a small and a large matrix product by about 5e-7 of the largest output; a wrong channel
# changes 4e-4 and more.
_TOLERANCE = 2e-5
_SECONDS = 50.0


class _NormsByChannel(TorchFunctionMode):
    """Norms over channels as bounded functions of one channel.

    A LayerNorm over fewer channels has other statistics, which is what training recovers from; all the rest must be
    exactly as before, and this makes that visible.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is F.group_norm:
            return _group_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    F.layer_norm(x, normalized_shape, weight, bias, eps)  # for its checks of the shapes
    return F.softsign(x) * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    normed = F.group_norm(x, num_groups, weight, bias, eps)
    # Blocks go as a whole and leave the others' statistics alone.
    if num_groups > 1:
        return normed
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return F.softsign(x) * (1.0 if weight is None else weight.view(shape)) + (0.0 if bias is None else bias.view(shape))


class Trial:
    """Removals that are tried on copies of a shadow.

    Args:
        shadow: the network; it is not changed.
        args: example inputs on the CPU.
        kwargs: example inputs by name.
        dims: the dimension of each bare parameter that has channels.
    """

    def __init__(
        self, shadow: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Mapping[str, int]
    ) -> None:
        self.shadow, self.args, self.kwargs, self.dims = shadow, args, kwargs, dims
        self.reasons: dict[str, str] = {}
        self._deadline = 0.0

    def sound(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Return the groups from which units can be removed, each alone and all together.

        Raises:
            ConfigError: when the trials take too long.
        """
        self._deadline = time.monotonic() + _SECONDS
        found = self._halved(groups)
        if len(found) == len(groups) or self._fault(found) is None:
            return found
        together: list[ChannelGroup] = []
        for group in found:
            reason = self._fault([*together, group])
            if reason is None:
                together.append(group)
            else:
                self.reasons[group.name] = reason
        return together

    def _halved(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        reason = self._fault(groups) if groups else None
        if reason is None:
            return list(groups)
        if len(groups) == 1:
            self.reasons[groups[0].name] = reason
            return []
        half = len(groups) // 2
        return [*self._halved(groups[:half]), *self._halved(groups[half:])]

    def _fault(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Return why removing about half of the units of these groups goes wrong, or None."""
        if time.monotonic() > self._deadline:
            raise ConfigError(
                f"trying which channels of {type(self.shadow).__name__} can go took more than {_SECONDS:.0f} s; "
                "expected a network that torch-pruning can follow: name a submodule of it, or put layers in exclude"
            )
        generator = torch.Generator().manual_seed(_SEED)
        orders = [torch.randperm(group.units, generator=generator) for group in groups]
        kept = [order[: max(len(order) // 2, 1)].sort().values for order in orders]
        small, masked = same_tensors(self.shadow), same_tensors(self.shadow)
        try:
            apply_plan(small, plan_for(self.shadow, groups, kept, self.dims))
            cut_off(masked, groups, kept)
            with _NormsByChannel():
                found, expected = (run(network, self.args, self.kwargs) for network in (small, masked))
        except Exception as error:
            return f"the smaller network does not run ({short(error)})"
        if [out.shape for out in found] != [out.shape for out in expected]:
            return "its channels are the network's output"
        for a, b in zip(found, expected, strict=True):
            # Not "greater": NaN must not pass.
            if b.numel() and not bool((a - b).abs().max() <= _TOLERANCE * b.abs().max()):
                return "something besides the layers reads its channels, such as a softmax or a mean over them"
        return None
