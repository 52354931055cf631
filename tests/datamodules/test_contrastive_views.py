import inspect
import warnings

import albumentations
import pytest
import torch
from squares import Squares, ready
from torch.utils.data import Dataset
from view_cases import same

from ds_lightning.datamodules import ContrastiveViews, TextFiles
from ds_lightning.datamodules.view_transforms import BatchViews
from ds_lightning.errors import ConfigError, DataError, NoEffectWarning
from ds_lightning.functional.seeds import derived_seed


def views(data, split="train"):
    """All batches of a split, as a module gets them."""
    loader = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def texts(folder):
    path = folder / "texts.txt"
    path.write_text("".join(f"{'ab'[n % 2]} word {n} is not word {n + 1} nor another\n" for n in range(40)))
    return TextFiles(str(path), max_length=32)


class Pictures(Dataset):
    """A map-style data set; the first pixel says which image it is."""

    def __init__(self, count=40, make=lambda n, image: (image, n % 2), dtype=torch.uint8):
        self.count, self.make, self.dtype = count, make, dtype

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        image = torch.full((3, 8, 8), n, dtype=torch.uint8)
        return self.make(n, image if self.dtype == torch.uint8 else image.to(self.dtype) / 255)


def test_the_batch_of_images():
    data = ready(ContrastiveViews(Squares(), batch_size=16, use_labels=True))
    batches = views(data)
    assert len(batches) == 54 // 16
    for batch in batches:
        assert list(batch) == ["first", "second", "label", "index"]
        for view in ("first", "second"):
            assert set(batch[view]) == {"image"}
            assert batch[view]["image"].shape == (16, 1, 6, 6)
            assert batch[view]["image"].dtype == torch.float32
        assert batch["index"].dtype == torch.int64
    assert "label" not in views(ready(ContrastiveViews(Squares(), batch_size=16)))[0]
    assert (data.num_classes, data.class_names) == (3, ["dark", "light", "bright"])
    assert data.input_shape == (1, 6, 6)
    assert data.dataset_info()["splits"] == {"train": 54, "val": 6, "test": 30}


def test_views_are_those_of_batch_views_normalised():
    base = Squares(seed=4)
    data = ready(ContrastiveViews(base, batch_size=16, color=1.0, blur=0.5, seed=7))
    for batch in views(data):
        rows = batch["index"].tolist()
        image = base.splits.train.__getitems__(rows)["image"]
        seed = derived_seed(7, "views", "train", 0, rows[0])
        for view, expected in zip(("first", "second"), BatchViews(color=1.0, blur=0.5).pair(image, seed), strict=True):
            torch.testing.assert_close(batch[view]["image"], (expected - 0.5) / 0.5)


def test_the_workers_play_no_part():
    drop = albumentations.Compose([albumentations.PixelDropout(dropout_prob=0.5, p=1.0)])
    for transform in (None, drop):
        here, there = (
            views(ready(ContrastiveViews(Squares(), transform, batch_size=27, num_workers=n))) for n in (0, 1)
        )
        assert all(same(*pair) for pair in zip(here, there, strict=True))
        other = views(ready(ContrastiveViews(Squares(), transform, batch_size=27, seed=1)))
        assert not same(here[0], other[0])


def test_loading_leaves_the_global_generator_alone(tmp_path):
    for data in (Squares(), texts(tmp_path)):
        data = ready(ContrastiveViews(data, batch_size=8))
        state = torch.get_rng_state()
        views(data)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_transform_of_the_user_makes_both_views():
    calls = []

    def transform(image):
        calls.append(int(image[0, 0, 0]))
        return {"image": image + len(calls) % 2}

    base = Squares(seed=1)
    data = ready(ContrastiveViews(base, transform, batch_size=27, use_labels=True))
    batch = views(data)[0]
    assert calls[:54] == 2 * base.splits.train.__getitems__(batch["index"].tolist())["image"][:, 0, 0, 0].tolist()
    plain = data.plain({"image": base.splits.train.__getitems__(batch["index"].tolist())["image"]})["image"]
    apart = torch.stack([batch["first"]["image"] - plain, batch["second"]["image"] - plain])[:, :, 0, 0, 0]
    step = 2 / 255
    torch.testing.assert_close(apart[0], torch.arange(1, 28) % 2 * step, atol=1e-6, rtol=0)
    torch.testing.assert_close(apart[1], torch.arange(28, 55) % 2 * step, atol=1e-6, rtol=0)
    assert batch["label"].tolist() == [n % 3 for n in calls[:27]]


def test_a_pipeline_of_albumentations_gives_views_that_differ():
    drop = albumentations.Compose([albumentations.PixelDropout(dropout_prob=0.5, p=1.0)])
    data = ready(ContrastiveViews(Squares(), drop, batch_size=27))
    first, second = views(data), views(data, "val")
    assert not torch.equal(first[0]["first"]["image"], first[0]["second"]["image"])
    assert same(second[0], views(data, "val")[0])


