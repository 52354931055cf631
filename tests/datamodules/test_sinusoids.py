import math

import numpy as np
import pytest
import torch

from ds_lightning.datamodules import Sinusoids
from ds_lightning.errors import ConfigError


def fitted(batch):
    """Amplitude, phase and the worst error of each task, by least squares on sin(x) and cos(x)."""
    x, y = (torch.cat([batch[part][name] for part in ("support", "query")], 1)[:, :, 0] for name in ("table", "target"))
    found = []
    for one, target in zip(x.double().numpy(), y.double().numpy(), strict=True):
        basis = np.stack([np.sin(one), np.cos(one)], 1)
        (a, b), *_ = np.linalg.lstsq(basis, target, rcond=None)
        amplitude, phase = math.hypot(a, b), math.atan2(-b, a)
        found.append((amplitude, phase, np.abs(amplitude * np.sin(one - phase) - target).max()))
    return np.array(found), x


def test_targets_are_sine_waves_of_the_papers_ranges():
    data = Sinusoids(tasks_per_batch=500, episodes_per_epoch=2000)
    amplitudes, phases, points = [], [], []
    for batch in data.train_dataloader():
        assert batch["support"]["table"].shape == batch["query"]["target"].shape == (500, 10, 1)
        assert batch["support"]["table"].dtype == torch.float32
        found, x = fitted(batch)
        assert found[:, 2].max() < 1e-4
        amplitudes, phases, points = [*amplitudes, *found[:, 0]], [*phases, *found[:, 1]], [*points, x.flatten()]
    for values, (low, high) in (
        (np.array(amplitudes), (0.1, 5.0)),
        (np.array(phases), (0.0, math.pi)),
        (torch.cat(points).numpy(), (-5.0, 5.0)),
    ):
        assert low - 1e-3 < values.min() < low + 0.02 * (high - low)
        assert high + 1e-3 > values.max() > high - 0.02 * (high - low)
        # A uniform mean is within five of its standard errors.
        error = (high - low) / math.sqrt(12 * len(values))
        assert abs(values.mean() - (low + high) / 2) < 5 * error
        assert abs(values.std() - (high - low) / math.sqrt(12)) < 5 * error


def flat(loader):
    return torch.cat([torch.cat([batch[part]["target"] for part in ("support", "query")], 1) for batch in loader])


def test_training_goes_on_and_evaluation_stays():
    data = Sinusoids(episodes_per_epoch=100, val_episodes=30, test_episodes=40)
    loader = data.train_dataloader()
    first, second = flat(loader), flat(loader)
    assert len(torch.cat([first, second]).unique(dim=0)) == 200
    assert torch.equal(flat(data.val_dataloader()), flat(data.val_dataloader()))
    assert flat(data.test_dataloader()).shape == (40, 110, 1)
    assert not torch.equal(flat(data.test_dataloader())[:30], flat(data.val_dataloader()))
    other = Sinusoids(episodes_per_epoch=100, tasks_per_batch=7, num_workers=2)
    assert torch.equal(flat(other.train_dataloader()), first)
    assert not torch.equal(flat(Sinusoids(episodes_per_epoch=100, seed=1).train_dataloader()), first)
    assert Sinusoids(val_episodes=0).val_dataloader() == []


def test_a_pool_and_ranges_of_ones_own():
    data = Sinusoids(shots=3, episodes_per_epoch=100, train_tasks=4, amplitude=(2, 2), phase=(1, 1), x=(0, 1))
    rows = flat(data.train_dataloader())
    assert len(rows.unique(dim=0)) == 4
    batch = next(iter(data.train_dataloader()))
    expected = 2 * torch.sin(batch["support"]["table"].double() - 1)
    torch.testing.assert_close(batch["support"]["target"].double(), expected, atol=1e-5, rtol=0)
    assert 0 <= batch["support"]["table"].min() <= batch["support"]["table"].max() < 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"shots": 0}, "shots is 0; expected an integer >= 1"),
        ({"eval_queries": 0}, "eval_queries is 0"),
        ({"phase": (2.0, 1.0)}, r"phase is \(2.0, 1.0\); expected a lowest and a highest number"),
        ({"amplitude": (0.1, math.inf)}, "amplitude is"),
    ],
)
def test_bad_arguments(options, problem):
    with pytest.raises(ConfigError, match=problem):
        Sinusoids(**options)
