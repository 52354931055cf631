"""What a stream of tasks did to a model, from the matrix of its accuracies."""

import torch
from torch import Tensor


def average_accuracy(matrix: Tensor) -> float:
    """Return the mean accuracy on the finished tasks, after the last of them (arXiv 1706.08840).

    Args:
        matrix: (T, T); `matrix[i, j]` is the accuracy on task j after training on task i. In an unfinished stream the
            rows of the tasks to come are NaN, and those tasks count nowhere. Above the diagonal an entry may be NaN.

    Raises:
        ValueError: no row is finished, or an entry that is needed is missing.

    Example:
        >>> average_accuracy(torch.tensor([[0.9, 0.1], [0.7, 0.8]], dtype=torch.float64))
        0.75
    """
    rows = _finished(matrix, least=1)
    last = len(rows) - 1
    return rows[last, : last + 1].mean().item()


def forgetting(matrix: Tensor) -> float:
    """Return the mean over the old tasks of their best earlier accuracy minus the last one (arXiv 1801.10112).

    Earlier is every time before the last task, also before the task itself was trained. It is below 0 where later
    tasks helped.

    Args:
        matrix: (T, T), see `average_accuracy`; at least two rows are finished.

    Raises:
        ValueError: fewer than two rows are finished, or an entry that is needed is missing.

    Example:
        >>> round(forgetting(torch.tensor([[0.9, 0.1], [0.7, 0.8]])), 3)
        0.2
    """
    rows = _finished(matrix, least=2)
    last = len(rows) - 1
    best = rows[:last, :last].nan_to_num(nan=-torch.inf).amax(dim=0)
    return (best - rows[last, :last]).mean().item()


def backward_transfer(matrix: Tensor) -> float:
    """Return the mean over the old tasks of their last accuracy minus that right after them (arXiv 1706.08840).

    Args:
        matrix: (T, T), see `average_accuracy`; at least two rows are finished.

    Raises:
        ValueError: fewer than two rows are finished, or an entry that is needed is missing.

    Example:
        >>> round(backward_transfer(torch.tensor([[0.9, 0.1], [0.7, 0.8]])), 3)
        -0.2
    """
    rows = _finished(matrix, least=2)
    last = len(rows) - 1
    return (rows[last] - rows.diagonal())[:last].mean().item()


def forward_transfer(matrix: Tensor, untrained: Tensor) -> float:
    """Return the mean over tasks 1, 2, ... of the accuracy right before their training, minus the untrained model's.

    Args:
        matrix: (T, T), see `average_accuracy`; at least two rows are finished, with the entry right of the diagonal.
        untrained: (T,), the accuracies before the first step (arXiv 1706.08840).

    Raises:
        ValueError: fewer than two rows are finished, or an entry that is needed is missing.

    Example:
        >>> round(forward_transfer(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([0.1, 0.1])), 3)
        0.2
    """
    rows = _finished(matrix, least=2)
    if untrained.shape != (len(matrix),):
        raise ValueError(f"untrained has shape {tuple(untrained.shape)}; expected ({len(matrix)},), one for each task")
    before = rows.diagonal(offset=1)
    start = untrained[1 : len(rows)].detach().to(rows)
    if not bool(torch.isfinite(before).all() and torch.isfinite(start).all()):
        raise ValueError("forward transfer needs each task's accuracy untrained and right before it; one is missing")
    return (before - start).mean().item()


def largest_drop(matrix: Tensor) -> float:
    """Return the largest fall of an old task's accuracy below its best so far, at any time; 0 when none fell.

    Args:
        matrix: (T, T), see `average_accuracy`; at least two rows are finished.

    Raises:
        ValueError: fewer than two rows are finished, or an entry that is needed is missing.

    Example:
        >>> round(largest_drop(torch.tensor([[0.9, 0.1, 0.1], [0.4, 0.8, 0.1], [0.6, 0.8, 0.7]])), 3)
        0.5
    """
    rows = _finished(matrix, least=2)
    # Above the diagonal a fall is no forgetting, but what was best there counts.
    best = rows.nan_to_num(nan=-torch.inf).cummax(dim=0).values
    return (best - rows).tril(diagonal=-1).max().item()


def _finished(matrix: Tensor, least: int) -> Tensor:
    """Return the square of the finished tasks, (k, k) float64 on the CPU."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; expected (T, T)")
    values = matrix.detach().to("cpu", torch.float64)
    there = int((~values.isnan().all(dim=1)).sum())
    if there < least:
        raise ValueError(f"matrix has {there} finished rows; expected at least {least} for this figure")
    rows = values[:there, :there]
    needed = torch.ones(there, there, dtype=torch.bool).tril()
    if not bool(torch.isfinite(rows[needed]).all()) or bool(rows.isinf().any()):
        place = (~torch.isfinite(rows) & (needed | rows.isinf())).nonzero()[0].tolist()
        raise ValueError(
            f"matrix[{place[0]}, {place[1]}] is {rows[place[0], place[1]].item()}; expected an accuracy: after each "
            "finished task, one for it and for all before it, and no finished row after an unfinished one"
        )
    return rows
