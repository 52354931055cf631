import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from squares import Squares
from task_cases import PER_CLASS, Ramps, as_bytes, ready, whole

from ds_lightning.datamodules import ImageFolder, MNIST5k, TaskStream
from ds_lightning.errors import ConfigError, DataError


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_permuted_task_moves_the_pixels_of_all_images_alike():
    stream = ready(TaskStream(Ramps(), tasks=3))
    plain = {split: as_bytes(whole(stream.task_dataloader(0, split))["image"]) for split in ("train", "val", "test")}
    inner = ready(Ramps())
    assert torch.equal(plain["test"], whole(inner.test_dataloader())["image"])
    orders = []
    for task in (1, 2):
        first = as_bytes(whole(stream.task_dataloader(task, "train"))["image"])[0].flatten().tolist()
        order = [plain["train"][0].flatten().tolist().index(value) for value in first]
        assert sorted(order) == list(range(30)) != order
        for split, images in plain.items():
            batch = whole(stream.task_dataloader(task, split))
            assert torch.equal(as_bytes(batch["image"]).flatten(1), images.flatten(1)[:, order])
            assert (batch["task"] == task).all()
            assert torch.equal(batch["label"], whole(stream.task_dataloader(0, split))["label"])
        orders.append(order)
    assert orders[0] != orders[1]
    assert stream.task_names == ["permutation_0", "permutation_1", "permutation_2"]
    assert (stream.num_tasks, stream.num_classes, stream.input_shape) == (3, 6, (1, 5, 6))


def test_a_rotated_task_is_turned_by_its_angle():
    stream = ready(TaskStream(MNIST5k(train_size=100, batch_size=500), kind="rotated", tasks=3, angle=45))
    plain = as_bytes(whole(stream.task_dataloader(0, "test"))["image"], MNIST5k).numpy().astype(float)
    for task in (1, 2):
        turned = as_bytes(whole(stream.task_dataloader(task, "test"))["image"], MNIST5k).numpy()
        expected = scipy.ndimage.rotate(plain, 45 * task, axes=(3, 2), reshape=False, order=1, mode="grid-constant")
        assert np.abs(turned - expected).max() <= 0.51
    assert stream.task_names == ["rotated_0", "rotated_45", "rotated_90"]


