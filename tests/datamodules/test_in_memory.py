import inspect
import re
from pathlib import Path

import jsonargparse
import lightning.pytorch as L
import pytest
import torch
from squares import Squares, ready

from ds_lightning.datamodules import InMemoryImageData, MNIST5k
from ds_lightning.errors import ConfigError, DataError


def test_the_page_for_users_shows_a_set_that_works():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "InMemoryImageData" in c)
    assert len([line for line in code.splitlines() if line.strip()]) <= 24
    names = {}
    exec(code, names)
    data = ready(names["Stripes"](batch_size=16, mixup_alpha=0.2))
    assert data.num_classes == 2
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["image"].shape == (16, *data.input_shape)


def test_built_from_yaml_with_a_pipeline_of_albumentations():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    config = parser.parse_string(
        """
        data:
          class_path: ds_lightning.datamodules.MNIST5k
          init_args:
            batch_size: 8
            transform:
              class_path: albumentations.Compose
              init_args:
                transforms:
                  - class_path: albumentations.HorizontalFlip
                    init_args: {p: 1.0}
        """
    )
    data = ready(parser.instantiate(config).data)
    assert isinstance(data, MNIST5k)
    flipped = next(iter(data.train_dataloader()))["image"]
    data.splits.train.transform = None
    data = data.train_dataloader()
    assert torch.equal(flipped.flip(3), next(iter(data))["image"])


def test_hyperparameters_are_primitives(tmp_path):
    data = Squares(batch_size=4, seed=3, transform=lambda image: {"image": image})
    expected = set(inspect.signature(InMemoryImageData.__init__).parameters) - {"self", "transform"}
    assert set(data.hparams) == expected
    assert (data.hparams["batch_size"], data.hparams["seed"]) == (4, 3)


def test_nothing_before_setup_but_the_classes():
    data = Squares()
    assert data.num_classes == 3
    with pytest.raises(DataError, match="Squares has no data yet; call prepare_data"):
        data.train_dataloader()


def test_dataset_info_knows_the_content():
    class Brighter(Squares):
        def load(self):
            (images, labels), test = super().load()
            return (images + 1, labels), test

    info, other = ready(Squares()).dataset_info(), ready(Brighter()).dataset_info()
    assert info["source"] == "made up"
    assert info["splits"] == {"train": 54, "val": 6, "test": 30}
    assert re.fullmatch("[0-9a-f]{16}", info["digest"])
    assert info["digest"] != other["digest"]
    assert info["digest"] == ready(Squares(seed=3, val_fraction=0.5)).dataset_info()["digest"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected an integer >= 1"),
        ({"num_workers": -1}, "num_workers is -1; expected an integer >= 0"),
        ({"val_fraction": 0.0}, r"val_fraction is 0.0; expected a number in \(0, 1\)"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"train_size": 0}, "train_size is 0; expected an integer >= 1, or null"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0; expected"),
        ({"mix_probability": 2.0}, r"mix_probability is 2.0; expected a number in \[0, 1\]"),
        ({"crop_padding": -1}, "crop_padding is -1; expected"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        Squares(**arguments)


def test_a_validation_share_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"val_fraction is 0.001, which leaves 0 of 60 images"):
        ready(Squares(val_fraction=0.001))


IMAGES, LABELS = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (IMAGES.float(), LABELS, r"load\(\) gave training images of shape .* torch.float32; expected"),
        (IMAGES[0], LABELS, r"load\(\) gave training images of shape \(1, 4, 4\)"),
        (IMAGES, LABELS[:5], r"load\(\) gave training labels of shape \(5,\), .* expected \(6,\), int64"),
        (IMAGES, LABELS + 1, "load.* gave training labels from 1 to 3; expected 0 to 2"),
        (IMAGES, LABELS % 2, "class 'bright' has no training image"),
        (IMAGES[:, :, :3], LABELS, r"the test images are \(1, 4, 4\), the training images \(1, 3, 4\)"),
    ],
)
def test_data_that_can_not_be_used_is_named(images, labels, text):
    class Wrong(Squares):
        def load(self):
            return (images, labels), (IMAGES, LABELS)

    with pytest.raises(DataError, match=text):
        ready(Wrong())


def test_transforms_that_give_several_sizes_are_refused():
    def transform(image):
        return {"image": image[: 1 + int(image[0, 0, 0]) % 2]}

    data = ready(Squares(batch_size=54, transform=transform))
    with pytest.raises(DataError, match=r"transform returned images of the shapes \[\(1, 1, 6\), \(1, 2, 6\)\]"):
        next(iter(data.train_dataloader()))
