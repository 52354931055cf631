import itertools

import numpy as np
import pytest
import torch
from episode_cases import CLASSES, EACH, SIDE, Marks, as_bytes, episodes, marks, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from ds_lightning.datamodules import Episodes, ImageFolder
from ds_lightning.errors import ConfigError, DataError, NoEffectWarning


def checked(made, batch, size, allowed):
    """Hold a batch against the marks in its images, by brute force."""
    ways, shots, queries = size
    for task, classes in enumerate(batch["classes"].tolist()):
        assert len(set(classes)) == ways
        assert set(classes) <= set(allowed)
        seen = []
        for part, each in (("support", shots), ("query", queries)):
            label = batch[part]["label"][task].tolist()
            assert label == [number for number in range(ways) for _ in range(each)]
            kinds, numbers = marks(batch[part]["image"][task])
            assert kinds.tolist() == [classes[number] for number in label]
            seen += zip(kinds.tolist(), numbers.tolist(), strict=True)
        assert len(set(seen)) == len(seen) == ways * (shots + queries)


@given(
    size=st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(1, 8)),
    tasks=st.integers(1, 5),
    seed=st.integers(0),
)
@settings(deadline=None, max_examples=15)
def test_labels_stand_for_classes_and_no_image_comes_twice(size, tasks, seed):
    ways, shots, queries = size
    made = episodes(ways=ways, shots=shots, queries=queries, tasks_per_batch=tasks, seed=seed)
    for split in ("train", "val", "test"):
        loader = getattr(made, f"{split}_dataloader")()
        batches = list(loader)
        assert sum(len(batch["classes"]) for batch in batches) == (24 if split == "train" else 10)
        assert {len(batch["classes"]) for batch in batches[:-1]} <= {tasks}
        for batch in batches:
            assert batch["support"]["image"].dtype == torch.uint8
            checked(made, batch, size, getattr(made, f"{split}_classes"))
    assert (made.num_classes, made.input_shape) == (ways, (1, SIDE, SIDE))
    assert made.class_names == list(Marks.class_names)
    held = [set(made.classes_of(split)) for split in ("train", "val", "test")]
    assert [len(names) for names in held] == [12, 4, 4]
    assert len(set.union(*held)) == CLASSES


def test_evaluation_has_a_size_of_its_own_and_batches_are_normalised():
    made = episodes(eval_ways=4, eval_shots=1, eval_queries=7)
    checked(made, next(iter(made.train_dataloader())), (3, 2, 4), made.train_classes)
    raw = next(iter(made.test_dataloader()))
    checked(made, raw, (4, 1, 7), made.test_classes)
    ready = made.batch("test", [0, 1, 2, 3])
    expected = (raw["query"]["image"].double() / 255 - 0.25) / 0.5
    torch.testing.assert_close(ready["query"]["image"], expected.float())
    assert torch.equal(ready["query"]["label"], raw["query"]["label"])
    hooked = made.on_after_batch_transfer(raw, 0)
    assert torch.equal(hooked["support"]["image"], ready["support"]["image"])


def test_all_images_of_a_class_are_used_and_each_as_often_as_the_others():
    made = episodes(splits=(1.0, 0.0, 0.0), episodes_per_epoch=2000, val_episodes=0)
    drawn, kinds, first = torch.zeros(CLASSES, EACH), torch.zeros(CLASSES), torch.zeros(CLASSES)
    for batch in made.train_dataloader():
        kind, number = marks(batch["query"]["image"])
        drawn.index_put_((kind.flatten(), number.flatten()), torch.ones(kind.numel()), accumulate=True)
        kinds += torch.bincount(batch["classes"].flatten(), minlength=CLASSES)
        first += torch.bincount(batch["classes"][:, 0], minlength=CLASSES)
    assert drawn.sum() == 2000 * 3 * 4
    # Five standard deviations of the binomial; an image is a query with chance 3 / 20 * 4 / 12 = 1 / 20.
    for counts, chance in ((kinds, 3 / CLASSES), (first, 1 / CLASSES), (drawn, 1 / 20)):
        assert (counts - 2000 * chance).abs().max() < 5 * (2000 * chance * (1 - chance)) ** 0.5


def test_classes_of_different_sizes_are_equally_likely():
    sizes = torch.tensor([6, 40, 9, 20, 7, 6])
    labels = torch.arange(6).repeat_interleave(sizes)
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images[order], labels[order])
    made = episodes(data, splits=(1.0, 0.0, 0.0), val_episodes=0, episodes_per_epoch=1200, tasks_per_batch=100)
    kinds, drawn = torch.zeros(6), torch.zeros(len(labels))
    for batch in made.train_dataloader():
        number = torch.cat([batch[part]["image"].flatten(1) for part in ("support", "query")], 1).long()
        label = torch.cat([batch[part]["label"] for part in ("support", "query")], 1)
        assert torch.equal(labels[number], batch["classes"].gather(1, label))
        assert all(len(set(row)) == 18 for row in number.tolist())
        kinds += torch.bincount(batch["classes"].flatten(), minlength=6)
        drawn += torch.bincount(number.flatten(), minlength=len(labels))
    # A class comes with chance 3 / 6, and has 6 of its images in the episode.
    assert (kinds - 600).abs().max() < 5 * (1200 / 4) ** 0.5
    chance = 0.5 * 6 / sizes[labels]
    assert ((drawn - 1200 * chance).abs() < 5 * (1200 * chance * (1 - chance)) ** 0.5).all()


