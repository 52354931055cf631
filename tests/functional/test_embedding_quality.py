"""Alignment, uniformity, effective rank and recall against loops and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.functional import alignment, effective_rank, embedding_quality, recall_at, uniformity


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@given(n=st.integers(2, 9), d=st.integers(1, 5), seed=st.integers(0, 99), piece=st.sampled_from([1, 20, 10**6]))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_all_are_their_definitions(n, d, seed, piece):
    first, second = rows(n, d, seed), rows(n, d, seed + 100)
    a, b = ([x / x.norm() for x in view] for view in (first, second))
    apart = [math.dist(p.tolist(), q.tolist()) ** 2 for p, q in zip(a, b, strict=True)]
    assert alignment(first, second).item() == pytest.approx(sum(apart) / n, abs=1e-12)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_quality, "_ENTRIES", piece)
        spread, recall = uniformity(first), recall_at(first, second, [1, 2, n])
    pairs = [math.exp(-2 * math.dist(a[i].tolist(), a[j].tolist()) ** 2) for i in range(n) for j in range(i)]
    assert spread.item() == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-9)

    shares = torch.linalg.svdvals(first)
    shares = [s / shares.sum().item() for s in shares.tolist() if s > 0]
    entropy = -sum(s * math.log(s) for s in shares)
    assert effective_rank(first).item() == pytest.approx(math.exp(entropy), abs=1e-5)

    if d == 1:  # every similarity is 1 or -1: only ties
        return
    places = [sum(a[i] @ b[j] > a[i] @ b[i] for j in range(n) if j != i) for i in range(n)]
    assert recall.tolist() == pytest.approx([sum(int(p < k) for p in places) / n for k in (1, 2, n)])


def test_closed_forms():
    eye = torch.eye(4)
    assert alignment(eye, -2 * eye) == 4
    assert uniformity(eye).item() == pytest.approx(-4)
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-5)
    assert effective_rank(7 * eye).item() == pytest.approx(4)
    assert effective_rank(torch.ones(50, 8)).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 3)) == 0
    wide = torch.zeros(2, 300)
    wide[0, 0], wide[1, 1] = 1, 1
    assert effective_rank(wide).item() == pytest.approx(2)


def test_recall_of_collapsed_or_broken_embeddings_is_zero():
    eye = torch.eye(4)
    assert recall_at(eye, eye, 1) == 1
    assert recall_at(eye, eye.roll(1, 0), 1) == 0
    same = torch.zeros(50, 4)
    same[:, 0] = 1
    assert recall_at(same, same, 10) == 0
    assert recall_at(torch.full((5, 3), torch.nan), eye[:1, :3].expand(5, 3), 1) == 0


def test_gradients_flow_through_alignment_and_uniformity():
    first, second = rows(4, 3, 0).requires_grad_(), rows(4, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(alignment, (first, second))
    assert torch.autograd.gradcheck(uniformity, (first,))


def test_half_precision_gives_float32():
    x = rows(6, 3, 0)
    for measure in (lambda x: alignment(x, x.flip(0)), uniformity, effective_rank):
        value = measure(x.bfloat16())
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(measure(x).item(), rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniformity(torch.ones(1, 3)), "x has one row"),
        (lambda: alignment(torch.ones(2, 3), torch.ones(3, 3)), "expected the same shape"),
        (lambda: effective_rank(torch.ones(3)), r"x has shape \(3,\)"),
        (lambda: recall_at(torch.ones(2, 3), torch.ones(2, 3), 0), "k is 0; expected at least 1"),
        (lambda: recall_at(torch.ones(2, 3), torch.ones(2, 3), []), r"k is \[\]; expected at least 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
