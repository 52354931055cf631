"""Layers of any module, as the names and tensors that an optimizer steps."""

from collections.abc import Callable, Iterable, Sequence
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


def group_numbers(layers: Sequence[Layer], groups: str | Callable[[str], str]) -> list[int]:
    """Return the number of each layer's group, counted from 0 in the order of the layers.

    Args:
        layers: the layers.
        groups: `layer`, each by itself; `block`, by the block that holds the layer; or a function from a layer's name
            to its group's name.

    Raises:
        ConfigError: the function returns something else than a str.
    """
    numbers: dict[str, int] = {}
    found = []
    for layer in layers:
        name: object = layer.name
        if groups == "block":
            name = block_of(layer.name)
        elif callable(groups):
            name = groups(layer.name)
        if not isinstance(name, str):
            raise ConfigError(
                f"groups returns {name!r} for the layer {layer.name!r}; expected a str, the name of the layer's group"
            )
        found.append(numbers.setdefault(name, len(numbers)))
    return found


def block_of(name: str) -> str:
    """Return the path of the innermost numbered module that holds a layer, or the layer's own name without one.

    Example:
        >>> block_of("layer1.0.conv2"), block_of("layer1.0.downsample.0"), block_of("net.0"), block_of("fc")
        ('layer1.0', 'layer1.0', 'net.0', 'fc')
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 1, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return name


def find_vectors(
    module: nn.Module,
    stepped: Iterable[Tensor],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[Tensor]:
    """List the scales and shifts of norm layers, and the biases, that are among the stepped parameters and no layer's.

    Args:
        module: the module to search.
        stepped: the parameters that an optimizer holds.
        include: fnmatch patterns on parameter names; None: all.
        exclude: fnmatch patterns on parameter names that are left out.
    """
    stepped = list(stepped)
    held = {id(parameter) for parameter in stepped}
    held -= {id(tensor) for layer in find_layers(module, stepped, include, exclude) for tensor in layer.tensors}
    return [
        parameter
        for name, parameter in plain_names(module).items()
        if id(parameter) in held
        and parameter.ndim < 2
        and parameter.is_floating_point()
        and (include is None or matches(name, include))
        and not matches(name, exclude or ())
    ]


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
