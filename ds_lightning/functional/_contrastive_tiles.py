"""NT-Xent over all pairs of 2 N views, tile by tile, from one triangle of the symmetric similarity matrix."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lightning.functional._contrastive_matmul import add_product_, without_autocast, write_product
from ds_lightning.functional._contrastive_negatives import Excluded
from ds_lightning.functional._first_order import first_order

# The exponentials of the first pass that the second need not compute again. A constant, so memory still grows
# with the batch and not with its square; it covers most of a batch of 1,024, which is then a seventh faster.
KEPT_BYTES = 6 << 20


class SymmetricLoss(torch.autograd.Function):
    """Mean of -log softmax of the positive over 2 N scaled views; its gradient is computed with it.

    The logits are `z @ z.T`. They are bounded (the caller sees to it), so no maximum is subtracted: E = exp(z @ z.T)
    is then symmetric itself, and with it the gradient (E_ij u_i + E_ij u_j) z_j, of which one triangle of tiles
    gives both halves. Every tile's exponentials are computed once for the row sums and once for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, excluded: Excluded, tile_size: int, product: torch.dtype) -> Tensor:
        """See the class. `z`: (2 N, D), float32 or float64, positives N rows apart."""
        with without_autocast(z):
            loss, gradient = _loss_and_gradient(z, excluded, tile_size, product, ctx.needs_input_grad[0])
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale the gradient that the forward pass left."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def _tiles(size: int, step: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, size, step):
        for column in range(row, size, step):
            yield slice(row, min(row + step, size)), slice(column, min(column + step, size))


def _loss_and_gradient(
    z: Tensor, excluded: Excluded, tile_size: int, product: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    size, half = len(z), len(z) // 2
    factors = z.to(product)
    tile_size = min(tile_size, size)
    buffers = z.new_empty(1 + with_gradient, tile_size * tile_size)
    kept: dict[tuple[int, int], Tensor] = {}
    room = KEPT_BYTES // z.element_size() if with_gradient else 0

    def exponentials(rows: slice, columns: slice, out: Tensor) -> Tensor:
        write_product(factors[rows], factors[columns].T, out)
        out.exp_()
        excluded.fill_(out, rows.start, columns.start, 0.0)
        return out

    sums = z.new_zeros(size)
    for rows, columns in _tiles(size, tile_size):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        count = shape[0] * shape[1]
        if count <= room:
            room -= count
            tile = kept[rows.start, columns.start] = exponentials(rows, columns, z.new_empty(shape))
        else:
            tile = exponentials(rows, columns, buffers[0, :count].view(shape))
        sums[rows] += tile.sum(1)
        if rows != columns:
            sums[columns] += tile.sum(0)

    positive = torch.linalg.vecdot(z[:half], z[half:]).repeat(2)
    odds = sums.log() - positive
    loss = F.softplus(odds, threshold=1e6).mean()
    if not with_gradient:
        return loss, None

    # Without any negative the sum and the share are both zero: no gradient, not NaN.
    share = odds.sigmoid_().div_(size)
    weight = share / sums.clamp_min_(torch.finfo(sums.dtype).tiny)
    pull = (share[:half] + share[half:]).neg_().unsqueeze(1)
    gradient = torch.empty_like(z)
    torch.mul(z[half:], pull, out=gradient[:half])
    torch.mul(z[:half], pull, out=gradient[half:])
    for rows, columns in _tiles(size, tile_size):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        count = shape[0] * shape[1]
        kept_tile = kept.pop((rows.start, columns.start), None)
        tile = exponentials(rows, columns, buffers[0, :count].view(shape)) if kept_tile is None else kept_tile
        both = torch.add(weight[rows, None], weight[columns], out=buffers[1, :count].view(shape))
        tile = tile.mul_(both).to(product)
        add_product_(gradient[rows], tile, factors[columns])
        if rows != columns:
            add_product_(gradient[columns], tile.T, factors[rows])
    return loss, gradient
