import itertools
import re
import traceback

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image

from ds_lightning.datamodules import ImageFolder
from ds_lightning.datamodules.image_files import find_classes, open_image
from ds_lightning.errors import ConfigError, DataError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def fill(folder, each=10, classes=COLOURS, size=(40, 30)):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", size, COLOURS.get(name, (9, 9, 9))).save(folder / name / f"{number:02}.png")
    return folder


def made(folder, **arguments):
    data = ImageFolder(str(folder), **({"image_size": 16, "batch_size": 4} | arguments))
    data.setup()
    return data


def chosen(split):
    return {bytes(file) for file in split.files}


def test_a_flat_folder_is_split_by_class(tmp_path):
    data = made(fill(tmp_path), val_fraction=0.2)
    assert data.class_names == ["blue", "green", "red"]
    assert (data.num_classes, data.input_shape) == (3, (3, 16, 16))
    assert data.dataset_info()["splits"] == {"train": 24, "val": 6, "test": 0}
    assert torch.bincount(data.splits.val.labels).tolist() == [2, 2, 2]
    assert not chosen(data.splits.train) & chosen(data.splits.val)
    assert chosen(made(tmp_path, val_fraction=0.2, seed=1).splits.val) != chosen(data.splits.val)
    assert len(made(tmp_path, train_size=6).splits.train) == 6


def test_labels_belong_to_their_images(tmp_path):
    data = made(fill(tmp_path), batch_size=30, val_fraction=0.5)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert (batch["image"].dtype, batch["image"].shape[1:]) == (torch.uint8, (3, 16, 16))
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            assert image[:, 8, 8].tolist() == list(COLOURS[data.class_names[label]])


def test_the_sub_folders_are_the_splits(tmp_path):
    for name, each in (("train", 6), ("val", 2), ("test", 3)):
        fill(tmp_path / name, each)
    data = made(tmp_path)
    assert data.dataset_info()["splits"] == {"train": 18, "val": 6, "test": 9}
    for name in ("train", "val", "test"):
        assert all(f"/{name}/".encode() in file for file in chosen(getattr(data.splits, name)))
    assert len(next(iter(data.predict_dataloader()))["label"]) == 4


def test_train_without_val_is_split(tmp_path):
    fill(tmp_path / "train", 10)
    assert made(tmp_path).dataset_info()["splits"] == {"train": 27, "val": 3, "test": 0}


def test_the_digest_follows_names_and_sizes(tmp_path):
    digest = made(fill(tmp_path / "a")).dataset_info()["digest"]
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert made(fill(tmp_path / "b")).dataset_info()["digest"] == digest
    (tmp_path / "b" / "red" / "00.png").rename(tmp_path / "b" / "red" / "x.png")
    assert made(tmp_path / "b").dataset_info()["digest"] != digest


def test_validation_is_deterministic_and_training_is_not(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(picture).save(tmp_path / name / f"{number}.png")
    data = made(tmp_path, val_fraction=0.5)
    first, again = (next(iter(data.val_dataloader()))["image"] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[1])
    loader = data.train_dataloader()
    first, again = (next(iter(loader))["image"] for _ in range(2))
    assert not torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, next(iter(made(tmp_path, val_fraction=0.5).train_dataloader()))["image"])


