import pytest
import torch

from ds_lightning.datamodules.text_views import TokenViews
from ds_lightning.datamodules.view_samples import MapImages, NumberedSamples, TextPairs, ViewSamples, with_transform
from ds_lightning.errors import DataError


class Source:
    """Ten samples; each says its number."""

    transform = None

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return {"text": torch.tensor(indices)[:, None].repeat(1, 6) + 2, "label": torch.tensor(indices) % 2}


def test_numbers_and_labels():
    batch = NumberedSamples(Source(), use_labels=True).__getitems__([4, 1])
    assert batch["index"].tolist() == [4, 1]
    assert batch["label"].tolist() == [0, 1]
    assert "label" not in NumberedSamples(Source(), use_labels=False).__getitems__([4, 1])
    with pytest.raises(DataError, match="samples come in batches only"):
        NumberedSamples(Source(), use_labels=True)[0]


def test_the_seed_follows_from_seed_split_epoch_and_first_sample():
    def seed(user=0, split="train", epoch=0, indices=(3, 1)):
        data = ViewSamples(Source(), False, user, split)
        data.epoch.fill_(epoch)
        return data.__getitems__(list(indices))["seed"]

    assert seed() == seed(indices=(3, 2))
    others = [seed(user=1), seed(split="val"), seed(epoch=1), seed(indices=(1, 3))]
    assert len({seed(), *others}) == 5
    assert isinstance(seed(), int)


def test_texts_of_a_batch_are_made_in_the_loader():
    batch = TextPairs(Source(), TokenViews(0.3, 2), True, 0, "train").__getitems__([5, 6, 7])
    assert list(batch) == ["first", "second", "label", "index"]
    for view in ("first", "second"):
        for row, wanted in zip(batch[view]["text"].tolist(), (7, 8, 9), strict=True):
            assert set(row) - {0} == {wanted}


def test_images_are_looked_up_by_row():
    data = MapImages([torch.full((1, 2, 2), n / 10) for n in range(10)], torch.tensor([7, 2, 5]))
    assert len(data) == 3
    torch.testing.assert_close(data.__getitems__([2, 0])["image"][:, 0, 0, 0], torch.tensor([0.5, 0.7]))
    shapes = [torch.zeros(1, 2, 2), torch.zeros(1, 3, 2)]
    with pytest.raises(DataError, match=r"shapes \[\(1, 2, 2\), \(1, 3, 2\)\]; expected one shape"):
        MapImages(shapes, torch.arange(2)).__getitems__([0, 1])


def test_the_data_set_that_is_given_another_transform_stays_as_it_is():
    source = Source()
    assert with_transform(source, len).transform is len
    assert source.transform is None
