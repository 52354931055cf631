import numpy as np
import pytest
import torch
from PIL import Image
from squares import Squares, ready

from ds_lightning.datamodules import ContrastiveViews, ImageFolder
from ds_lightning.datamodules.view_sources import check_source, view_sources
from ds_lightning.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    """Five grey files a class; the brightness says which file it is, and none is square."""
    for number in range(10):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((30, 40 + number, 3), 20 * number, dtype=np.uint8)).save(path)
    return str(tmp_path)


def test_the_parts_of_a_datamodule_without_anything_random():
    data = ready(Squares(seed=3))
    found = view_sources(data, None, seed=0, val_fraction=0.5)
    assert (found.modality, found.class_names, found.input_shape) == ("image", ["dark", "light", "bright"], (1, 6, 6))
    for split, part in found.plain.items():
        own = getattr(data.splits, split)
        indices = list(range(len(own)))
        assert torch.equal(part.__getitems__(indices)["image"], own.__getitems__(indices)["image"])
    assert set(found.plain) == {"train", "val", "test"}
    assert found.transformed == {}


def test_a_data_set_is_split_by_the_seed():
    images = [torch.full((1, 2, 2), n, dtype=torch.uint8) for n in range(20)]

    def rows(seed):
        found = view_sources(images, None, seed=seed, val_fraction=0.25)
        return {
            name: part.__getitems__(list(range(len(part))))["image"][:, 0, 0, 0].tolist()
            for name, part in found.plain.items()
        }

    first = rows(0)
    assert sorted(first["train"] + first["val"]) == list(range(20))
    assert len(first["val"]) == 5
    assert first == rows(0)
    assert first != rows(1)


def test_files_are_read_as_for_validation_and_a_transform_gets_whole_ones(folder):
    plain = ready(ContrastiveViews(ImageFolder(folder, image_size=16, val_fraction=0.2), batch_size=4))
    batch = next(iter(plain.labelled_loaders()[0]))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert all(len(image.unique()) == 1 for image in batch["image"])
    views = plain.on_after_batch_transfer(next(iter(plain.train_dataloader())), 0)
    assert views["first"]["image"].shape == (4, 3, 16, 16)

    shapes = []

    def transform(image):
        shapes.append(image.shape)
        return {"image": image[:16, :16]}

    own = ready(ContrastiveViews(ImageFolder(folder, image_size=16, val_fraction=0.2), transform, batch_size=4))
    batch = next(iter(own.train_dataloader()))
    assert len(shapes) == 8
    assert {shape[0] for shape in shapes} == {30}
    assert torch.equal(batch["first"]["image"], batch["second"]["image"])
    assert (batch["first"]["image"][:, 0, 0, 0] % 20 == 0).all()


def test_what_views_can_not_be_made_from_is_refused():
    check_source([torch.zeros(1, 2, 2)], None)
    with pytest.raises(
        ConfigError, match="data is a generator; expected an image DataModule such as MNIST5k, TextFiles"
    ):
        check_source((n for n in range(3)), None)