def test_a_transform_of_ones_own(tmp_path):
    data = made(fill(tmp_path), transform=lambda image: {"image": image[:16, :16] // 2})
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].amax() == 127
    wrong = made(tmp_path, transform=lambda image: {"image": image})
    with pytest.raises(DataError, match=r"shape \(3, 30, 40\); expected \(3, 16, 16\): end it with a crop"):
        next(iter(wrong.train_dataloader()))


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("L", 100, "png", (100, 100, 100)),
        ("1", 1, "png", (255, 255, 255)),
        ("LA", (100, 10), "png", (100, 100, 100)),
        ("RGBA", (10, 20, 30, 40), "png", (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), "tif", (0, 255, 255)),
        ("I;16", 257 * 100, "png", (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value, suffix, expected):
    Image.new(mode, (5, 4), value).save(tmp_path / f"x.{suffix}")
    image = open_image(tmp_path / f"x.{suffix}")
    assert (image.shape, image.dtype) == ((4, 5, 3), np.uint8)
    assert (image == expected).all()


def test_palettes_and_exif(tmp_path):
    Image.new("RGB", (5, 4), (10, 20, 30)).quantize(4).save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P"
    assert (open_image(tmp_path / "p.png") == (10, 20, 30)).all()
    turned = Image.new("RGB", (5, 4))
    turned.getexif()[0x0112] = 6  # turn by 90 degrees
    turned.save(tmp_path / "t.jpg", exif=turned.getexif())
    assert open_image(tmp_path / "t.jpg").shape == (5, 4, 3)


def cut_short(folder):
    file = folder / "red" / "03.png"
    Image.effect_noise((40, 30), 50).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:300])
    return file


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line(tmp_path, workers):
    file = cut_short(fill(tmp_path))
    data = made(tmp_path, num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(itertools.chain(data.train_dataloader(), data.val_dataloader()))
    text = str(caught.value)
    assert text.startswith(f"image {file} can't be read (")
    assert text.endswith("; replace the file or remove it")
    assert "\n" not in text
    traceback.clear_frames(caught.tb)  # ends the worker now; the garbage collector would take 5 s to


def test_other_files_that_are_no_images(tmp_path):
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(DataError, match=r"image .*x.png can't be read \(cannot identify image file"):
        open_image(tmp_path / "x.png")
    Image.new("F", (3, 3)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f.tif can't be read \(its pixels are floating-point"):
        open_image(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"gone.png can't be read"):
        open_image(tmp_path / "gone.png")


def test_folders_that_can_not_be_used_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder; expected a folder with one sub-folder"):
        made(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no class folders"):
        made(tmp_path / "empty")
    fill(tmp_path / "some")
    (tmp_path / "some" / "yellow").mkdir()
    (tmp_path / "some" / "yellow" / "notes.txt").write_text("later")
    with pytest.raises(DataError, match=r"class folder .*yellow has no images; expected files that end in \.bmp"):
        made(tmp_path / "some")


def test_a_class_that_training_lacks_is_named(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", 2, [*COLOURS, "violet"])
    with pytest.raises(DataError, match=r"val has the class folders violet, which train/ lacks; .*blue, green, red"):
        made(tmp_path)


def test_classes_that_validation_lacks_keep_their_numbers(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", 2, ["red"])
    assert made(tmp_path).splits.val.labels.tolist() == [2, 2]


def test_without_a_test_folder_test_and_predict_say_so(tmp_path):
    data = made(fill(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path} has no test images; add a test/ folder"):
        data.predict_dataloader()


def test_hidden_files_and_deeper_folders(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "red" / ".hidden.png").write_text("x")
    (tmp_path / "red" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "red" / "deeper" / "ä.JPG", format="jpeg")
    found = find_classes(tmp_path)
    assert list(found) == ["blue", "green", "red"]
    assert [file.name for file in found["red"]] == ["00.png", "01.png", "ä.JPG"]


def test_it_trains_with_workers_and_mixing(tmp_path):
    class Probe(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.seen = []

        def training_step(self, batch, index):
            self.seen.append({key: value.clone() for key, value in batch.items()})
            return self.layer(batch["image"].mean((2, 3))).square().mean()

        def validation_step(self, batch, index):
            assert "mix" not in batch

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seen = []
    for workers in (0, 2):
        model = Probe()
        L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(model, made(tmp_path if seen else fill(tmp_path), num_workers=workers, cutmix_alpha=1.0, batch_size=9))
        seen.append(model.seen)
    assert set(seen[0][0]) == {"image", "label", "label_mixed", "mix"}
    for here, there in zip(*seen, strict=True):
        assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"image_size": 0}, "image_size is 0; expected"), ({"std": [1.0, 0.0, 1.0]}, "expected three numbers each")],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        ImageFolder("x", **arguments)
