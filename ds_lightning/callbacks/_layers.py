"""Layers of any module, as the names and tensors that an optimizer steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ds_lightning.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """A weight, and the bias that follows it."""

    name: str
    weight: Tensor
    bias: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def find_layers(
    module: nn.Module,
    stepped: Iterable[Tensor],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[Layer]:
    """List the layers of a module whose weight is among the stepped parameters.

    A layer is a parameter with two or more dimensions; the bias beside it (`weight` -> `bias`, `in_proj_weight` ->
    `in_proj_bias`) follows. Scales of norm layers and other vectors belong to none. A layer has the path of its
    module as its name, or of its parameter where the module has several.

    Args:
        module: the module to search; a shared weight counts once.
        stepped: the parameters that an optimizer holds.
        include: fnmatch patterns on parameter names; a layer counts when its weight matches one. None: all.
        exclude: fnmatch patterns on parameter names; a weight or bias that matches one is left out.

    Returns:
        The layers in the order of `module.named_parameters()`.
    """
    held = {id(parameter) for parameter in stepped}
    parameters = plain_names(module)
    weights = {
        name: weight
        for name, weight in parameters.items()
        if id(weight) in held
        and weight.ndim >= 2
        and weight.is_floating_point()
        and (include is None or matches(name, include))
        and not matches(name, exclude or ())
    }
    homes = [name.rpartition(".")[0] for name in weights]
    layers = []
    for name, weight in weights.items():
        home, _, leaf = name.rpartition(".")
        bias_name = f"{home}.{leaf.replace('weight', 'bias')}".lstrip(".")
        bias = parameters.get(bias_name) if bias_name not in weights else None
        if bias is not None and (id(bias) not in held or matches(bias_name, exclude or ())):
            bias = None
        plain = leaf == "weight" and home and homes.count(home) == 1
        layers.append(Layer(home if plain else name, weight, bias))
    return layers


def check_patterns(module: nn.Module, argument: str, patterns: Sequence[str] | None) -> None:
    """Refuse a pattern that matches no parameter: a typing error would go unseen.

    Raises:
        ConfigError: names the argument and the pattern.
    """
    names = list(plain_names(module))
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:3])
            raise ConfigError(
                f"{argument} has the pattern {pattern!r}, which matches no parameter; expected an fnmatch pattern "
                f"on full parameter names such as {shown}"
            )


def plain_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's parameters by name, each once; torch.compile's wrapping changes no name."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in module.named_parameters()}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a parameter's name matches one of the fnmatch patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