@pytest.mark.parametrize("labels", ["class", "domain", "known"])
def test_a_split_shares_out_the_classes(labels):
    stream = ready(TaskStream(Ramps(), kind="split", tasks=3, labels=labels))
    inner = ready(Ramps())
    for split in ("train", "val", "test"):
        seen = []
        for task in range(3):
            batch = whole(stream.task_dataloader(task, split))
            originals = getattr(inner.splits, split)
            every = originals.__getitems__(list(range(len(originals))))
            mine = (every["label"] // 2) == task
            assert torch.equal(as_bytes(batch["image"]), every["image"][mine])
            expected = every["label"][mine] % 2 if labels == "domain" else every["label"][mine]
            assert torch.equal(batch["label"], expected)
            assert ("allowed" in batch) == (labels == "known")
            if labels == "known":
                assert batch["allowed"].dtype == torch.bool
                assert batch["allowed"].unique(dim=0).tolist() == [[place // 2 == task for place in range(6)]]
            seen += as_bytes(batch["image"])[:, 0, 0, 0].tolist()
        assert len(seen) == len(set(seen)) == len(getattr(inner.splits, split))
    assert stream.task_names == ["a-b", "c-d", "e-f"]
    assert stream.num_classes == (2 if labels == "domain" else 6)
    assert stream.class_names == (["a / c / e", "b / d / f"] if labels == "domain" else list("abcdef"))


def test_classes_that_do_not_come_out_even():
    stream = ready(TaskStream(Ramps(), kind="split", tasks=4))
    present = [sorted(set(whole(stream.task_dataloader(task, "test"))["label"].tolist())) for task in range(4)]
    assert present == [[0, 1], [2, 3], [4], [5]]


def test_a_domain_task_is_the_same_in_every_order_and_epoch():
    stream = ready(TaskStream(MNIST5k(train_size=100), kind="domain", tasks=8))
    plain = as_bytes(whole(stream.task_dataloader(0, "test"))["image"], MNIST5k)
    assert stream.task_names[:3] == ["clear", "blur", "noise"]
    for task in range(1, 8):
        batch = whole(stream.task_dataloader(task, "test"))
        assert same(batch, whole(ready(TaskStream(MNIST5k(train_size=100), "domain", 8)).task_dataloader(task, "test")))
        assert not torch.equal(as_bytes(batch["image"], MNIST5k), plain)
        samples = stream.task_dataloader(task, "test").dataset
        order = torch.randperm(1000).tolist()
        assert torch.equal(samples.__getitems__(order)["image"], batch["image"][order])
        assert torch.equal(samples[3]["image"], batch["image"][3])
    expected = scipy.ndimage.gaussian_filter(
        plain.numpy().astype(float), (0, 0, 1.4, 1.4), mode="nearest", radius=(0, 0, 5, 5)
    )
    blurred = as_bytes(whole(stream.task_dataloader(1, "test"))["image"], MNIST5k).numpy()
    assert np.abs(blurred - expected).max() <= 0.51
    noise = [stream.task_dataloader(2, split).dataset[0]["image"] * MNIST5k.std[0] for split in ("train", "test")]
    clean = [stream.task_dataloader(0, split).dataset[0]["image"] * MNIST5k.std[0] for split in ("train", "test")]
    assert not torch.equal(noise[0] - clean[0], noise[1] - clean[1])


def test_the_users_own_choice_of_shifts():
    stream = ready(TaskStream(Ramps(), kind="domain", shifts=["dark", "clear", "invert"]))
    plain = as_bytes(whole(stream.task_dataloader(1, "test"))["image"])
    assert stream.num_tasks == 3
    assert torch.equal(as_bytes(whole(stream.task_dataloader(2, "test"))["image"]), 255 - plain)


class Others(Squares):
    """Of the shape and half of the class names of Ramps, normalised differently."""

    class_names = ("f", "g", "a")
    mean, std = (0.5,), (0.125,)

    def load(self):
        (images, labels), test = super().load()
        return (images[:, :, :5], labels), (test[0][:, :, :5], test[1])


@pytest.mark.parametrize("labels", ["class", "domain", "known"])
def test_a_list_of_datamodules(labels):
    stream = ready(TaskStream([Ramps(), Others()], labels=labels))
    everything = ["a", "b", "c", "d", "e", "f", "g"]
    assert stream.class_names[0] == ("a / f" if labels == "domain" else "a")
    assert stream.num_classes == (6 if labels == "domain" else 7)
    batch, inner = whole(stream.task_dataloader(1, "test")), ready(Others())
    original = whole(inner.test_dataloader())
    names = [Others.class_names[number] for number in original["label"].tolist()]
    expected = original["label"].tolist() if labels == "domain" else [everything.index(name) for name in names]
    assert batch["label"].tolist() == expected
    assert torch.allclose(batch["image"], (original["image"] / 255 - 0.5) / 0.125, atol=1e-6)
    if labels == "known":
        assert batch["allowed"][0].tolist() == [True, False, False, False, False, True, True]
    # A batch with samples of both is normalised sample by sample.
    both = whole(stream.test_dataloader())
    assert both["image"].dtype == torch.uint8
    done = stream.on_after_batch_transfer(both, 0)["image"]
    apart = [whole(stream.task_dataloader(task, "test"))["image"] for task in (0, 1)]
    assert torch.allclose(done, torch.cat(apart), atol=1e-6)
    assert stream.dataset_info()["splits"]["test"] == len(done)


def test_a_list_of_folders(tmp_path):
    for town in ("bonn", "ulm"):
        for name in ("car", "tram"):
            folder = tmp_path / town / name
            folder.mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (20, 20), (40 * number, 0, 9)).save(folder / f"{number}.png")
    stream = TaskStream([str(tmp_path / "bonn"), ImageFolder(str(tmp_path / "ulm"), val_fraction=0.25)])
    ready(stream)
    assert stream.kind == "list"
    assert stream.task_names == ["bonn", "ulm"]
    assert stream.class_names == ["car", "tram"]
    assert stream.input_shape == (3, 224, 224)
    # Nothing random: the training images have a random crop otherwise.
    first, second = (whole(stream.task_dataloader(1, "train")) for _ in range(2))
    assert same(first, second)
    with pytest.raises(DataError, match=r"task bonn .* has no test images"):
        stream.task_dataloader(0, "test")


def test_the_current_task_follows_the_epoch():
    stream = TaskStream(Ramps(), tasks=3, epochs_per_task=2)
    assert [stream.task_of_epoch(epoch) for epoch in range(9)] == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert stream.current_task == 0


def test_information_about_the_data_tells_streams_apart():
    made = [TaskStream(Ramps(), tasks=2), TaskStream(Ramps(), tasks=2, seed=1), TaskStream(Ramps(), "split", 2)]
    found = [ready(stream).dataset_info() for stream in made]
    assert len({info["digest"] for info in found}) == 3
    assert found[0] == ready(TaskStream(Ramps(), tasks=2)).dataset_info()
    assert found[0]["name"] == "TaskStream-permuted-Ramps"
    assert found[0]["splits"] == {"train": 2 * 99, "val": 2 * 11, "test": 2 * 55}
    assert found[2]["splits"] == {"train": 99, "val": 11, "test": 55} == ready(Ramps()).dataset_info()["splits"]
    assert sum(PER_CLASS) == 110


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "photos"}, "data is a str; expected an image DataModule"),
        ({"data": [Ramps(), 3]}, r"data\[1\] is a int"),
        ({"data": []}, "list of at least one"),
        ({"kind": "list"}, "kind is 'list' and data is one DataModule"),
        ({"data": [Ramps()], "kind": "split"}, "kind is 'split' and data is a list of 1"),
        ({"data": [Ramps()], "tasks": 2}, "tasks is 2, but data lists 1"),
        ({"kind": "shuffled"}, "expected one of permuted, rotated, split, domain, list"),
        ({"tasks": 0}, "tasks is 0; expected an integer >= 1"),
        ({"epochs_per_task": 0}, "epochs_per_task is 0; expected an integer >= 1"),
        ({"memory_size": -1}, "memory_size is -1; expected an integer >= 0"),
        ({"memory_batch_size": 0}, "memory_batch_size is 0"),
        ({"labels": "domain"}, "all tasks of kind permuted have the same classes"),
        ({"labels": "soft", "kind": "split"}, "labels is 'soft'; expected one of class, domain, known"),
        ({"kind": "domain", "tasks": 9}, "at most one a shift: 8"),
        ({"kind": "domain", "shifts": ["fog"]}, "expected different names of clear, blur"),
        ({"kind": "domain", "shifts": ["blur", "blur"]}, "expected different names"),
        ({"kind": "domain", "severity": 0.0}, "severity is 0.0; expected a number > 0"),
        ({"kind": "rotated", "angle": 90.0}, "5 tasks have 4 different angles"),
        ({"kind": "split", "labels": "known", "data": Ramps(mixup_alpha=1.0)}, "labels=known can't go with mixup"),
        ({"data": Ramps(crop_padding=1)}, "kind=permuted can't go with crop_padding or horizontal_flip"),
        ({"kind": "rotated", "data": Ramps(horizontal_flip=True)}, "kind=rotated can't go with"),
    ],
)
def test_arguments_that_can_not_work(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TaskStream(**{"data": Ramps(), **arguments})


def test_what_shows_when_the_data_are_read():
    with pytest.raises(ConfigError, match="at least 2 of the 6 classes: expected at most 3"):
        ready(TaskStream(Ramps(), "split", 4, labels="domain"))
    with pytest.raises(DataError, match=r"task 1 are \(1, 28, 28\), those of task 0 \(1, 5, 6\)"):
        ready(TaskStream([Ramps(), MNIST5k()]))
    with pytest.raises(DataError, match="task d has no val samples"):
        ready(TaskStream(Ramps(val_fraction=0.03), "split", 6))
    stream = TaskStream(Ramps())
    with pytest.raises(DataError, match="no data yet"):
        stream.task_dataloader(0, "test")
    ready(stream)
    with pytest.raises(ConfigError, match="task is 5; expected 0 to 4"):
        stream.task_dataloader(5, "test")
    with pytest.raises(ConfigError, match="split is 'fit'; expected one of train, val, test"):
        stream.task_dataloader(0, "fit")
    with pytest.raises(ConfigError, match="the checkpoint has 2 DataModules, this stream 1"):
        stream.load_state_dict({"data": [{}, {}]})
