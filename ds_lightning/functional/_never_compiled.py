"""Functions that torch.compile must leave alone."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def never_compiled(function: _Function) -> _Function:
    """Break torch.compile's graph at this function."""
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
