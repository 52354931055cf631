"""Linear classifiers of many tasks at once, fitted to embeddings: each as if it were alone."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.modules.prototypical import prototypes

Kind = Literal["linear", "cosine", "logistic"]

# Logits of cosines lie in [-1, 1], too close together for a softmax to be sure of anything.
_COSINE_SCALE = 10.0

_LOGISTIC_ITERATIONS = 500


class TaskHeads(nn.Module):
    """The heads of T tasks: embeddings (T, N, D) -> logits (T, N, ways).

    Args:
        weight: (T, ways, D).
        cosine: logits are 10 times the cosine of embedding and weight, without a bias.
    """

    def __init__(self, weight: Tensor, cosine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if cosine else nn.Parameter(weight.new_zeros(weight.shape[:2]))

    def forward(self, embeddings: Tensor) -> Tensor:
        if self.bias is None:
            return _COSINE_SCALE * F.normalize(embeddings, dim=-1) @ F.normalize(self.weight, dim=-1).mT
        return embeddings @ self.weight.mT + self.bias.unsqueeze(1)


def new_heads(embeddings: Tensor, label: Tensor, ways: int, kind: Kind) -> TaskHeads:
    """Return heads that have learned nothing: zeros, or for cosines the mean direction of each class.

    Args:
        embeddings: (T, N, D) of the support sets.
        label: (T, N) int64 in 0..ways-1.
        ways: classes of each task.
        kind: `linear`, `cosine` or `logistic`.

    Paper:
        The mean directions: imprinted weights, arXiv:1712.07136.
    """
    embeddings = embeddings.detach()
    if kind == "cosine":
        # A weight of zeros has no direction.
        return TaskHeads(prototypes(F.normalize(embeddings, dim=-1), label, ways), cosine=True)
    return TaskHeads(embeddings.new_zeros(len(embeddings), ways, embeddings.shape[-1]), cosine=False)


def task_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return the sum over tasks of the mean cross-entropy, so that no task changes another's step.

    Args:
        logits: (T, N, ways).
        label: (T, N).
    """
    return F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum") / label.shape[1]


def make_optimizer(
    parameters: list[nn.Parameter], name: Literal["sgd", "adam"], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return SGD with momentum 0.9 or Adam; both act on each weight for itself, so tasks can be stacked."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)


def fit_steps(
    heads: TaskHeads, embeddings: Tensor, label: Tensor, optimizer: torch.optim.Optimizer, record: Sequence[int]
) -> list[TaskHeads]:
    """Take gradient steps on the support sets, and return copies of the heads after each number in `record`."""
    kept = []
    for step in range(record[-1] + 1):
        if step > 0:
            optimizer.zero_grad()
            torch.autograd.backward(task_loss(heads(embeddings), label))
            optimizer.step()
        if step in record:
            kept.append(_copied(heads))
    return kept


def fit_logistic(embeddings: Tensor, label: Tensor, ways: int, strength: float) -> TaskHeads:
    """Return the heads at the minimum of mean cross-entropy + strength / 2 * |weight|^2 (the bias goes free).

    All tasks in one run of L-BFGS with a line search, which reads the loss at each iteration.

    Args:
        embeddings: (T, N, D).
        label: (T, N) int64 in 0..ways-1.
        ways: classes of each task.
        strength: above 0; scikit-learn's C is 1 / (strength * N).
    """
    tasks, samples, _ = embeddings.shape
    heads = new_heads(embeddings, label, ways, "logistic")
    # On accelerators without 64 bits, 32 have to do.
    x = embeddings.detach() if embeddings.device.type == "mps" else embeddings.detach().double()
    target = F.one_hot(label, ways).to(x.dtype)
    weight, bias = x.new_zeros(tasks, ways, x.shape[-1]), x.new_zeros(tasks, ways)
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=_LOGISTIC_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        logits = x @ weight.mT + bias.unsqueeze(1)
        loss = -(target * logits.log_softmax(dim=-1)).sum() / samples + strength / 2 * weight.square().sum()
        torch.autograd.backward(loss)
        return float(loss)

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        heads.weight.copy_(weight)
        assert heads.bias is not None
        heads.bias.copy_(bias - bias.mean(dim=1, keepdim=True))
    return heads


def _copied(heads: TaskHeads) -> TaskHeads:
    copied = TaskHeads(heads.weight.detach().clone(), cosine=heads.bias is None)
    if heads.bias is not None:
        copied.bias = nn.Parameter(heads.bias.detach().clone())
    return copied.requires_grad_(False)
