"""How well classes are told apart by all modalities, and by every subset of them."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_f1_score, multilabel_f1_score


class SubsetMetrics(Metric):
    """Accuracy, macro F1 and macro AUROC of the outputs of all modalities; accuracy and AUROC of those of each subset.

    A sample counts for a subset where it has at least one of its modalities. AUROC is the mean over the classes that
    some of the counted samples have and some have not, and is left out when there is no such class. Every output is
    kept until the end of the epoch: samples x subsets x classes numbers.

    Args:
        modalities: their names, in the order of the columns of `present`.
        num_classes: at least 2; for `multilabel` at least 1.
        multilabel: whether a sample can have several classes; then accuracy is the share of right decisions at 0.5.
        subsets: whether to look at subsets.

    Attributes:
        members: the modalities of each of the S kinds of outputs; the first one has all.

    Example:
        >>> metric = SubsetMetrics(("image", "audio"), num_classes=2, subsets=False)
        >>> metric.update(torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([0, 1]), torch.ones(2, 2).bool())
        >>> metric.compute()["auroc"]
        tensor(1.)
    """

    full_state_update = False
    scores: list[Tensor]
    label: list[Tensor]
    present: list[Tensor]

    def __init__(
        self, modalities: Sequence[str], num_classes: int, multilabel: bool = False, subsets: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.modalities, self.num_classes, self.multilabel = tuple(modalities), num_classes, multilabel
        self.subsets = subsets
        sizes = range(len(modalities), 0, -1) if subsets else [len(modalities)]
        self.members = [chosen for size in sizes for chosen in combinations(self.modalities, size)]
        for name in ("scores", "label", "present"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, label: Tensor, present: Tensor) -> None:
        """Add samples.

        Args:
            logits: (B, S, C), in the order of `members`.
            label: (B,) int64; for `multilabel` (B, C) of 0 and 1.
            present: (B, M) bool.
        """
        logits = logits.detach().float()
        # Unlike probabilities, logarithms do not all become 1 where the model is sure.
        self.scores.append(logits if self.multilabel else F.log_softmax(logits, dim=-1))
        self.label.append(label)
        self.present.append(present)

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy`, `f1`, `auroc`, and for subsets `subset/image_audio/accuracy` and `/auroc`."""
        scores, label, present = (
            torch.cat(list(state)) if isinstance(state, list) else state
            for state in (self.scores, self.label, self.present)
        )
        found = self._two(scores[:, 0], label, "")
        found["f1"] = self._f1(scores[:, 0], label)
        for number, chosen in enumerate(self.members if self.subsets else ()):
            columns = [self.modalities.index(name) for name in chosen]
            counted = present[:, columns].any(dim=1)
            found |= self._two(scores[counted, number], label[counted], f"subset/{'_'.join(chosen)}/")
        return found

    def _two(self, scores: Tensor, label: Tensor, prefix: str) -> dict[str, Tensor]:
        if len(label) == 0:
            return {}
        right = (scores > 0) == (label > 0.5) if self.multilabel else scores.argmax(dim=1) == label
        found = {f"{prefix}accuracy": right.float().mean()}
        classes = label > 0.5 if self.multilabel else F.one_hot(label, self.num_classes).bool()
        area = macro_auroc(scores, classes)
        return found if area is None else {**found, f"{prefix}auroc": area}

    def _f1(self, scores: Tensor, label: Tensor) -> Tensor:
        if self.multilabel:
            decided, truth = (scores > 0).int(), (label > 0.5).int()
            return multilabel_f1_score(decided, truth, self.num_classes, average="macro")
        return multiclass_f1_score(scores.argmax(dim=1), label, self.num_classes, average="macro")


def macro_auroc(scores: Tensor, positive: Tensor) -> Tensor | None:
    """Return the area under the ROC curve, the mean over the classes with positive and negative samples.

    It is the chance that a positive sample has a higher score than a negative one, ties counted half.

    Args:
        scores: (N, C); NaN gives NaN.
        positive: (N, C) bool.

    Returns:
        A scalar; None when no class has both.

    Example:
        >>> macro_auroc(torch.tensor([[0.1], [0.4], [0.4]]), torch.tensor([[False], [False], [True]]))
        tensor(0.7500)
    """
    positives = positive.sum(dim=0)
    negatives = len(positive) - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return None
    columns = scores.T.contiguous()
    ordered = columns.sort(dim=1).values
    # Twice the ranks, from 2 on, in integers so that nothing is rounded.
    ranks = torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True) + 1
    wins = (ranks * positive.T).sum(dim=1) - positives * (positives + 1)
    areas = wins.float() / (2 * positives * negatives).clamp(min=1).float()
    return torch.where(scores.isnan().any(), torch.nan, areas[both].mean())