@pytest.mark.parametrize(
    "make", [lambda n, image: image, lambda n, image: (image, n % 2), lambda n, image: {"image": image, "label": n % 2}]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_data_set_of_images(make, dtype):
    off = {"crop_scale": (1.0, 1.0), "flip": False, "color": 0.0, "grayscale": 0.0}
    with pytest.warns(NoEffectWarning, match="the two views of an image are the same"):
        data = ready(
            ContrastiveViews(Pictures(make=make, dtype=dtype), batch_size=4, use_labels=True, val_fraction=0.25, **off)
        )
    labelled = not isinstance(make(0, torch.zeros(())), torch.Tensor)
    seen = []
    for batch in views(data) + views(data, "val"):
        assert ("label" in batch) == labelled
        pixel = (batch["first"]["image"][:, 0, 0, 0] * 255).round().long()
        seen += pixel.tolist()
        if labelled:
            assert torch.equal(batch["label"], pixel % 2)
    assert len(seen) == 38
    assert data.input_shape == (3, 8, 8)
    assert data.dataset_info()["splits"] == {"train": 30, "val": 10, "test": 0}


def test_probe_loaders_give_samples_as_they_are():
    base = Squares()
    data = ready(ContrastiveViews(base, batch_size=16, num_workers=0))
    train, val = data.labelled_loaders()
    for split, loader, size in (("train", train, 54), ("val", val, 6)):
        batches = [data.plain(batch) for batch in loader]
        assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(size))
        wanted = getattr(base.splits, split).__getitems__(list(range(size)))
        got = torch.cat([batch["image"] for batch in batches])
        torch.testing.assert_close(got, base.normalize(wanted["image"]))
        assert torch.equal(torch.cat([batch["label"] for batch in batches]), wanted["label"])
    assert len(data.labelled_loaders("test")[1].dataset) == 30
    with pytest.raises(DataError, match="Pictures gives no labels; expected labelled data for a probe"):
        ready(ContrastiveViews(Pictures(make=lambda n, image: image), batch_size=4)).labelled_loaders()


def test_texts(tmp_path):
    data = ready(ContrastiveViews(texts(tmp_path), batch_size=9, use_labels=True, word_deletion=0.3, seed=2))
    batch = views(data)[0]
    assert list(batch) == ["first", "second", "label", "index"]
    plain = data.sources.plain["train"].__getitems__(batch["index"].tolist())
    assert torch.equal(batch["label"], plain["label"])
    for view in ("first", "second"):
        for row, full in zip(batch[view]["text"], plain["text"], strict=True):
            assert set(row.tolist()) - {0} <= set(full.tolist())
    assert batch["first"]["text"].tolist() != batch["second"]["text"].tolist()
    assert data.vocab_size == 20000
    assert same(views(data, "val")[0], views(data, "val")[0])
    train, _ = data.labelled_loaders()
    assert set(data.plain(next(iter(train)))) == {"text", "label", "index"}
    same_twice = ready(ContrastiveViews(texts(tmp_path), batch_size=9, word_deletion=0.0, swap_distance=0))
    batch = views(same_twice)[0]
    assert torch.equal(batch["first"]["text"], batch["second"]["text"])


def test_texts_go_on_with_the_checkpoints_words(tmp_path):
    data = ready(ContrastiveViews(texts(tmp_path), batch_size=9))
    state = data.state_dict()
    state["data"]["vocabulary"].reverse()
    before = views(data)[0]["first"]["text"]
    data.load_state_dict(state)
    after = views(data)[0]["first"]["text"]
    words = len(state["data"]["vocabulary"])
    assert torch.equal(after, torch.where(before > 1, words + 3 - before, before))


def test_hyperparameters_are_primitives():
    data = ContrastiveViews(Squares(), lambda image: {"image": image}, seed=3)
    expected = set(inspect.signature(ContrastiveViews.__init__).parameters) - {"self", "data", "transform"}
    assert set(data.hparams) == expected


def test_what_plays_no_part_is_warned_of():
    for arguments in ({"crop_padding": 1}, {"transform": lambda image: {"image": image}}):
        with pytest.warns(NoEffectWarning, match="of Squares are not used; set the views' own"):
            ready(ContrastiveViews(Squares(**arguments)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(ContrastiveViews(Squares()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 1}, "batch_size is 1; expected an integer >= 2"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is"),
        ({"color": -1.0}, "color is -1.0"),
        ({"word_deletion": 1.0}, "word_deletion is 1.0"),
        ({"data": Squares(mixup_alpha=0.2)}, "data mixes its images .* expected both 0"),
        ({"data": 3}, "data is a int; expected an image DataModule"),
        ({"data": TextFiles("a.csv"), "transform": len}, "transform is for images; for texts set word_deletion"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        ContrastiveViews(**({"data": Squares()} | arguments))


def test_data_that_can_not_be_used_is_named():
    with pytest.raises(DataError, match="ContrastiveViews has no data yet"):
        ContrastiveViews(Squares()).train_dataloader()
    with pytest.raises(DataError, match="a process has 54 training samples, too few for one batch of batch_size 256"):
        ready(ContrastiveViews(Squares())).train_dataloader()
    with pytest.raises(DataError, match="Pictures has no samples for 'test'; it has train, val"):
        ready(ContrastiveViews(Pictures())).test_dataloader()
    with pytest.raises(DataError, match="Squares has no texts, so no vocab_size"):
        _ = ContrastiveViews(Squares()).vocab_size
    with pytest.raises(ConfigError, match=r"val_fraction is 0.001, which leaves 0 of 40 samples"):
        ready(ContrastiveViews(Pictures(), val_fraction=0.001))
    with pytest.raises(DataError, match="transform is made for"):
        ready(ContrastiveViews(Pictures(dtype=torch.float32), len))
    for make, text in (
        (lambda n, image: (image.float() * 2 - 9, 0), "gives images from .* expected uint8, or floats from 0 to 1"),
        (lambda n, image: image.long(), "gives images of torch.int64"),
        (lambda n, image: image[0], r"images of the shapes \[\(8, 8\)\]; expected one shape \(C, H, W\)"),
        (lambda n, image: ("name", 0), "gives a tuple with an image of str"),
    ):
        with pytest.raises(DataError, match=text):
            ready(ContrastiveViews(Pictures(make=make)))
    wide = ContrastiveViews(
        Pictures(make=lambda n, image: image.float() * 2 - 9), color=0.0, grayscale=0.0, batch_size=4
    )
    assert float(views(ready(wide))[0]["first"]["image"].max()) > 1
