"""How much of the encoders' gradient each modality has."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def gradient_shares(encoders: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the norm of each encoder's gradient over the sum of all; of those that are trained, without waiting.

    Args:
        encoders: modality -> encoder, after the backward pass.
    """
    norms = {}
    for name, encoder in encoders.items():
        gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
        if gradients:
            norms[name] = get_total_norm(gradients)
    if not norms:
        return {}
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}
