"""The softmax loss of rows against columns, a chunk of rows at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lightning.functional._contrastive_matmul import add_product_, without_autocast, write_product
from ds_lightning.functional._contrastive_negatives import Excluded
from ds_lightning.functional._first_order import first_order


class RowLoss(torch.autograd.Function):
    """Mean of -log softmax of each row's positive among its negatives; the gradient is computed with it.

    Row i's positive is column i + `positive`. With a hardness h, the negatives' sum is replaced by
    n * sum exp((1 + h) l) / sum exp(h l), that is by the sum weighted with exp(h l), normalised to mean one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        positive: int,
        excluded: Excluded,
        hardness: float,
        chunk_size: int,
        product: torch.dtype,
    ) -> Tensor:
        """See the class. `rows`: (R, D), `columns`: (C, D), float32 or float64; the logits are their products."""
        need_rows, need_columns = ctx.needs_input_grad[:2]
        total = rows.new_zeros(())
        row_gradient = torch.empty_like(rows) if need_rows else None
        column_gradient = torch.zeros_like(columns) if need_columns else None
        with without_autocast(rows):
            row_factors, column_factors = rows.to(product), columns.to(product)
            partners = columns[positive : positive + len(rows)]
            buffer = rows.new_empty(min(chunk_size, len(rows)) * len(columns))
            for start in range(0, len(rows), chunk_size):
                part = slice(start, min(start + chunk_size, len(rows)))
                logits = buffer[: (part.stop - start) * len(columns)].view(part.stop - start, len(columns))
                write_product(row_factors[part], column_factors.T, logits)
                excluded.fill_(logits, start, 0, float("-inf"))
                matched = torch.linalg.vecdot(rows[part], partners[part])
                losses, share, weights = _chunk(logits, matched, hardness, need_rows or need_columns)
                total += losses.sum()
                if weights is None:
                    continue
                weights, share = weights.to(product), share.unsqueeze(1)
                if row_gradient is not None:
                    row_gradient[part] = partners[part] * -share
                    add_product_(row_gradient[part], weights, column_factors)
                if column_gradient is not None:
                    column_gradient[positive + start : positive + part.stop] -= rows[part] * share
                    add_product_(column_gradient, weights.T, row_factors[part])
        ctx.has = (need_rows, need_columns)
        ctx.count = len(rows)
        ctx.save_for_backward(*[g for g in (row_gradient, column_gradient) if g is not None])
        return total / len(rows)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass left."""
        scale = grad_output / ctx.count
        saved = iter(ctx.saved_tensors)
        gradients = [next(saved) * scale if has else None for has in ctx.has]
        return (*gradients, None, None, None, None, None)


def _chunk(
    logits: Tensor, positive: Tensor, hardness: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses, the share of the negatives, and d(loss)/d(logit) of the negatives, written over `logits`."""
    # A row without any negative has the maximum -inf, which must not become -inf - -inf.
    top = logits.amax(1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    tiny = torch.finfo(logits.dtype).tiny
    logits -= top
    if hardness == 0:
        exps = logits.exp_()
        sums = exps.sum(1)
        odds = sums.log() + top.squeeze(1) - positive
        share = odds.sigmoid()
        if with_gradient:
            exps *= (share / sums.clamp_min(tiny)).unsqueeze(1)
        return F.softplus(odds, threshold=1e6), share, exps if with_gradient else None
    count = (logits != float("-inf")).sum(1)
    plain = (logits * hardness).exp_()
    hard = logits.mul_(1 + hardness).exp_()
    plain_sums, hard_sums = plain.sum(1), hard.sum(1)
    ratio = hard_sums / plain_sums.clamp_min(tiny) * count
    odds = ratio.log() + top.squeeze(1) - positive
    share = odds.sigmoid()
    if with_gradient:
        hard *= ((1 + hardness) * share / hard_sums.clamp_min(tiny)).unsqueeze(1)
        hard -= plain.mul_((hardness * share / plain_sums.clamp_min(tiny)).unsqueeze(1))
    return F.softplus(odds, threshold=1e6), share, hard if with_gradient else None
