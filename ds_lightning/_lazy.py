"""Names that are imported when they are first used, so that `import ds_lightning` stays fast."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__`.

    Args:
        package: the package's `__name__`.
        homes: public name -> module that defines it, absolute or relative to the package (`.resnet`).

    Returns:
        The two functions, to be assigned at the package's top level (PEP 562).
    """

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name], package), name)

    def dir_() -> list[str]:
        return sorted(homes)

    return getattr_, dir_
