"""How good embeddings are, without labels: alignment, uniformity, effective rank and retrieval."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_lightning.functional._contrastive_checks import check_embeddings, unit_rows

# About 8 MiB of similarities at a time.
_ENTRIES = 1 << 21


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of the two views of a sample, on the unit sphere (arXiv 2005.10242).

    Args:
        first: shape (N, D), floating, of any length: normalised here.
        second: shape (N, D), row for row the samples of `first`.

    Returns:
        A scalar in [0, 4], on the device of the inputs; 0 is perfect. Differentiable.

    Raises:
        ValueError: a wrong shape or dtype.

    Example:
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        tensor(2.)
    """
    check_embeddings(first, second, "first", "second")
    return (unit_rows(first) - unit_rows(second)).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """Log of the mean of exp(-2 |x_i - x_j|^2) over pairs, on the unit sphere (arXiv 2005.10242).

    Args:
        x: shape (N, D), floating, at least 2 rows, of any length: normalised here. N^2 D operations, in pieces
            of about 8 MiB.

    Returns:
        A scalar in [-8, 0], on the device of `x`: 0 is a collapse to one point; lower is more uniform; about
        -4 is the best for many rows in many dimensions. Differentiable.

    Raises:
        ValueError: a wrong shape or dtype, or fewer than two rows.

    Example:
        >>> uniformity(torch.eye(3))
        tensor(-4.0000)
    """
    check_embeddings(x, x, "x", "x")
    if len(x) < 2:
        raise ValueError("x has one row; uniformity is a mean over pairs, so expected at least 2")
    unit = unit_rows(x)
    rows = max(1, _ENTRIES // len(x))
    total = unit.new_zeros(())
    for start in range(0, len(x), rows):
        # |a - b|^2 = 2 - 2 a.b; a pair's exponent is never positive but for rounding.
        exponents = (unit[start : start + rows] @ unit.T).sub(1).mul(4)
        keep = torch.ones_like(exponents, dtype=torch.bool)
        keep.diagonal(start).fill_(False)
        total = total + torch.where(keep, exponents.exp(), 0).sum()
    return (total / (len(x) * (len(x) - 1))).log()


def effective_rank(x: Tensor) -> Tensor:
    """How many dimensions embeddings really use: exp of the entropy of the singular values (RankMe, 2210.02885).

    Args:
        x: shape (N, D), floating; neither centred nor normalised here.

    Returns:
        A scalar between 1 and min(N, D), on the device of `x`, float32 (float64 for float64): 1 is a collapse to
        one direction. Zero for embeddings that are all zero. Not differentiable. The eigenvalue solver of a GPU
        makes the host wait once.

    Raises:
        ValueError: a wrong shape or dtype.

    Example:
        >>> effective_rank(torch.eye(3))
        tensor(3.)
    """
    check_embeddings(x, x, "x", "x")
    wide = x.detach().double()
    gram = wide.T @ wide if x.shape[1] <= x.shape[0] else wide @ wide.T
    # Squares of the singular values; rounding can take a zero below zero.
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = values.sum()
    shares = values / torch.where(total > 0, total, 1)
    rank = torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0)
    return rank.to(torch.promote_types(x.dtype, torch.float32))


def recall_at(query: Tensor, key: Tensor, k: int | Sequence[int]) -> Tensor:
    """The share of queries that find their own key among the k most similar by cosine (R@k).

    A key exactly as similar as the right one counts as ahead of it, so a collapsed embedding scores 0, not 1.

    Args:
        query: shape (N, D), floating, of any length: normalised here.
        key: shape (N, D); row i is what query i should find. N^2 D operations, in pieces of about 8 MiB.
        k: how many places count, at least 1; or several at the cost of one.

    Returns:
        A scalar in [0, 1], or one for each k, on the device of the inputs, float32.

    Raises:
        ValueError: a wrong shape or dtype, or a k under 1.

    Example:
        >>> recall_at(torch.eye(3), torch.eye(3), k=1)
        tensor(1.)
        >>> recall_at(torch.eye(3), torch.eye(3).roll(1, 0), k=[1, 3])
        tensor([0., 1.])
    """
    check_embeddings(query, key, "query", "key")
    places = [k] if isinstance(k, int) else list(k)
    if not places or min(places) < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    with torch.no_grad():
        queries, keys = unit_rows(query), unit_rows(key)
        rows = max(1, _ENTRIES // len(key))
        hits = torch.zeros(len(places), dtype=torch.int64, device=query.device)
        for start in range(0, len(query), rows):
            similarity = queries[start : start + rows] @ keys.T
            own = similarity.diagonal(start)
            # Not "at least as similar": NaN would then be a hit.
            ahead = (~(similarity < own.unsqueeze(1))).sum(1) - 1
            hits += torch.stack([(ahead < place).sum() for place in places])
        recall = hits.float() / len(query)
    return recall[0] if isinstance(k, int) else recall
