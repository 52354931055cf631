"""Which channels of a network went: a plan that can be saved, applied to the unpruned network, and chained."""

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any

from torch import Tensor, nn

from ds_lightning.errors import ConfigError, DataError

from ._plan_checks import (
    Attribute,
    as_value,
    check_attributes,
    check_indices,
    check_record,
    check_shape,
    checked_value,
    slot_of,
)
from ._plan_json import as_json, from_json_types
from ._plan_names import for_all_names, joined, modules_of, plain
from ._sliced_tensors import sliced, successor

CHECKPOINT_KEY = "ds_lightning.pruning_plan"

_RECORD = "_pruning_plan"


@dataclass(frozen=True)
class PruningPlan:
    """What is left of each tensor of a network, and the plain attributes of modules that go with it.

    Names are those of the network without `torch.compile`: a part `_orig_mod` is left out. Dimensions of which
    everything is kept are left out too.

    Args:
        shapes: name of each parameter and buffer that changes -> its shape before.
        kept: its name -> dimension -> the indices that are kept, ascending, at least one.
        attributes: path of a module -> plain attribute -> new value, an int or a tuple of ints.

    Raises:
        ConfigError: when names, dimensions or indices do not fit together.

    Example:
        >>> first = PruningPlan({"0.weight": (4, 2)}, {"0.weight": {0: (0, 2, 3)}}, {"0": {"out_features": 3}})
        >>> second = PruningPlan({"0.weight": (3, 2)}, {"0.weight": {0: (1, 2)}}, {"0": {"out_features": 2}})
        >>> first.then(second).kept
        {'0.weight': {0: (2, 3)}}
    """

    shapes: dict[str, tuple[int, ...]]
    kept: dict[str, dict[int, tuple[int, ...]]]
    attributes: dict[str, dict[str, Attribute]]

    def __post_init__(self) -> None:
        if self.shapes.keys() != self.kept.keys():
            odd = sorted(self.shapes.keys() ^ self.kept.keys())[0]
            raise ConfigError(f"a pruning plan names {odd!r} in only one of shapes and kept; expected it in both")
        shapes, kept = {}, {}
        for name, shape in self.shapes.items():
            dims = {d: tuple(map(index, indices)) for d, indices in sorted(self.kept[name].items())}
            for d, indices in dims.items():
                check_indices(name, tuple(shape), d, indices)
            if dims := {d: indices for d, indices in dims.items() if len(indices) < shape[d]}:
                shapes[plain(name)] = tuple(shape)
                kept[plain(name)] = dims
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "kept", kept)
        attributes = {
            plain(path): {key: checked_value(path, key, value) for key, value in values.items()}
            for path, values in self.attributes.items()
            if values
        }
        object.__setattr__(self, "attributes", attributes)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.attributes)

    @property
    def shapes_after(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that changes, after the plan."""
        return {
            name: tuple(len(self.kept[name].get(d, range(size))) for d, size in enumerate(shape))
            for name, shape in self.shapes.items()
        }

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """Return what the plan keeps of a tensor that belongs to a parameter or buffer, such as its momentum.

        Args:
            name: of the parameter or buffer; where it may have several, `with_all_names` gives the plan all of them.
            tensor: of its shape before, any dtype and device.

        Returns:
            A copy with the same memory format, without history; the tensor itself when the plan does not name it.

        Raises:
            ConfigError: when the tensor has another shape.
        """
        name = plain(name)
        if name not in self.shapes:
            return tensor
        if tuple(tensor.shape) != self.shapes[name]:
            raise ConfigError(
                f"a tensor for {name} has the shape {tuple(tensor.shape)}; the pruning plan expects "
                f"{self.shapes[name]}; slice what has the parameter's shape before the plan"
            )
        return sliced(tensor, self.kept[name])

    def then(self, later: "PruningPlan") -> "PruningPlan":
        """Return the one plan that does what this plan and then the later one do.

        Raises:
            ConfigError: when the later plan expects other shapes than this one leaves.
        """
        after = self.shapes_after
        shapes, kept = {**later.shapes, **self.shapes}, {**later.kept, **self.kept}
        for name in self.shapes.keys() & later.shapes.keys():
            if after[name] != later.shapes[name]:
                raise ConfigError(
                    f"the later pruning plan expects {name} in the shape {later.shapes[name]}; the earlier one leaves "
                    f"{after[name]}; chain plans in the order in which they were made"
                )
            first, second = self.kept[name], later.kept[name]
            both = {d: tuple(first[d][i] for i in second[d]) for d in first.keys() & second.keys()}
            kept[name] = {**first, **second, **both}
        attributes = {
            path: {**self.attributes.get(path, {}), **later.attributes.get(path, {})}
            for path in [*self.attributes, *later.attributes]
        }
        return PruningPlan(shapes, kept, attributes)

    def under(self, prefix: str) -> "PruningPlan":
        """Return the plan for a module that holds the network at the path `prefix`, such as `network`."""
        return PruningPlan(
            {joined(prefix, name): shape for name, shape in self.shapes.items()},
            {joined(prefix, name): dims for name, dims in self.kept.items()},
            {joined(prefix, path): values for path, values in self.attributes.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in the types of JSON, equal lists of indices once and consecutive indices as ranges."""
        return as_json(self.shapes, self.kept, self.attributes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PruningPlan":
        """Return the plan that `to_dict` described.

        Raises:
            DataError: when it is no plan, a broken one, or of a newer version.
        """
        try:
            return cls(*from_json_types(data))
        except ConfigError as error:
            raise DataError(f"the pruning plan is broken: {error}") from error

    def to_json(self) -> str:
        """Return the plan as a line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Return the plan that `to_json` described.

        Raises:
            DataError: when it is no JSON, no plan, a broken one, or of a newer version.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"the pruning plan is no JSON ({error}); expected the text of PruningPlan.to_json"
            ) from None
        return cls.from_dict(data)


def apply_plan(network: nn.Module, plan: PruningPlan) -> dict[nn.Parameter, nn.Parameter]:
    """Remove the plan's channels from a network: its parameters and buffers are replaced by smaller ones.

    All is checked before anything is touched: an error leaves the network as it was. New parameters keep
    `requires_grad`, dtype, device, memory format, attributes and, sliced, `.grad`; what was shared stays shared. Hooks
    on a parameter itself go. Where the plan has been applied already, nothing happens.

    Args:
        network: the unpruned network, or one with the plan's shapes before.
        plan: what goes; then `plan_of(network)` is the earlier plan of the network and this one in one.

    Returns:
        Each parameter that was replaced -> its successor, which an optimizer needs.

    Raises:
        ConfigError: when the plan does not fit the network, or a tensor is computed from others (`weight_norm`).

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> shapes = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (1, 3)}
        >>> kept = {"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "1.weight": {1: (0, 2)}}
        >>> plan = PruningPlan(shapes, kept, {"0": {"out_features": 2}, "1": {"in_features": 2}})
        >>> len(apply_plan(network, plan)), network[1].weight.shape
        (3, torch.Size([1, 2]))
    """
    plan = with_all_names(network, plan)
    modules = modules_of(network)
    slots = {name: slot_of(modules, name) for name in plan.shapes}
    for path, values in plan.attributes.items():
        check_attributes(modules, path, values)
    parts = _parts(plan)
    records: dict[str, PruningPlan | None] = {path: modules[path].__dict__.get(_RECORD) for path in parts}
    if _is_applied(plan, slots, modules):
        for path, part in parts.items():
            check_record(path, records[path], part)
        for path, part in parts.items():
            setattr(modules[path], _RECORD, records[path] or part)
        return {}
    for name, (module, key) in slots.items():
        check_shape(name, getattr(module, key), plan.shapes[name])
    chained = {path: record.then(parts[path]) if record else parts[path] for path, record in records.items()}
    new: dict[Tensor, Tensor] = {}
    for name, (module, key) in slots.items():
        old = getattr(module, key)
        if old not in new:
            new[old] = successor(old, partial(plan.slice, name))
    # From here on nothing can fail: everything new exists.
    for module, key in slots.values():
        old = getattr(module, key)
        # One module may have two names, and the first has done it.
        setattr(module, key, new.get(old, old))
    for path, values in plan.attributes.items():
        for key, value in values.items():
            before = modules[path].__dict__[key]
            setattr(modules[path], key, type(before)(value) if isinstance(value, tuple) else value)
    for path, record in chained.items():
        setattr(modules[path], _RECORD, record)
    return {a: b for a, b in new.items() if isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)}


def with_all_names(network: nn.Module, plan: PruningPlan) -> PruningPlan:
    """Return the plan with every name that the network has for its tensors and modules, such as those of tied weights.

    Raises:
        ConfigError: when two names of one tensor or module have different entries.
    """
    tensors: dict[str, Any] = dict(network.named_parameters(remove_duplicate=False))
    tensors.update(network.named_buffers(remove_duplicate=False))
    entries = {name: (shape, plan.kept[name]) for name, shape in plan.shapes.items()}
    entries = for_all_names({plain(name): tensor for name, tensor in tensors.items()}, entries)
    return PruningPlan(
        {name: shape for name, (shape, _) in entries.items()},
        {name: dims for name, (_, dims) in entries.items()},
        for_all_names(modules_of(network), plan.attributes),
    )


def plan_of(network: nn.Module) -> PruningPlan | None:
    """Return all that was removed from the network and its parts as one plan, or None when nothing was."""
    shapes, kept, attributes = {}, {}, {}
    for path, module in modules_of(network).items():
        if (record := module.__dict__.get(_RECORD)) is not None:
            part = record.under(path)
            shapes.update(part.shapes)
            kept.update(part.kept)
            attributes.update(part.attributes)
    return PruningPlan(shapes, kept, attributes) or None


def save_plan(checkpoint: MutableMapping[str, Any], network: nn.Module) -> None:
    """Put the network's plan, if it has one, into a checkpoint, as plain types."""
    if (plan := plan_of(network)) is not None:
        checkpoint[CHECKPOINT_KEY] = plan.to_dict()


def plan_in(checkpoint: Mapping[str, Any]) -> PruningPlan | None:
    """Return the plan in a checkpoint, or None when its network was not pruned.

    Raises:
        DataError: when it is broken or of a newer version.
    """
    return PruningPlan.from_dict(checkpoint[CHECKPOINT_KEY]) if CHECKPOINT_KEY in checkpoint else None


def _parts(plan: PruningPlan) -> dict[str, PruningPlan]:
    """Return path of a module -> what the plan says of that module itself, which it remembers."""
    names: dict[str, list[str]] = {path: [] for path in plan.attributes}
    for name in plan.shapes:
        names.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        path: PruningPlan(
            {name.rpartition(".")[2]: plan.shapes[name] for name in own},
            {name.rpartition(".")[2]: plan.kept[name] for name in own},
            {"": plan.attributes.get(path, {})},
        )
        for path, own in names.items()
    }


def _is_applied(
    plan: PruningPlan, slots: Mapping[str, tuple[nn.Module, str]], modules: Mapping[str, nn.Module]
) -> bool:
    after = plan.shapes_after
    return all(tuple(getattr(*slot).shape) == after[name] for name, slot in slots.items()) and all(
        as_value(modules[path].__dict__[key]) == value
        for path, values in plan.attributes.items()
        for key, value in values.items()
    )
