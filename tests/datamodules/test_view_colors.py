import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from ds_lightning.datamodules.view_colors import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    grey_of,
    mix_grey,
)

PAIRS = [
    (adjust_brightness, TF.adjust_brightness, (0.0, 2.0)),
    (adjust_contrast, TF.adjust_contrast, (0.0, 2.0)),
    (adjust_saturation, TF.adjust_saturation, (0.0, 2.0)),
    (adjust_hue, TF.adjust_hue, (-0.5, 0.5)),
]


def images(channels=3):
    """Random ones, and those where colours are equal or at an end."""
    torch.manual_seed(0)
    image = torch.rand(8, channels, 6, 5)
    image[1] = 0
    image[2] = 1
    image[3] = torch.rand(1, 6, 5)
    image[4] = torch.randint(2, (channels, 6, 5)).float()
    image[5] = torch.randint(3, (channels, 6, 5)).float() / 2
    return image


@pytest.mark.parametrize(("batched", "single", "reach"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_each_sample_equals_torchvisions_image(batched, single, reach):
    image = images()
    factor = torch.linspace(*reach, 8)
    expected = torch.stack([single(x, f) for x, f in zip(image, factor.tolist(), strict=True)])
    torch.testing.assert_close(batched(image.clone(), factor.view(-1, 1, 1, 1)), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("batched", "single"), [pair[:2] for pair in PAIRS[:2]])
def test_grey_images_change_as_torchvisions(batched, single):
    image = images(1)
    factor = torch.linspace(0, 2, 8)
    expected = torch.stack([single(x, f) for x, f in zip(image, factor.tolist(), strict=True)])
    torch.testing.assert_close(batched(image.clone(), factor.view(-1, 1, 1, 1)), expected, atol=2e-6, rtol=0)


def test_factors_of_one_change_nothing():
    image, one = images(), torch.ones(8, 1, 1, 1)
    for adjust in (adjust_brightness, adjust_contrast, adjust_saturation):
        assert torch.equal(adjust(image.clone(), one), image)
    torch.testing.assert_close(adjust_hue(image.clone(), 0 * one), image, atol=1e-6, rtol=0)


def test_grey_is_all_or_nothing_by_sample():
    image, share = images(), (torch.arange(8) % 2).float().view(-1, 1, 1, 1)
    got = mix_grey(image.clone(), share)
    assert torch.equal(got[::2], image[::2])
    torch.testing.assert_close(got[1::2], TF.rgb_to_grayscale(image[1::2], 3), atol=1e-6, rtol=0)


def test_grey_of_other_numbers_of_channels_is_the_mean():
    image = images(5)
    torch.testing.assert_close(grey_of(image)[:, 0], sum(image[:, c] for c in range(5)) / 5)
