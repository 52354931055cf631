import hashlib
import pickle
import struct
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

from ds_lightning.datamodules import CIFAR10, FashionMNIST
from ds_lightning.errors import DataError

RANDOM = np.random.default_rng(0)


def write_fashion(root, train=60, test=20):
    """Fashion-MNIST's file format, with made-up pixels."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = {}
    for name, count in (("train", train), ("t10k", test)):
        images[name] = RANDOM.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images[name].tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return images


def write_cifar(root, monkeypatch, each=20):
    """CIFAR-10's file format, with made-up pixels and their checksums told to torchvision."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums, first = {}, None
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = RANDOM.integers(0, 255, (each, 3072), dtype=np.uint8)
        first = pixels if first is None else first
        content = pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(each)]})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": list(CIFAR10.class_names)})
    (folder / "batches.meta").write_bytes(meta)
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name in sums if name != "test_batch"])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": hashlib.md5(meta).hexdigest()})
    return first


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **more):
        raise urllib.error.URLError("no network\nin this test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_fashion_mnist_is_read_from_its_files(tmp_path, offline):
    images = write_fashion(tmp_path)
    data = FashionMNIST(data_dir=str(tmp_path), val_fraction=0.5, batch_size=20)
    data.prepare_data()
    data.setup()
    assert (data.num_classes, data.input_shape) == (10, (1, 28, 28))
    assert data.dataset_info()["splits"] == {"train": 30, "val": 30, "test": 20}
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(batch["image"][:, 0], torch.from_numpy(images["t10k"]))
    assert batch["label"].tolist() == [i % 10 for i in range(20)]
    assert tuple(torchvision.datasets.FashionMNIST.classes) == data.class_names


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch, offline):
    first = write_cifar(tmp_path, monkeypatch)
    data = CIFAR10(data_dir=str(tmp_path), val_fraction=0.5)
    data.prepare_data()
    data.setup()
    assert (data.num_classes, data.input_shape) == (10, (3, 32, 32))
    assert data.dataset_info()["splits"] == {"train": 50, "val": 50, "test": 20}
    # A row of the file is the red plane, then green, then blue.
    assert torch.equal(data.splits.train.images[:20].flatten(1), torch.from_numpy(first))


@pytest.mark.parametrize("kind", [FashionMNIST, CIFAR10])
def test_offline_and_absent_is_one_clear_line(kind, tmp_path, offline, capfd):
    data = kind(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(DataError) as caught:
        data.prepare_data()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{kind.__name__} in {tmp_path / 'nowhere' / kind.folder} could not be downloaded (")
    assert all(file in text for file in kind.files)
    assert text.endswith("run once with network and download=true, or set data_dir")


@pytest.mark.parametrize("kind", [FashionMNIST, CIFAR10])
def test_absent_without_download(kind, tmp_path):
    data = kind(data_dir=str(tmp_path), download=False)
    data.prepare_data()
    with pytest.raises(DataError, match=f"{kind.__name__} in .* lacks {kind.files[0]}, .*; expected the files"):
        data.setup()


def test_damaged_files_are_named(tmp_path, monkeypatch):
    write_fashion(tmp_path / "a")
    labels = tmp_path / "a" / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:30])
    with pytest.raises(DataError, match=r"FashionMNIST in .*raw is damaged \("):
        FashionMNIST(data_dir=str(tmp_path / "a")).setup()
    write_cifar(tmp_path / "b", monkeypatch)
    (tmp_path / "b" / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"x")
    with pytest.raises(DataError, match=r"CIFAR10 in .* is damaged \(Dataset not found or corrupted"):
        CIFAR10(data_dir=str(tmp_path / "b")).setup()
