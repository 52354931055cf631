import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

from ds_lightning.modules.subset_metrics import SubsetMetrics, macro_auroc


def by_pairs(scores: Tensor, positive: Tensor) -> float | None:
    areas = []
    for column in range(scores.shape[1]):
        high = scores[positive[:, column], column].tolist()
        low = scores[~positive[:, column], column].tolist()
        if high and low:
            wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
            areas.append(wins / (len(high) * len(low)))
    return sum(areas) / len(areas) if areas else None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**31))
def test_auroc_is_the_share_of_pairs_in_order(samples: int, classes: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels give ties.
    scores = torch.randint(0, levels, (samples, classes), generator=generator).float()
    positive = torch.rand(samples, classes, generator=generator) > 0.5
    found, expected = macro_auroc(scores, positive), by_pairs(scores, positive)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_auroc_of_nan_is_nan() -> None:
    area = macro_auroc(torch.tensor([[0.1], [math.nan], [0.3]]), torch.tensor([[True], [False], [False]]))
    assert area is not None
    assert math.isnan(area)


def test_a_class_without_samples_does_not_count() -> None:
    metric = SubsetMetrics(("image",), 3, subsets=False)
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.5, 0.0, 0.1]])
    metric.update(logits[:, None], torch.tensor([0, 1, 0]), torch.ones(3, 1, dtype=torch.bool))
    assert metric.compute()["auroc"] == 1.0


def test_no_auroc_of_one_class_alone() -> None:
    metric = SubsetMetrics(("image",), 2, subsets=False)
    metric.update(torch.zeros(4, 1, 2), torch.zeros(4, dtype=torch.long), torch.ones(4, 1, dtype=torch.bool))
    assert set(metric.compute()) == {"accuracy", "f1"}


def test_sure_outputs_keep_their_order() -> None:
    # As float32 probabilities all four are exactly 1 or 0.
    logits = torch.tensor([[40.0, 0.0], [45.0, 0.0], [60.0, 0.0], [70.0, 0.0]])
    metric = SubsetMetrics(("image",), 2, subsets=False)
    metric.update(logits[:, None], torch.tensor([1, 1, 0, 0]), torch.ones(4, 1, dtype=torch.bool))
    # Class 1's logarithms are in order; class 0's are all 0.
    assert metric.compute()["auroc"] >= 0.75


@pytest.mark.parametrize("multilabel", [False, True])
def test_every_subset_equals_scikit_learn(multilabel: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    metric = SubsetMetrics(("image", "audio", "text"), 3, multilabel)
    assert metric.members[0] == ("image", "audio", "text")
    assert len(metric.members) == len(set(metric.members)) == 7
    logits = torch.randn(40, 7, 3, generator=generator)
    present = torch.rand(40, 3, generator=generator) > 0.5
    label = torch.randint(0, 3, (40,), generator=generator)
    if multilabel:
        label = (torch.rand(40, 3, generator=generator) > 0.5).float()
    for rows in (slice(0, 15), slice(15, 40)):
        metric.update(logits[rows], label[rows], present[rows])
    found = metric.compute()

    def accuracy_and_area(number: int, rows: Tensor) -> tuple[float, float]:
        mine, truth = logits[rows, number].double(), label[rows]
        if multilabel:
            return ((mine > 0) == (truth > 0)).double().mean().item(), roc_auc_score(truth, mine)
        area = roc_auc_score(truth, mine.softmax(1), multi_class="ovr", average="macro")
        return (mine.argmax(1) == truth).double().mean().item(), area

    assert (found["accuracy"], found["auroc"]) == pytest.approx(accuracy_and_area(0, torch.arange(40)), abs=1e-6)
    decided = (logits[:, 0] > 0).int() if multilabel else logits[:, 0].argmax(1)
    assert found["f1"] == pytest.approx(f1_score(label, decided, average="macro"), abs=1e-6)
    for number, members in enumerate(metric.members):
        rows = torch.tensor([i for i in range(40) if any(present[i, metric.modalities.index(m)] for m in members)])
        name = f"subset/{'_'.join(members)}"
        pair = (found[f"{name}/accuracy"], found[f"{name}/auroc"])
        assert pair == pytest.approx(accuracy_and_area(number, rows), abs=1e-6)
    assert len(found) == 3 + 2 * 7
