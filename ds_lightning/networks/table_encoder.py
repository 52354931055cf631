"""One token for each number of a table's row."""

import torch
from torch import Tensor, nn

from ds_lightning.networks._ranges import check_ranges
from ds_lightning.networks._time_convolutions import check_mask


class TableEncoder(nn.Module):
    """Each column has its own vector, which its number scales, and its own bias.

    Args:
        columns: numbers in a row, at least 1.
        width: features of a token, at least 1.

    Attributes:
        num_features: `width`.

    Raises:
        ValueError: when an argument is outside its range; in `forward`, when the input has another shape.

    Paper:
        The feature tokenizer of FT-Transformer: Revisiting Deep Learning Models for Tabular Data, arXiv:2106.11959.

    Example:
        >>> tokens, mask = TableEncoder(5)(torch.zeros(2, 5))
        >>> tokens.shape
        torch.Size([2, 5, 128])
    """

    def __init__(self, columns: int, width: int = 128) -> None:
        super().__init__()
        check_ranges({"columns": columns, "width": width})
        self.num_features = width
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(columns, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(columns, width).uniform_(-bound, bound))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map rows (B, columns) to tokens (B, columns, width), with the mask as it came.

        Args:
            x: the numbers, standardised.
            mask: (B, columns) bool, True for a known number; None when all are.
        """
        columns = len(self.weight)
        if x.dim() != 2 or x.shape[1] != columns or not x.is_floating_point():
            raise ValueError(f"table has the shape {tuple(x.shape)} and type {x.dtype}; expected float (B, {columns})")
        check_mask(mask, (len(x), columns), "table")
        if mask is not None:
            x = x.masked_fill(~mask, 0.0)
        return torch.addcmul(self.bias, x[..., None], self.weight), mask
