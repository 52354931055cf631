"""The contrastive losses against pytorch-metric-learning's NTXentLoss: value and gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss

from ds_lightning.functional import info_nce, nt_xent


def rows(count, n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(n, d, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(count)]


def assert_same(mine, theirs, inputs):
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    found, wanted = (torch.autograd.grad(loss, inputs) for loss in (mine, theirs))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


cases = given(
    n=st.integers(2, 40),
    d=st.integers(1, 12),
    seed=st.integers(0, 9999),
    # Lower ones underflow there.
    temperature=st.sampled_from([0.04, 0.07, 0.2, 0.5, 2.0]),
    chunk_size=st.sampled_from([None, 1, 7, 64]),
)


@cases
@settings(deadline=None, max_examples=40, derandomize=True)
def test_nt_xent_is_that_of_pytorch_metric_learning(n, d, seed, temperature, chunk_size):
    first, second = rows(2, n, d, seed)
    judge = NTXentLoss(temperature=temperature)
    theirs = judge(torch.cat([first, second]), torch.arange(n).repeat(2))
    assert_same(nt_xent(first, second, temperature, chunk_size=chunk_size), theirs, (first, second))


@cases
@settings(deadline=None, max_examples=40, derandomize=True)
def test_info_nce_is_that_of_pytorch_metric_learning(n, d, seed, temperature, chunk_size):
    query, key, queue = rows(3, n, d, seed)
    queue = queue.detach()[: seed % (n + 1)]
    judge, label = NTXentLoss(temperature=temperature), torch.arange(n)

    def one_way(rows, columns, more):
        # The queue's rows are of classes that no query has.
        known = torch.cat([label, n + torch.arange(len(more))])
        return judge(rows, label, ref_emb=torch.cat([columns, more]), ref_labels=known)

    theirs = one_way(query, key, queue)
    assert_same(info_nce(query, key, temperature, queue, chunk_size=chunk_size), theirs, (query, key))
    theirs = (one_way(query, key, queue[:0]) + one_way(key, query, queue[:0])) / 2
    mine = info_nce(query, key, temperature, symmetric=True, chunk_size=chunk_size)
    assert_same(mine, theirs, (query, key))


def test_float32_agrees_to_a_millionth():
    first, second = (x.detach().float().requires_grad_() for x in rows(2, 100, 32, 0))
    for temperature in (0.07, 0.5):
        theirs = NTXentLoss(temperature=temperature)(torch.cat([first, second]), torch.arange(100).repeat(2))
        mine = nt_xent(first, second, temperature)
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
        found, wanted = (torch.autograd.grad(loss, (first, second)) for loss in (mine, theirs))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
