"""How well frozen features tell classes apart: logistic regression and nearest neighbours."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_FOLDS = 5
# With more samples one fold of them tells the decays apart well enough.
_ONE_FOLD_FROM = 2000


def fit_logistic(
    features: Tensor,
    label: Tensor,
    num_classes: int,
    weight_decay: float,
    start: Tensor | None = None,
    max_iter: int = 200,
) -> Tensor:
    """Return the weights of a multinomial logistic regression, by L-BFGS over all samples.

    The objective is the mean cross-entropy plus `weight_decay / 2` times the squared weights, without the bias:
    scikit-learn's `LogisticRegression(C=1 / (weight_decay * N))`. No autograd graph is made.

    Args:
        features: (N, D) floating, of a common scale; the arithmetic is in their dtype.
        label: (N,) int64 in [0, num_classes).
        num_classes: C, at least 2.
        weight_decay: at least 0.
        start: (C, D + 1) where the search begins; zeros by default.
        max_iter: the most steps, at least 1.

    Returns:
        (C, D + 1); the last column is the bias.

    Raises:
        ValueError: shapes that don't fit, or a number out of its range.

    Example:
        >>> x = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]])
        >>> weights = fit_logistic(x, torch.tensor([0, 0, 1, 1]), 2, weight_decay=0.1)
        >>> logistic_scores(weights, x).argmax(dim=1)
        tensor([0, 0, 1, 1])
    """
    _check_samples(features, label)
    for name, value, least in (("num_classes", num_classes, 2), ("max_iter", max_iter, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected an integer >= {least}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is {weight_decay}; expected a finite number >= 0")
    # A search under inference mode would hold tensors that can't be changed in place outside of it.
    with torch.inference_mode(False), torch.no_grad():
        # Inference tensors may not meet the optimizer's.
        x, label = features.clone(), label.clone()
        weights = x.new_zeros(num_classes, x.shape[1] + 1) if start is None else start.to(x, copy=True)
        truth = F.one_hot(label, num_classes).T.to(x)
        search = torch.optim.LBFGS(
            [weights], max_iter=max_iter, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            # Classes come first: with few of them these products and sums are 3 to 9 times as fast on a CPU.
            scores = torch.addmm(weights[:, -1:], weights[:, :-1], x.T)
            total = scores.logsumexp(dim=0)
            loss = (total - scores.gather(0, label[None])[0]).mean()
            error = (scores - total).exp_().sub_(truth).div_(len(x))
            weights.grad = torch.cat(
                [error @ x + weight_decay * weights[:, :-1], error.sum(dim=1, keepdim=True)], dim=1
            )
            return loss + weight_decay / 2 * weights[:, :-1].square().sum()

        search.step(objective)  # type: ignore[no-untyped-call]
        weights.grad = None
        return weights


def logistic_scores(weights: Tensor, features: Tensor) -> Tensor:
    """Return the scores (N, C) of a logistic regression.

    Args:
        weights: (C, D + 1), of `fit_logistic`.
        features: (N, D).
    """
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


def tuned_logistic(
    features: Tensor, label: Tensor, num_classes: int, weight_decays: Sequence[float]
) -> tuple[Tensor, float]:
    """Choose the weight decay on held-out parts of the samples, then fit on all of them.

    Five folds by class; from 2,000 samples on only the first of them is held out. The best accuracy wins, the larger
    decay where there are two. A class of one sample leaves nothing to hold out: then it is the middle decay.

    Args:
        features: (N, D) floating, of a common scale.
        label: (N,) int64 in [0, num_classes).
        num_classes: C, at least 2.
        weight_decays: at least one; see `fit_logistic`.

    Returns:
        The weights (C, D + 1), and the decay.
    """
    _check_samples(features, label)
    decays = sorted(weight_decays, reverse=True)
    if not decays:
        raise ValueError("weight_decays is empty; expected at least one")
    counts = torch.bincount(label, minlength=num_classes)
    best = decays[len(decays) // 2]
    if len(decays) > 1 and int(counts[counts > 0].min()) > 1:
        fold = torch.empty_like(label)
        fold[label.argsort(stable=True)] = torch.arange(len(label), device=label.device) % _FOLDS
        right = dict.fromkeys(decays, 0)
        for held in range(1 if len(label) >= _ONE_FOLD_FROM else _FOLDS):
            rest, weights = fold != held, None
            for decay in decays:
                # From the smooth end to the other, each search begins where the last one ended.
                weights = fit_logistic(features[rest], label[rest], num_classes, decay, weights)
                predicted = logistic_scores(weights, features[~rest]).argmax(dim=1)
                right[decay] += int((predicted == label[~rest]).sum())
        best = max(decays, key=lambda decay: right[decay])
    return fit_logistic(features, label, num_classes, best), best


def knn_label(
    features: Tensor,
    label: Tensor,
    query: Tensor,
    num_classes: int,
    k: int,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> Tensor:
    """Classify by the nearest neighbours' vote, weighted by `exp(cosine / temperature)` (arXiv 1805.01978).

    Args:
        features: (N, D) of the labelled samples.
        label: (N,) int64 in [0, num_classes).
        query: (M, D).
        num_classes: C, at least 1.
        k: neighbours that vote, at least 1; all samples when there are fewer.
        temperature: above 0.
        chunk_size: queries at a time, at least 1; memory is chunk_size x N.

    Returns:
        (M,) int64.

    Raises:
        ValueError: shapes that don't fit, or a number out of its range.

    Example:
        >>> knn_label(torch.eye(2), torch.tensor([1, 0]), torch.tensor([[0.9, 0.1]]), num_classes=2, k=1)
        tensor([1])
    """
    _check_samples(features, label)
    for name, value in (("k", k), ("chunk_size", chunk_size), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected an integer >= 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    keys = F.normalize(features, dim=1)
    found = [query.new_empty(0, dtype=torch.int64)]
    for part in torch.split(query, chunk_size):
        near = (F.normalize(part, dim=1) @ keys.T).topk(min(k, len(keys)), dim=1)
        votes = part.new_zeros(len(part), num_classes)
        # Only ratios count: from the nearest one down, so that nothing overflows.
        weight = ((near.values - near.values[:, :1]) / temperature).exp()
        votes.scatter_add_(1, label[near.indices], weight)
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def label_subset(label: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose a share of each class, at least one sample of it; a smaller share is part of a larger one.

    Args:
        label: (N,) int64, at least 0.
        fraction: in (0, 1].
        seed: of the choice.

    Returns:
        Indices in rising order, int64 on the label's device.

    Raises:
        ValueError: fraction out of its range.

    Example:
        >>> label = torch.tensor([0] * 10 + [1] * 4)
        >>> label[label_subset(label, 0.2, seed=0)]
        tensor([0, 0, 1])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected a share in (0, 1]")
    host = label.cpu()
    shuffled = torch.randperm(len(host), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[host[shuffled].argsort(stable=True)]
    counts = torch.bincount(host)
    kind = host[grouped]
    place = torch.arange(len(host)) - (counts.cumsum(0) - counts)[kind]
    wanted = (counts * fraction).round().long().clamp(min=1)
    return grouped[place < wanted[kind]].sort().values.to(label.device)


def _check_samples(features: Tensor, label: Tensor) -> None:
    if features.dim() != 2 or label.shape != features.shape[:1] or len(features) == 0:
        raise ValueError(
            f"features have the shape {tuple(features.shape)} and label {tuple(label.shape)}; expected (N, D) and "
            "(N,), N at least 1"
        )
