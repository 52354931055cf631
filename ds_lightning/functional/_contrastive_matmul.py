"""Products of embeddings whose result is kept in float32 or float64."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What the factors of a product are: bfloat16 for a bfloat16 input on a GPU, else float32 or float64."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else torch.float32


def without_autocast(x: Tensor) -> torch.autocast:
    """Autocast would round the products to half precision."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b to `out`, whose precision the sum keeps."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b, out_dtype=out.dtype))


def add_product_(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `target`, whose precision the sum keeps."""
    if a.dtype == target.dtype:
        target.addmm_(a, b)
    else:
        target.add_(torch.mm(a, b, out_dtype=target.dtype))
