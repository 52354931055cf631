from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ds_lightning.functional.probes import fit_logistic, knn_label, label_subset, logistic_scores, tuned_logistic


def blobs(samples: int, features: int, classes: int, seed: int, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(samples) % classes
    centre = distance * torch.randn(classes, features, generator=generator, dtype=torch.float64)
    return centre[label] + torch.randn(samples, features, generator=generator, dtype=torch.float64), label


@pytest.mark.parametrize("weight_decay", [1e-3, 0.1])
def test_the_weights_are_those_of_scikit_learn(weight_decay: float) -> None:
    x, label = blobs(120, 5, 3, seed=0)
    weights = fit_logistic(x, label, 3, weight_decay)
    truth = LogisticRegression(C=1 / (weight_decay * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), label.numpy())
    assert torch.allclose(weights[:, :-1], torch.from_numpy(truth.coef_), atol=2e-4)
    # The bias is free up to a constant for all classes.
    bias = weights[:, -1] - weights[:, -1].mean()
    assert torch.allclose(bias, torch.from_numpy(truth.intercept_ - truth.intercept_.mean()), atol=2e-4)
    scores = logistic_scores(weights, x).softmax(dim=1)
    assert torch.allclose(scores, torch.from_numpy(truth.predict_proba(x.numpy())), atol=1e-4)


def test_the_gradient_vanishes_and_a_start_at_the_end_stays() -> None:
    x, label = blobs(60, 4, 3, seed=1)
    weights = fit_logistic(x, label, 3, 0.01).requires_grad_()
    scores = x @ weights[:, :-1].T + weights[:, -1]
    loss = torch.nn.functional.cross_entropy(scores, label) + 0.005 * weights[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 2e-5
    again = fit_logistic(x, label, 3, 0.01, start=weights.detach())
    assert torch.allclose(again, weights, atol=1e-3)


def test_it_works_where_no_gradients_are_kept_and_leaves_the_input_alone() -> None:
    x, label = blobs(30, 3, 2, seed=2)
    before = x.clone()
    with torch.inference_mode():
        weights = fit_logistic(x * 1, label * 1, 2, 0.1)
    assert torch.equal(weights, fit_logistic(x, label, 2, 0.1))
    assert torch.equal(x, before)
    assert not weights.requires_grad
    assert weights.grad is None


def test_the_decay_is_chosen_on_samples_that_were_held_out() -> None:
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(60) % 2
    # One feature tells the classes apart, a hundred are noise: without a penalty the noise is learned.
    x = torch.randn(60, 100, generator=generator)
    x[:, 0] += 2 * (label * 2 - 1)
    weights, decay = tuned_logistic(x, label, 2, [1e-6, 1.0])
    assert decay == 1.0
    assert torch.equal(weights, fit_logistic(x, label, 2, 1.0))
    # And where the truth is steep, a strong penalty would lose: the middle class lies in a narrow band.
    steep = torch.linspace(-1, 1, 90)[:, None]
    bands = (steep[:, 0] > -0.1).long() + (steep[:, 0] > 0.1).long()
    assert tuned_logistic(steep, bands, 3, [1e-6, 1.0])[1] == 1e-6


def test_one_sample_a_class_leaves_nothing_to_hold_out() -> None:
    x, label = blobs(4, 3, 4, seed=4)
    assert tuned_logistic(x, label, 4, [1.0, 1e-4, 0.1])[1] == 0.1


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 15), st.integers(1, 4), st.integers(0, 1000))
def test_neighbours_vote_as_in_a_double_loop(samples: int, queries: int, k: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    query = torch.randn(queries, 3, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (samples,), generator=generator)
    found = knn_label(x, label, query, 3, k, temperature=0.5, chunk_size=chunk)
    for one, kind in zip(query, found.tolist(), strict=True):
        cosines = [float(one @ other / one.norm() / other.norm()) for other in x]
        order = sorted(range(samples), key=lambda index: -cosines[index])[:k]
        votes: Counter[int] = Counter()
        for index in order:
            votes[int(label[index])] += 2.718281828459045 ** (cosines[index] / 0.5)  # type: ignore[assignment]
        assert votes[kind] == pytest.approx(max(votes.values()))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0.01, 1.0), st.integers(0, 5))
def test_a_share_has_its_part_of_each_class(kinds: list[int], fraction: float, seed: int) -> None:
    label = torch.tensor(kinds)
    chosen = label_subset(label, fraction, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    taken, there = Counter(label[chosen].tolist()), Counter(kinds)
    for kind, count in there.items():
        assert taken[kind] == max(1, round(count * fraction)) or abs(taken[kind] - count * fraction) <= 0.5 + 1e-4
    larger = label_subset(label, min(1.0, fraction * 2), seed)
    assert set(chosen.tolist()) <= set(larger.tolist())
    assert torch.equal(chosen, label_subset(label, fraction, seed))
    assert label_subset(label, 1.0, seed).tolist() == list(range(len(kinds)))


def test_errors_name_the_thing() -> None:
    x, label = blobs(6, 2, 2, seed=5)
    with pytest.raises(ValueError, match="weight_decay is -1; expected a finite number >= 0"):
        fit_logistic(x, label, 2, -1)
    with pytest.raises(ValueError, match="num_classes is 1; expected an integer >= 2"):
        fit_logistic(x, label, 1, 0.1)
    with pytest.raises(ValueError, match=r"shape \(6, 2\) and label \(5,\); expected \(N, D\)"):
        fit_logistic(x, label[:5], 2, 0.1)
    with pytest.raises(ValueError, match="weight_decays is empty"):
        tuned_logistic(x, label, 2, [])
    with pytest.raises(ValueError, match="k is 0; expected an integer >= 1"):
        knn_label(x, label, x, 2, 0)
    with pytest.raises(ValueError, match="temperature is 0; expected a number > 0"):
        knn_label(x, label, x, 2, 1, temperature=0)
    with pytest.raises(ValueError, match=r"fraction is 0; expected a share in \(0, 1\]"):
        label_subset(label, 0, 0)
