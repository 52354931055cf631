import math
import pickle
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.modules.episode_metrics import EpisodeMean

VALUES = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30)


@settings(deadline=None, max_examples=20)
@given(VALUES, st.integers(1, 7))
def test_mean_and_interval_are_those_of_statistics(values: list[float], size: int) -> None:
    metric = EpisodeMean()
    for start in range(0, len(values), size):
        metric.update(torch.tensor(values[start : start + size])[None])
    found = metric.compute()
    assert int(found["episodes"]) == len(values)
    assert float(found["mean"]) == pytest.approx(statistics.fmean(values), abs=1e-9)
    expected = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    assert float(found["interval"]) == pytest.approx(expected, abs=1e-7)


def test_every_step_has_its_own() -> None:
    values = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = EpisodeMean()
    metric.update(values[:, :5])
    metric.update(values[:, 5:])
    assert torch.allclose(metric.compute()["mean"], values.mean(dim=1))
    assert torch.allclose(metric.compute()["interval"], 1.96 * values.std(dim=1) / math.sqrt(8))


def test_large_values_that_hardly_differ_keep_their_interval() -> None:
    metric = EpisodeMean()
    metric.update(torch.tensor([[1000.0, 1000.25, 1000.5]]))
    assert float(metric.compute()["interval"]) == pytest.approx(1.96 * 0.25 / math.sqrt(3), rel=1e-6)


def test_one_episode_has_no_interval_and_equal_ones_none_to_speak_of() -> None:
    metric = EpisodeMean()
    metric.update(torch.tensor([[0.3]]))
    assert math.isnan(float(metric.compute()["interval"]))
    metric.update(torch.tensor([[0.3]]))
    assert float(metric.compute()["interval"]) == 0.0


def test_two_ranks_summed_equal_one() -> None:
    values = torch.rand(2, 10, generator=torch.Generator().manual_seed(1))
    whole, *ranks = EpisodeMean(), EpisodeMean(), EpisodeMean()
    whole.update(values)
    for rank, metric in enumerate(ranks):
        metric.update(values[:, rank::2])
    merged = EpisodeMean()
    merged.update(values[:, :1])
    assert [reduction.__name__ for reduction in merged._reductions.values()] == ["dim_zero_sum"] * 3
    for name in ("count", "total", "squares"):
        setattr(merged, name, sum(getattr(metric, name) for metric in ranks))
    for name, value in whole.compute().items():
        assert torch.allclose(merged.compute()[name], value)


def test_reset_pickle_and_another_number_of_figures() -> None:
    metric = EpisodeMean()
    metric.update(torch.zeros(3, 2))
    assert int(pickle.loads(pickle.dumps(metric)).compute()["episodes"]) == 2
    with pytest.raises(ValueError, match="values has 2 rows; expected 3"):
        metric.update(torch.zeros(2, 2))
    metric.reset()
    metric.update(torch.ones(2, 1))
    assert metric.compute()["mean"].tolist() == [1.0, 1.0]
