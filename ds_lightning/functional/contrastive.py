"""Contrastive losses whose memory grows with the batch, not with its square."""

import math

import torch
from torch import Tensor

from ds_lightning.functional._contrastive_checks import (
    check_embeddings,
    check_settings,
    temperature_value,
    unit_rows,
    warn_alone,
)
from ds_lightning.functional._contrastive_matmul import product_dtype
from ds_lightning.functional._contrastive_negatives import Excluded
from ds_lightning.functional._contrastive_rows import RowLoss
from ds_lightning.functional._contrastive_tiles import SymmetricLoss
from ds_lightning.functional._never_compiled import never_compiled
from ds_lightning.functional.gathering import gather_rows, rank, world_size

# The largest logit, 1 / temperature, for which exp() and its sums stay far from overflow and underflow.
_BOUNDED_LOGITS = {torch.float32: 40.0, torch.float64: 300.0}


# A loop over tiles, unrolled into a graph, would take minutes to compile.
@never_compiled
def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: float | Tensor,
    *,
    chunk_size: int | None = None,
    same: Tensor | None = None,
    hardness: float = 0.0,
    gather: bool = False,
) -> Tensor:
    """SimCLR's loss over two views of each sample (NT-Xent, arXiv 2002.05709, algorithm 1).

    Each of the 2 N views has one positive, the other view of its sample, and 2 (N - 1) negatives. The gradient
    is computed together with the loss, tile by tile, so no (2 N, 2 N) matrix is ever stored. Half precision is
    computed in float32; bfloat16 inputs on a GPU are multiplied in bfloat16 with float32 sums. A second
    derivative is refused, and `torch.compile` breaks its graph here.

    Args:
        first: embeddings of the first views, shape (N, D), floating, of any length: normalised here. A row of
            zeros has similarity 0 to all and no gradient.
        second: embeddings of the second views, shape (N, D), row for row the samples of `first`.
        temperature: greater than 0; a scalar tensor may be learned (its value is checked on the CPU only).
        chunk_size: side of a tile, or rows at a time with `hardness`, `gather` or a temperature under 0.025;
            at least 1. None takes what was fastest.
        same: samples that show the same thing, whose views are no negatives of each other: their ids,
            shape (N,), int64, or a symmetric matrix, shape (N, N), bool. A positive always stays.
        hardness: at least 0. Negatives are weighted by exp(hardness * similarity / temperature), normalised to
            mean one for each view (beta of arXiv 2010.04592, whose similarity is divided by the temperature too).
        gather: under a process group, take the negatives from all ranks (see `gather_rows`).

    Returns:
        The mean over the 2 N views, a scalar in float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype or value.

    Example:
        >>> eye = torch.eye(2)
        >>> nt_xent(eye, eye, temperature=1.0)  # log(e + 2) - 1
        tensor(0.5514)
    """
    check_embeddings(first, second, "first", "second")
    check_settings(temperature, chunk_size, same, hardness, gather, first)
    product = product_dtype(first)
    bound = temperature_value(temperature)
    ranks = world_size() if gather else 1
    if len(first) * ranks == 1:
        warn_alone(stacklevel=3)
    if ranks == 1 and hardness == 0 and bound is not None and bound * _BOUNDED_LOGITS[_wide(first)] >= 1:
        z = unit_rows(torch.cat([first, second])) * _inverse(temperature, 0.5)
        size = chunk_size or _default_tile(z)
        excluded = _two_view_exclusion(len(first), (0, len(first), -len(first)), same, None)
        loss: Tensor = SymmetricLoss.apply(z, excluded, size, product)
        return loss

    views = [unit_rows(view) for view in (first, second)]
    columns = torch.cat([gather_rows(view) if ranks > 1 else view for view in views])
    own = len(first) * rank() if ranks > 1 else 0
    other = own + len(first) * ranks
    everyone = gather_rows(same) if same is not None and ranks > 1 else same
    excluded = _two_view_exclusion(len(first), (own, other), same, everyone)
    scale = _inverse(temperature, 1.0)
    size = chunk_size or _default_rows(columns)
    losses = [
        RowLoss.apply(view * scale, columns, positive, excluded, float(hardness), size, product)
        for view, positive in zip(views, (other, own), strict=True)
    ]
    mean: Tensor = (losses[0] + losses[1]) / 2
    return mean


