"""Look at a YAML file before anything is made of it: what is wrong, in which file and line, in bounded time."""

from pathlib import Path

import yaml

from ds_lightning.errors import ConfigError

# Far above any configuration, far below what a few aliases can grow to.
_MOST_VALUES = 100_000
_DEEPEST = 60
_KEYS = {
    "configuration file": "`model:`, `data:` and `trainer:`",
    "sweep file": "`base:`, `space:` and `objective:`",
    "schema file": "`columns:` and `label:`",
}


def check_yaml(path: str | Path, kind: str = "configuration file") -> None:
    """Refuse a file that is no mapping in YAML, has a key twice, or grows without measure when it is read.

    Args:
        path: the file.
        kind: what it is called in a message: `configuration file`, `sweep file` or `schema file`.

    Raises:
        ConfigError: names the file, and the line where there is one.

    Example:
        >>> check_yaml("callbacks/layer_lr.yaml")  # doctest: +SKIP
    """
    where = f"{kind} {str(path)!r}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{where} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _wrong(where, f"it is not UTF-8 (byte {error.start}); save it as UTF-8 text") from error
    try:
        _check_depth(where, text)
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _wrong(where, f"it is no YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise _wrong(where, f"it is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        held = {type(None): "nothing", yaml.SequenceNode: "a list"}.get(type(root), "a single value")
        raise _wrong(where, f"it holds {held}; expected keys such as {_KEYS[kind]}")
    _Walk(where).size(root)


def _check_depth(where: str, text: str) -> None:
    """Follow the events, which needs no stack: composing a deep file would end in the middle of Python."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            line = f" (line {event.start_mark.line + 1})" if event.start_mark else ""
            raise _wrong(where, f"it nests deeper than {_DEEPEST} levels{line}")


class _Walk:
    """Counts the values of a file with every alias written out."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def size(self, node: yaml.Node) -> int:
        known = self._sizes.get(id(node))
        if known is not None:
            return known
        line = node.start_mark.line + 1
        if id(node) in self._open:
            raise _wrong(self._where, f"an alias in line {line} holds itself")
        if node.tag not in yaml.SafeLoader.yaml_constructors and node.tag != "tag:yaml.org,2002:value":
            raise _wrong(self._where, f"line {line} has the tag {node.tag!r}; only plain values are read")
        self._open.add(id(node))
        total = 1
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            total += sum(self.size(part) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(self.size(part) for part in node.value)
        if total > _MOST_VALUES:
            raise _wrong(self._where, f"line {line} grows to more than {_MOST_VALUES} values through its aliases")
        self._open.discard(id(node))
        self._sizes[id(node)] = total
        return total

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong(self._where, f"the key in line {line} is no single word")
            if key.value in seen and key.value != "<<":
                raise _wrong(self._where, f"key {key.value!r} is there twice (line {line}); keep one")
            seen.add(key.value)


def _wrong(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where}: {what}")
