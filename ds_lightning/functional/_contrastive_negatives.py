"""Which columns of a similarity tile are no negatives of its rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Excluded:
    """Pairs that are left out of the negatives.

    Args:
        diagonals: for each offset, column i + offset is no negative of row i.
        rows: identities of the rows, shape (R,), or None.
        columns: identities of the first columns, shape (at most C,); equal identities are no negatives.
        matrix: True where a pair is no negative, shape (N, N); row r means r % N, column c means c % N.
        repeats: how often the matrix stands side by side; columns after that are all negatives.
    """

    diagonals: tuple[int, ...]
    rows: Tensor | None = None
    columns: Tensor | None = None
    matrix: Tensor | None = None
    repeats: int = 1

    def fill_(self, tile: Tensor, row: int, column: int, value: float) -> None:
        """Write `value` where the tile, whose corner is (row, column), holds no negative."""
        height, width = tile.shape
        for offset in self.diagonals:
            shift = row + offset - column
            if -height < shift < width:
                tile.diagonal(shift).fill_(value)
        if self.rows is not None and self.columns is not None:
            columns = self.columns[column : column + width]
            tile[:, : len(columns)].masked_fill_(self.rows[row : row + height, None] == columns, value)
        if self.matrix is not None:
            size = len(self.matrix)
            end = min(column + width, self.repeats * size)
            rows = torch.arange(row, row + height, device=tile.device) % size
            columns = torch.arange(column, max(column, end), device=tile.device) % size
            tile[:, : len(columns)].masked_fill_(self.matrix[rows[:, None], columns], value)
