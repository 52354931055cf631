"""The contrastive losses against double loops written from the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ds_lightning.errors import NoEffectWarning
from ds_lightning.functional import _contrastive_tiles, info_nce, nt_xent


def weighted(logits, hardness):
    """Sum of exp(logit) over the negatives, hard ones weighted, the weights' mean being one."""
    if not logits:
        return 0.0
    logits = torch.stack(logits)
    weights = (hardness * logits).exp()
    return (weights / weights.mean() * logits.exp()).sum()


def simclr(first, second, temperature, same=None, hardness=0.0):
    """Algorithm 1 of arXiv 2002.05709: views 2k and 2k - 1 belong together; one pair (i, j) at a time."""
    n = len(first)
    z = [view for pair in zip(first, second, strict=True) for view in pair]
    s = [[a @ b / (a.norm() * b.norm()) / temperature for b in z] for a in z]

    def ell(i, j):
        negatives = [
            s[i][k] for k in range(2 * n) if k not in (i, j) and not (same is not None and same[i // 2][k // 2])
        ]
        # The fraction's logarithm, taken apart: at low temperatures its own gradient underflows.
        return torch.log(s[i][j].exp() + weighted(negatives, hardness)) - s[i][j]

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


def one_way(query, key, temperature, queue=(), same=None, queue_same=None, hardness=0.0):
    """InfoNCE, one row and one key at a time."""
    total = 0
    for i, q in enumerate(query):
        logits = [q @ k / (q.norm() * k.norm()) / temperature for k in (*key, *queue)]
        skip = [j < len(key) and same is not None and bool(same[i][j]) for j in range(len(logits))]
        if queue_same is not None:
            skip[len(key) :] = [bool(b) for b in queue_same[i]]
        negatives = [x for j, x in enumerate(logits) if j != i and not skip[j]]
        total += torch.log(logits[i].exp() + weighted(negatives, hardness)) - logits[i]
    return total / len(query)


def leaves(n, d, seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(n, d, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(count)]


def assert_same(got, want, inputs):
    assert abs(got.item() - want.item()) <= 1e-12 * max(1.0, abs(want.item()))
    if not want.requires_grad:
        return
    pairs = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True)
    for mine, loop in pairs:
        assert (mine - loop).abs().max() <= 1e-11 * (1 + loop.abs().max())


cases = given(
    n=st.integers(1, 7),
    d=st.integers(1, 5),
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.004, 0.07, 0.5, 3.0]),
    chunk_size=st.sampled_from([None, 1, 3, 4, 50]),
    hardness=st.sampled_from([0.0, 0.0, 0.6]),
    mask=st.sampled_from([None, "ids", "matrix"]),
)


@pytest.mark.filterwarnings("ignore:a batch of one")
@cases
@settings(deadline=None, max_examples=40, derandomize=True)
def test_nt_xent_is_simclrs_algorithm(n, d, seed, temperature, chunk_size, hardness, mask):
    first, second = leaves(n, d, seed)
    learned = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(n) * seed % 3
    same = None if mask is None else ids[:, None] == ids
    given_same = {"ids": ids, "matrix": same, None: None}[mask]
    got = nt_xent(first, second, learned, chunk_size=chunk_size, same=given_same, hardness=hardness)
    want = simclr(first, second, learned, same, hardness)
    assert_same(got, want, (first, second, learned))


@pytest.mark.filterwarnings("ignore:a batch of one")
@cases
@settings(deadline=None, max_examples=40, derandomize=True)
def test_info_nce_is_the_double_loop(n, d, seed, temperature, chunk_size, hardness, mask):
    query, key, queue = leaves(n, d, seed, 3)
    queue = queue.detach()[: seed % (n + 1)]
    learned = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    ids, queue_ids = torch.arange(n) * seed % 3, torch.arange(len(queue)) % 4
    same = None if mask is None else ids[:, None] == ids
    given_same = {"ids": ids, "matrix": same, None: None}[mask]
    options = {"chunk_size": chunk_size, "same": given_same, "hardness": hardness}
    both = mask == "ids"
    got = info_nce(query, key, learned, queue, queue_same=queue_ids if both else None, **options)
    queue_same = ids[:, None] == queue_ids if both else None
    assert_same(got, one_way(query, key, learned, queue, same, queue_same, hardness), (query, key, learned))

    got = info_nce(query, key, learned, symmetric=True, **options)
    forth = one_way(query, key, learned, (), same, None, hardness)
    assert_same(got, (forth + one_way(key, query, learned, (), same, None, hardness)) / 2, (query, key, learned))