@never_compiled
def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    queue: Tensor | None = None,
    *,
    symmetric: bool = False,
    chunk_size: int | None = None,
    same: Tensor | None = None,
    queue_same: Tensor | None = None,
    hardness: float = 0.0,
    gather: bool = False,
) -> Tensor:
    """InfoNCE: find each query's own key among all keys and a queue (arXiv 1807.03748, 1911.05722, 2103.00020).

    Row i's positive is key i. The loss is computed a chunk of rows at a time, and its gradient with it: no
    (N, N + K) matrix is stored. For precision and second derivatives see `nt_xent`.

    Args:
        query: shape (N, D), floating, of any length: normalised here.
        key: shape (N, D).
        temperature: greater than 0; a scalar tensor may be learned (its value is checked on the CPU only).
        queue: more negatives, shape (K, D), such as the keys of earlier batches (MoCo); the same on each rank.
        symmetric: average with the loss of keys that look for their query (CLIP); not with a queue.
        chunk_size: rows at a time, at least 1. None takes what was fastest.
        same: samples that show the same thing, no negatives of each other: ids, shape (N,), int64, or a
            matrix, shape (N, N), bool (row: query, column: key). A positive always stays.
        queue_same: ids of the queue's rows, shape (K,), int64, with ids in `same`. Without it, the whole queue
            is negative.
        hardness: at least 0. Negatives are weighted by exp(hardness * similarity / temperature), normalised to
            mean one for each row (beta of arXiv 2010.04592).
        gather: under a process group, take the keys of all ranks (see `gather_rows`).

    Returns:
        The mean over the N rows, a scalar in float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype, value or combination.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)  # log(e + 1) - 1
        tensor(0.3133)
    """
    check_embeddings(query, key, "query", "key")
    check_settings(temperature, chunk_size, same, hardness, gather, query)
    _check_queue(query, queue, symmetric, same, queue_same)
    queries, keys = unit_rows(query), unit_rows(key)
    ranks = world_size() if gather else 1
    if len(query) * ranks == 1 and (queue is None or len(queue) == 0):
        warn_alone(stacklevel=3)
    own = len(query) * rank() if ranks > 1 else 0
    everyone = gather_rows(same) if same is not None and ranks > 1 else same
    scale = _inverse(temperature, 1.0)

    def one_way(rows: Tensor, columns: Tensor, matrix: Tensor | None) -> Tensor:
        columns = gather_rows(columns) if ranks > 1 else columns
        if queue is not None:
            columns = torch.cat([columns, unit_rows(queue).to(columns.dtype)])
        ids = everyone if queue_same is None or everyone is None else torch.cat([everyone, queue_same])
        by_id = same is not None and same.ndim == 1
        excluded = Excluded((own,), same if by_id else None, ids if by_id else None, None if by_id else matrix)
        size = chunk_size or _default_rows(columns)
        product = product_dtype(query)
        loss: Tensor = RowLoss.apply(rows * scale, columns, own, excluded, float(hardness), size, product)
        return loss

    loss = one_way(queries, keys, same)
    if symmetric:
        turned = same.T if same is not None and same.ndim == 2 else same
        loss = (loss + one_way(keys, queries, turned)) / 2
    return loss


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _inverse(temperature: float | Tensor, power: float) -> float | Tensor:
    if isinstance(temperature, Tensor):
        # Zero-dimensional: a float64 temperature then leaves float32 embeddings as they are.
        return temperature.reshape(()).to(torch.promote_types(temperature.dtype, torch.float32)).pow(-power)
    return math.pow(temperature, -power)


def _default_tile(z: Tensor) -> int:
    return 384 if z.device.type == "cpu" else 4096


def _default_rows(columns: Tensor) -> int:
    # About 8 MiB of logits on the CPU, 256 MiB on a GPU.
    budget = 1 << (21 if columns.device.type == "cpu" else 26)
    return max(16, budget // max(1, len(columns)))


def _two_view_exclusion(n: int, diagonals: tuple[int, ...], same: Tensor | None, everyone: Tensor | None) -> Excluded:
    if same is None:
        return Excluded(diagonals)
    if same.ndim == 2:
        return Excluded(diagonals, matrix=same | same.T, repeats=2)
    # Row n of a symmetric loss is the second view of sample 0; the rows of a one-sided loss end at n.
    return Excluded(diagonals, same.repeat(2), (same if everyone is None else everyone).repeat(2))


def _check_queue(
    query: Tensor, queue: Tensor | None, symmetric: bool, same: Tensor | None, queue_same: Tensor | None
) -> None:
    if queue is None:
        if queue_same is not None:
            raise ValueError("queue_same was given without a queue; give both or neither")
        return
    if symmetric:
        raise ValueError("symmetric=True with a queue: the queue holds keys only; use one of them")
    if queue.ndim != 2 or queue.shape[1] != query.shape[1] or not queue.is_floating_point():
        raise ValueError(
            f"queue is {queue.dtype} of shape {tuple(queue.shape)}; expected floating (K, {query.shape[1]}) as query"
        )
    if queue.device != query.device:
        raise ValueError(f"queue is on {queue.device}, query on {query.device}; move it")
    if queue_same is not None and (same is None or same.ndim != 1 or queue_same.shape != queue.shape[:1]):
        raise ValueError(
            f"queue_same has shape {tuple(queue_same.shape)}; expected one id for each of the {len(queue)} rows of "
            "the queue, together with ids of shape (N,) in same"
        )
