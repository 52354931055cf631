"""Backward passes that have no derivative of their own, and say so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_Gradients = Any


def first_order(backward: Callable[[Any, torch.Tensor], _Gradients]) -> Callable[[Any, torch.Tensor], _Gradients]:
    """Refuse create_graph=True.

    torch's `once_differentiable` lets it pass when the incoming gradient is a constant, as that of a loss is: a
    penalty on the gradient would then be left out of the second backward pass without a word.
    """

    @wraps(backward)
    def checked(ctx: Any, grad_output: torch.Tensor) -> _Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the contrastive functions have no second derivative; expected a backward pass without "
                "create_graph=True: for a gradient penalty or second-order MAML write the loss in plain torch"
            )
        return backward(ctx, grad_output)

    return checked
