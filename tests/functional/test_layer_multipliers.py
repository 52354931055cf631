import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.functional.gradient_statistics import (
    article_multipliers,
    element_variance,
    gradient_variance,
    mean_exponent,
    snr_multipliers,
    trust_exponents,
    trust_multipliers,
    variance_multipliers,
)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bounded(x: list[float], low: float, high: float, ramp: float) -> list[float]:
    centre = sum(x) / len(x)
    return [math.exp(ramp * min(max(v - centre, math.log(low)), math.log(high))) for v in x]


def test_trust_follows_the_formula_layer_by_layer():
    a, e, n, w = [0.5, -0.1, 0.2], [1.0, 4.0, 1.0], [10.0, 20.0, 30.0], [3.0, 0.7, 50.0]
    var = [0.5, 4.0, 0.8]
    x = [-0.35 * math.log(v / k) + 0.4 * math.log(s / k) for v, k, s in zip(var, n, w, strict=True)]
    m = trust_multipliers(doubles(*a), doubles(*e), doubles(*n), doubles(*w), 0.7, (0.5, 1.7), trust=0.8, ramp=0.6)
    assert m.tolist() == pytest.approx(bounded(x, 0.5, 1.7, 0.6), rel=1e-12)


def test_without_noise_in_the_mean_trust_is_the_ratio_of_lars():
    e, w = doubles(0.3, 2.0, 0.01), doubles(5.0, 0.2, 1.0)
    m = trust_multipliers(torch.zeros(3).double(), e, doubles(7, 8, 9), w, 1.0, (1e-9, 1e9))
    ratio = w.sqrt() / e.sqrt()  # ||w|| / ||g||; the number of weights cancels
    torch.testing.assert_close(m, ratio / ratio.log().mean().exp())
    m = trust_multipliers(torch.zeros(3).double(), e, doubles(7, 8, 9), w, 1.0, (1e-9, 1e9), center=0.0)
    torch.testing.assert_close(m, ratio)


def test_the_mean_exponent_is_that_of_the_layers_that_have_one():
    a, e, n, w = doubles(0, 0, 0), doubles(1, 0, 4), doubles(2, 2, 2), doubles(9, 1, 1)
    x = trust_exponents(a, e, n, w, 1.0)
    assert mean_exponent(x) == pytest.approx((math.log(3) + math.log(0.5)) / 2)
    assert x[1].isnan()
    assert mean_exponent(doubles(math.nan, math.nan)) is None


def test_snr_follows_the_formula_layer_by_layer():
    a, e = [0.5, -0.1, 0.9999], [1.0, 4.0, 1.0]
    x = [0.35 * math.log(0.5 / 0.5), 0.35 * math.log(0.004 / 4.0), 0.35 * math.log(0.9999 / 1e-3)]
    m = snr_multipliers(doubles(*a), doubles(*e), 0.7, (0.5, 1.7), ramp=0.6)
    assert m.tolist() == pytest.approx(bounded(x, 0.5, 1.7, 0.6), rel=1e-12)
    assert m[1] < 1 < m[2]


@pytest.mark.parametrize("weight_sq", [0.0, float("nan"), float("inf")])
def test_a_layer_without_a_norm_keeps_its_rate_and_leaves_the_mean_alone(weight_sq):
    w = doubles(4.0, weight_sq, 1.0)
    m = trust_multipliers(torch.zeros(3).double(), torch.ones(3).double(), torch.ones(3).double(), w, 1.0, (0.1, 10.0))
    assert m.tolist() == pytest.approx([2**0.5, 1.0, 2**-0.5], rel=1e-12)


@given(
    rows=st.lists(st.tuples(*[st.floats(1e-4, 1e4)] * 3, st.floats(-1.0, 1.0)), min_size=1, max_size=8),
    factor=st.floats(1e-3, 1e3),
)
@settings(deadline=None, max_examples=40)
def test_scales_of_loss_and_weights_cancel_and_trust_0_is_the_inverse_rule(rows, factor):
    e, n, w, share = (doubles(*column) for column in zip(*rows, strict=True))
    a, bounds = share * e, (0.1, 10.0)
    torch.testing.assert_close(
        trust_multipliers(a, e, n, w, 0.5, bounds, trust=0.0), variance_multipliers(a, e, n, 0.5, bounds)
    )
    m = trust_multipliers(a, e, n, w, 0.5, bounds)
    torch.testing.assert_close(m, trust_multipliers(factor * a, factor * e, n, factor * w, 0.5, bounds))
    snr = snr_multipliers(a, e, 0.5, bounds)
    torch.testing.assert_close(snr, snr_multipliers(factor * a, factor * e, 0.5, bounds))
    if len(rows) == 1:
        assert m.tolist() == snr.tolist() == [1.0]


@given(size=st.integers(2, 200), mean=st.floats(-2.0, 2.0), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_element_variance_is_that_of_torch(size, mean, seed):
    g = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    found = element_variance(g.sum()[None], g.square().sum()[None], doubles(size))
    torch.testing.assert_close(found[0], g.var())


def test_the_article_s_formula_as_it_is_printed():
    variance = doubles(0.0, 1e-8, 1e-2, 1.0, 30.0, 1e9)
    printed = [1 + 0.5 * (1 - math.exp(-0.1 * v)) for v in variance.tolist()]
    assert article_multipliers(variance).tolist() == pytest.approx(printed, rel=1e-12)


def test_variance_has_its_floor_and_takes_no_negative_mean():
    found = gradient_variance(doubles(0.3, -5.0, 1.0, 2.0), doubles(1.0, 1.0, 1.0, 1.0))
    assert found.tolist() == pytest.approx([0.7, 1.0, 1e-3, 1e-3], rel=1e-12)