def test_the_split_of_the_source_changes_nothing():
    one, other = episodes(Marks(seed=0, val_fraction=0.1)), episodes(Marks(seed=9, val_fraction=0.4))
    assert same(list(one.train_dataloader()), list(other.train_dataloader()))
    assert not same(list(one.train_dataloader()), list(episodes(seed=1).train_dataloader()))


def test_turned_classes_are_classes_of_their_own_in_training():
    made = episodes(rotations=True, ways=8, splits=(0.2, 0.4, 0.4), episodes_per_epoch=40)
    base = made.train_classes[:4]
    assert made.train_classes == [*base, *range(CLASSES, CLASSES + 12)]
    assert made.class_names[CLASSES:] == [f"{Marks.class_names[n]} turned {a}" for a in (90, 180, 270) for n in base]
    assert not set(made.val_classes + made.test_classes) & set(made.train_classes)
    turned = 0
    for batch in made.train_dataloader():
        for part, each in (("support", 2), ("query", 4)):
            images = batch[part]["image"].view(4, 8, each, 1, SIDE, SIDE)
            for task, way in itertools.product(range(4), range(8)):
                name = made.class_names[int(batch["classes"][task, way])]
                source, _, angle = name.partition(" turned ")
                for image in images[task, way]:
                    upright = torch.rot90(image, -int(angle or 0) // 90, dims=(1, 2))
                    assert Marks.class_names[int(marks(upright)[0])] == source
                    assert torch.equal(torch.rot90(upright, int(angle or 0) // 90, dims=(1, 2)), image)
                turned += bool(angle)
    assert 0.6 < turned / (40 * 8 * 2) < 0.9
    for batch in made.val_dataloader():
        checked(made, batch, (8, 2, 4), made.val_classes)


def test_images_of_one_thing_never_meet():
    class Pairs(Marks):
        """Images 0 and 6, 1 and 7, ... of a class show one thing; class 0 has three of thing 0."""

        def load_splits(self):
            splits = super().load_splits()
            for part in splits:
                kind, number = marks(part.images)
                part.units = torch.where((kind == 0) & (number == 1), 0, number % 6)
            return splits

    made = episodes(Pairs(), splits=(1.0, 0.0, 0.0), val_episodes=0, shots=1, queries=4, episodes_per_epoch=200)
    used = set()
    for batch in made.train_dataloader():
        parts = [marks(batch[part]["image"]) for part in ("support", "query")]
        for task in range(len(batch["classes"])):
            seen = [
                pair for kind, number in parts for pair in zip(kind[task].tolist(), number[task].tolist(), strict=True)
            ]
            used |= set(seen)
            units = [(kind, 0 if (kind, number) == (0, 1) else number % 6) for kind, number in seen]
            assert len(set(units)) == len(units) == 3 * 5
    assert len(used) == CLASSES * EACH
    with pytest.raises(DataError, match=r"class 'a0' .* has 6 different units; expected shots \+ queries = 7"):
        episodes(Pairs(), splits=(1.0, 0.0, 0.0), val_episodes=0, shots=3, queries=4)


def test_groups_are_never_shared():
    made = episodes(groups=lambda name: name[0], ways=4)
    held = [{name[0] for name in made.classes_of(split)} for split in ("train", "val", "test")]
    assert sorted(map(len, held)) == [1, 1, 3]
    assert set.union(*held) == set("abcde")


class Coloured(Dataset):
    """A data set as others write it: float images and string-free labels, one sample at a time."""

    classes = ("x", "y", "z")

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.full((3, 2, 2), float(index)), index % 3


@pytest.mark.parametrize("kind", ["floats", "bytes", "dictionary"])
def test_any_data_set_of_pairs(kind):
    data, names = Coloured(), ["x", "y", "z"]
    if kind == "bytes":
        images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).repeat(1, 3, 2, 2)
        data, names = TensorDataset(images, torch.arange(30) % 3), ["0", "1", "2"]
    elif kind == "dictionary":
        data = [{"image": image, "label": label} for image, label in (data[i] for i in range(30))]
        names = ["0", "1", "2"]
    made = episodes(data, splits=(1.0, 0.0, 0.0), val_episodes=0, shots=1)
    assert (made.class_names, made.input_shape) == (names, (3, 2, 2))
    batch = made.batch("train", [0, 7])
    scale = 255 if kind == "bytes" else 1
    for part in ("support", "query"):
        number = (batch[part]["image"][:, :, 0, 0, 0] * scale).round().long()
        assert torch.equal(number % 3, batch["classes"].gather(1, batch[part]["label"]))


def test_folders_of_images(tmp_path):
    from PIL import Image

    for kind, number in itertools.product(range(4), range(6)):
        folder = tmp_path / ("train" if number < 4 else "test") / f"class{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 40 * kind + number, np.uint8)).save(folder / f"{number}.png")
    made = episodes(ImageFolder(str(tmp_path), image_size=8), ways=2, shots=2, queries=4, splits=(0.5, 0.0, 0.5))
    assert made.val_dataloader() == []
    for loader in (made.train_dataloader(), made.test_dataloader()):
        for batch in loader:
            value = torch.cat([batch[part]["image"][:, :, 0, 4, 4] for part in ("support", "query")], 1).long()
            label = torch.cat([batch[part]["label"] for part in ("support", "query")], 1)
            assert torch.equal(value // 40, batch["classes"].gather(1, label))
            assert all(len(set(row)) == 12 for row in value.tolist())


class Adds:
    """A random transform that adds 100 to 140 to the pixel after the marks."""

    def set_random_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, image):
        image = image.copy()
        image[0, 2] = 100 + int(torch.randint(41, (), generator=self.generator))
        return {"image": image}


def test_augmentation_is_for_training_and_follows_the_episode():
    made = episodes(Marks(transform=Adds()), augment=True)
    plain = episodes()
    batches = list(made.train_dataloader())
    again = episodes(Marks(transform=Adds(), seed=0), augment=True, num_workers=2)
    assert same(list(again.train_dataloader()), batches)
    for batch, bare in zip(batches, plain.train_dataloader(), strict=True):
        checked(made, batch, (3, 2, 4), made.train_classes)
        assert torch.equal(batch["classes"], bare["classes"])
        drawn = batch["query"]["image"][..., 0, 0, 2]
        assert drawn.min() >= 100
        assert len(drawn.unique()) > 5
    assert same(list(made.test_dataloader()), list(plain.test_dataloader()))
    assert same(list(episodes(Marks(transform=Adds())).train_dataloader()), list(plain.train_dataloader()))
    with pytest.warns(NoEffectWarning, match="augment is true and Marks has nothing random"):
        episodes(augment=True)


@pytest.mark.parametrize(
    ("options", "kind", "problem"),
    [
        ({"ways": 1}, ConfigError, "ways is 1; expected an integer >= 2"),
        ({"queries": 0}, ConfigError, "queries is 0; expected an integer >= 1"),
        ({"eval_shots": 0}, ConfigError, "eval_shots is 0; expected"),
        ({"train_tasks": 0}, ConfigError, "train_tasks is 0; expected"),
        ({"splits": (0.5, 0.2, 0.2)}, ConfigError, "sums to 0.9"),
        ({"ways": 5}, DataError, "the val split has 4 classes; expected 5"),
        (
            {"ways": 5, "splits": (1.0, 0.0, 0.0), "test_classes": [], "train_classes": [0]},
            DataError,
            "train split has 1",
        ),
        ({"queries": 11}, DataError, r"class 'a\d' .* split has 12 samples; expected shots \+ queries = 13"),
        ({"train_classes": ["q"]}, ConfigError, "train_classes has 'q'"),
        ({"data": Marks(mixup_alpha=0.4)}, ConfigError, "data mixes its images"),
        ({"data": "photos"}, DataError, "the data set gives a str; expected pairs of an image"),
        ({"data": 3}, ConfigError, "data is a int; expected an image DataModule"),
        (
            {"data": TensorDataset(torch.zeros(4, 1, 2, 2), torch.zeros(4, 2))},
            DataError,
            r"labels have the shape \(4, 2\)",
        ),
        ({"data": TensorDataset(torch.zeros(4, 2), torch.zeros(4))}, DataError, r"images of shape \(2,\); expected"),
        (
            {"data": TensorDataset(torch.zeros(4, 1, 2, 3), torch.tensor([0, 1, 2, 3])), "rotations": True},
            DataError,
            r"images are \(1, 2, 3\); expected square",
        ),
    ],
)
def test_what_can_not_work_is_refused(options, kind, problem):
    with pytest.raises(kind, match=problem):
        episodes(**options)


def test_what_is_not_there_is_named():
    made = episodes(splits=(0.6, 0.0, 0.4))
    with pytest.raises(DataError, match="there are no val episodes; give val a share in splits, or val_classes"):
        made.batch("val", [0])
    with pytest.raises(ConfigError, match="split is 'trian'"):
        made.batch("trian", [0])
    with pytest.raises(DataError, match="no data yet"):
        Episodes(Marks()).train_dataloader()
    assert as_bytes(made.batch("test", [0])["query"]["image"]).max() >= 100