def test_a_matrix_that_is_not_symmetric_is_turned_for_the_way_back():
    query, key = leaves(4, 3, 0)
    same = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    got = info_nce(query, key, 0.3, symmetric=True, same=same)
    want = (one_way(query, key, 0.3, (), same) + one_way(key, query, 0.3, (), same.T)) / 2
    assert_same(got, want, (query, key))


@pytest.mark.parametrize("hardness", [0.0, 0.8])
@pytest.mark.parametrize("temperature", [0.5, 0.002])
def test_gradients_by_finite_differences(temperature, hardness):
    inputs = (*leaves(5, 3, 1), torch.tensor(temperature, dtype=torch.float64, requires_grad=True))
    step = 1e-3 * temperature**2
    queue = leaves(2, 3, 2)[0].detach()

    def checked(function):
        return torch.autograd.gradcheck(function, inputs, eps=step, atol=1e-5, rtol=1e-4)

    assert checked(lambda a, b, t: nt_xent(a, b, t, chunk_size=3, hardness=hardness))
    assert checked(lambda a, b, t: info_nce(a, b, t, queue, chunk_size=2, hardness=hardness))


def test_closed_forms():
    points = torch.ones(6, 4, dtype=torch.float64)
    assert nt_xent(points, points, 0.3).item() == pytest.approx(math.log(11), abs=1e-13)
    assert info_nce(points, points, 0.3, points[:5]).item() == pytest.approx(math.log(11), abs=1e-13)
    eye = torch.eye(4, dtype=torch.float64)
    assert nt_xent(eye, eye, 0.5).item() == pytest.approx(math.log(math.exp(2) + 6) - 2, abs=1e-13)


@pytest.mark.parametrize("kept", [0, 3 * 64 * 64 * 4, 1 << 23])
def test_tiles_kept_or_computed_again_give_the_full_matrix(kept, monkeypatch):
    monkeypatch.setattr(_contrastive_tiles, "KEPT_BYTES", kept)
    first, second = (x.float().detach().repeat(1, 9).requires_grad_() for x in leaves(150, 3, 4))
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(300, dtype=torch.bool), float("-inf"))
    want = F.cross_entropy(logits, torch.arange(300).roll(150))
    got = nt_xent(first, second, 0.2, chunk_size=64)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-6)
    for mine, plain in zip(
        torch.autograd.grad(got, (first, second)), torch.autograd.grad(want, (first, second)), strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.026, 0.024, 0.0005])
def test_float32_at_low_temperatures_is_float64_rounded(temperature):
    first, second = leaves(40, 8, 3)
    first, second = (torch.cat([x, -x]).detach() for x in (first, second))
    exact = [x.clone().requires_grad_() for x in (first, second)]
    single = [x.float().requires_grad_() for x in (first, second)]
    for loss in (nt_xent, info_nce):
        want, got = loss(*exact, temperature), loss(*single, temperature)
        torch.testing.assert_close(got.double(), want, atol=0, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(got, single), torch.autograd.grad(want, exact), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4 * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    half = [x.detach().to(dtype).requires_grad_() for x in leaves(6, 5, 5)]
    single = [x.detach().float().requires_grad_() for x in half]
    for loss in (nt_xent, info_nce):
        got, want = loss(*half, 0.1), loss(*single, 0.1)
        assert got.dtype == torch.float32
        assert got == want
        # As under a gradient scaler: small gradients must not vanish before they are scaled.
        got, want = torch.autograd.grad(got * 4096, half), torch.autograd.grad(want * 4096, single)
        assert [g.dtype for g in got] == [dtype, dtype]
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got, want, strict=True))


