import pytest
import torch
from scipy import stats

from ds_lightning.datamodules.augment import RandomCropFlip


def crops(image, padding):
    """Every crop of the padded image, by slicing."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return {
        (top, left): padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_image_is_one_of_the_crops_or_its_mirror_image(dtype):
    images = torch.randint(1, 255, (200, 2, 5, 7)).to(dtype)
    before = images.clone()
    result = RandomCropFlip(crop_padding=1, horizontal_flip=True)(images)
    assert torch.equal(images, before)
    assert result.dtype == dtype
    seen = []
    for image, got in zip(images, result, strict=True):
        found = [
            (place, mirrored)
            for place, crop in crops(image, 1).items()
            for mirrored in (False, True)
            if torch.equal(got, crop.flip(2) if mirrored else crop)
        ]
        assert len(found) == 1
        seen += found
    counts = [seen.count((place, m)) for place in crops(images[0], 1) for m in (False, True)]
    assert stats.chisquare(counts).pvalue > 0.001


def test_without_flip_and_padding_nothing_changes():
    image = torch.rand(4, 1, 6, 6)
    assert torch.equal(RandomCropFlip()(image), image)


def test_seed_rank_and_state():
    image = torch.rand(16, 1, 8, 8)
    first = RandomCropFlip(2, True, seed=1)
    whole = [first(image) for _ in range(3)]
    resumed = RandomCropFlip(2, True, seed=1)
    resumed.load_state_dict({"batches": 2})
    assert torch.equal(resumed(image), whole[2])
    assert first.state_dict() == {"batches": 3}
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(RandomCropFlip(2, True, seed=1, rank=1)(image), whole[0])
    assert not torch.equal(RandomCropFlip(2, True, seed=2)(image), whole[0])


def test_wrong_padding_is_named():
    with pytest.raises(ValueError, match="crop_padding is -1; expected"):
        RandomCropFlip(-1)
