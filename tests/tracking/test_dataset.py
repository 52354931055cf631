import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from ds_lightning.tracking.dataset import digest


class Noise(Dataset):
    """Holds no data: draws every sample, from three generators."""

    def __init__(self, scale=1.0):
        self.scale = scale
        self.mean = [0.5, 0.5]
        self.own = np.random.default_rng(0)
        self.torch_own = torch.Generator().manual_seed(1)

    def __len__(self):
        return 100

    def __getitem__(self, index):
        draws = random.random() + np.random.rand() + self.own.random() + torch.rand(1, generator=self.torch_own)
        return torch.randn(3) * self.scale + draws, index


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_same_data_same_digest_other_data_another():
    x = torch.arange(1000.0).reshape(100, 10)
    y = x.clone()
    y[0, 0] = 7
    assert digest(TensorDataset(x)) == digest(TensorDataset(x.clone()))
    assert len({digest(TensorDataset(x)), digest(TensorDataset(y)), digest(TensorDataset(x[:50]))}) == 3
    assert len(digest(TensorDataset(x))) == 16


def test_a_change_at_the_end_is_seen():
    x = torch.zeros(100_000, 2)
    y = x.clone()
    y[-1, -1] = 1
    assert digest(TensorDataset(x)) != digest(TensorDataset(y))


def test_subsets_and_concatenations():
    data = TensorDataset(torch.arange(10.0))
    assert digest(Subset(data, [0, 1])) != digest(Subset(data, [2, 3]))
    assert digest(ConcatDataset([data, data])) != digest(data)


def test_random_datasets_disturb_no_generator():
    dataset = Noise()
    before, own, torch_own = states(), dataset.own.bit_generator.state, dataset.torch_own.get_state()
    first = digest(dataset)
    assert states() == before
    assert dataset.own.bit_generator.state == own
    assert torch.equal(dataset.torch_own.get_state(), torch_own)
    torch.rand(5)
    assert digest(Noise()) == first != digest(Noise(scale=2.0))


def test_data_behind_samples_only():
    class Squares(Dataset):
        def __init__(self, power):
            self.power = power

        def __len__(self):
            return 50

        def __getitem__(self, index):
            return {"x": torch.tensor(float(index) ** self.power), "label": index}

    assert digest(Squares(2)) == digest(Squares(2)) != digest(Squares(3))


def test_a_handle_opened_at_the_first_sample_stays_closed():
    class Lazy(Dataset):
        handle = None

        def __len__(self):
            return 5

        def __getitem__(self, index):
            self.handle = self.handle or object()
            return index

    dataset = Lazy()
    digest(dataset)
    assert dataset.handle is None


@pytest.mark.parametrize("broken", ["getitem", "len"])
def test_a_broken_dataset_still_has_a_digest(broken):
    class Broken(Dataset):
        def __len__(self):
            if broken == "len":
                raise RuntimeError("no length")
            return 5

        def __getitem__(self, index):
            raise RuntimeError("no sample")

    assert digest(Broken()) == digest(Broken())


def test_an_iterable_dataset_is_not_touched():
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("must not be read")

    assert len(digest(Stream())) == 16