def test_autocast_changes_nothing():
    first, second = (x.detach().float().requires_grad_() for x in leaves(6, 5, 6))
    for loss in (nt_xent, info_nce):
        plain = loss(first, second, 0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = loss(first, second, 0.1)
        assert mixed == plain
        got, want = (torch.autograd.grad(x, (first, second)) for x in (mixed, plain))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries of any tensor that an operation returned."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("n", [300, 600])
def test_no_tensor_grows_with_the_square_of_the_batch(n):
    chunk, d = 32, 8
    first, second = (x.detach().float().requires_grad_() for x in leaves(n, d, 7))
    with LargestTensor() as symmetric:
        nt_xent(first, second, 0.1, chunk_size=chunk).backward()
    assert symmetric.entries <= max(2 * chunk * chunk, 2 * n * d)
    with LargestTensor() as rows:
        info_nce(first, second, 0.1, chunk_size=chunk).backward()
    assert rows.entries <= chunk * n


def test_what_needs_no_gradient_gets_none():
    query, key = leaves(4, 3, 8)
    nt_xent(query, key.detach(), 0.1).backward()
    alone = query.grad.clone()
    torch.testing.assert_close(alone, torch.autograd.grad(simclr(query, key, 0.1), query)[0])
    assert key.grad is None
    query.grad = None
    info_nce(query, key.detach(), 0.1, key.detach()).backward()
    assert query.grad is not None
    with torch.no_grad():
        value = nt_xent(query, key, 0.1)
    assert not value.requires_grad
    assert value == nt_xent(query, key, 0.1)


def test_a_row_of_zeros_and_the_length_of_rows():
    first, second = leaves(4, 3, 9)
    with torch.no_grad():
        first[1] = 0
    loss = nt_xent(first, second, 0.1)
    grads = torch.autograd.grad(loss, (first, second))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][1] == 0).all()
    tiny, huge = (first.detach().float() * scale for scale in (1e-30, 1e30))
    expected = nt_xent(first.detach().float(), second.detach().float(), 0.1)
    for scaled in (tiny, huge):
        torch.testing.assert_close(nt_xent(scaled, second.detach().float(), 0.1), expected)


def test_a_batch_of_one_warns():
    first, second = leaves(1, 3, 10)
    for loss in (nt_xent, info_nce):
        with pytest.warns(NoEffectWarning, match="a batch of one sample has no negatives"):
            value = loss(first, second, 0.1)
        assert value == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, (first, second)))


def test_a_second_derivative_is_refused():
    first, second = leaves(3, 3, 11)
    for loss in (nt_xent, info_nce):
        with pytest.raises(RuntimeError, match="no second derivative; expected a backward pass without create_graph"):
            torch.autograd.grad(loss(first, second, 0.1), first, create_graph=True)


def test_torch_compile_leaves_the_losses_alone():
    first, second = leaves(5, 3, 12)

    def step(a, b):
        return nt_xent(a * 2, b, 0.1) + info_nce(a, b, 0.1)

    compiled = torch.compile(step, backend="eager")(first, second)
    assert_same(compiled, step(first, second), (first, second))


eye = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nt_xent(eye, eye[:2], 0.1), r"first has shape \(3, 3\), second \(2, 3\); expected the same shape"),
        (lambda: nt_xent(eye[0], eye[0], 0.1), r"first has shape \(3,\)"),
        (lambda: nt_xent(eye[:0], eye[:0], 0.1), r"with at least one row"),
        (lambda: nt_xent(eye.long(), eye.long(), 0.1), "first is torch.int64"),
        (lambda: nt_xent(eye, eye, 0), "temperature is 0.0; expected a number greater than 0"),
        (lambda: nt_xent(eye, eye, float("nan")), "temperature is nan"),
        (lambda: nt_xent(eye, eye, torch.tensor(-1.0)), "temperature is -1.0"),
        (lambda: nt_xent(eye, eye, torch.ones(2)), "expected a floating scalar"),
        (lambda: nt_xent(eye, eye, 0.1, chunk_size=0), "chunk_size is 0; expected at least 1, or None"),
        (lambda: nt_xent(eye, eye, 0.1, hardness=-1), "hardness is -1; expected a number of at least 0"),
        (lambda: nt_xent(eye, eye, 0.1, same=eye), r"same is torch.float32 of shape \(3, 3\); expected ids"),
        (lambda: nt_xent(eye, eye, 0.1, same=torch.arange(2)), r"expected ids, int64 \(3,\), or bool \(3, 3\)"),
        (lambda: nt_xent(eye, eye, 0.1, same=eye.bool(), gather=True), "with gather=True give ids"),
        (lambda: info_nce(eye, eye, 0.1, eye, symmetric=True), "symmetric=True with a queue"),
        (lambda: info_nce(eye, eye, 0.1, torch.ones(2, 4)), r"queue is torch.float32 of shape \(2, 4\)"),
        (lambda: info_nce(eye, eye, 0.1, queue_same=torch.arange(3)), "queue_same was given without a queue"),
        (lambda: info_nce(eye, eye, 0.1, eye, queue_same=torch.arange(3)), "together with ids of shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
