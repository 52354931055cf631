import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from ds_lightning.datamodules.view_transforms import BatchViews, as_unit, blur_reach, crop_and_resize, gaussian_blur
from ds_lightning.errors import ConfigError

JITTER = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def one_view(image, numbers, order):
    """One image by torchvision, with the numbers of a draw."""
    top, left, height, width, mirrored, *factors, grey, sigma = numbers.tolist()
    size = list(image.shape[-2:])
    # A crop is never greater than its image, so nothing is to be smoothed, and torch smooths a width of 1 wrongly.
    view = TF.resized_crop(image, int(top), int(left), int(height), int(width), size, antialias=False)
    view = TF.horizontal_flip(view) if mirrored else view
    colors = len(image) == 3
    for kind in order:
        if colors or kind < 2:
            view = JITTER[kind](view, factors[kind])
    if grey and colors:
        view = TF.rgb_to_grayscale(view, 3)
    kernel = 2 * min(blur_reach(*size), min(size) - 1) + 1
    return TF.gaussian_blur(view, [kernel, kernel], [sigma, sigma]) if sigma and kernel > 1 else view


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 45),
    width=st.integers(1, 45),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_each_sample_equals_torchvisions_with_the_same_numbers(batch, channels, height, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
    image = image if dtype == torch.uint8 else image / 255
    before = image.clone()
    views = BatchViews(crop_scale=(0.05, 1.0), color=1.0, grayscale=0.3, blur=0.5)
    draw = views.draw(batch, height, width, seed)
    got = views.apply(image, draw)
    assert torch.equal(image, before)
    assert got.shape == image.shape
    assert got.dtype == torch.float32
    for sample, numbers, view in zip(as_unit(image), draw.numbers, got, strict=True):
        # The hue of a pixel that is nearly grey is worth little, but the pixel stays where it is.
        torch.testing.assert_close(view, one_view(sample, numbers, draw.order), atol=3e-5, rtol=0)


def test_float16_and_bfloat16_are_computed_in_float32():
    image = torch.rand(3, 3, 8, 8)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        first, _ = BatchViews().pair(image.to(dtype), seed=1)
        assert first.dtype == torch.float32
        torch.testing.assert_close(first, BatchViews().pair(image.to(dtype).float(), seed=1)[0])


def test_pixels_beside_the_box_play_no_part():
    image = torch.full((1, 1, 9, 9), 100.0)
    image[..., 2:6, 3:8] = torch.arange(20.0).view(4, 5) / 20
    got = crop_and_resize(image, torch.tensor([[2.0, 3, 4, 5]]), torch.zeros(1))
    assert 0.94 < float(got.max()) < 0.951


def test_the_whole_image_stays_and_is_mirrored():
    image = torch.rand(2, 3, 7, 12)
    got = crop_and_resize(image, torch.tensor([[0.0, 0, 7, 12]] * 2), torch.tensor([0.0, 1]))
    torch.testing.assert_close(got, torch.stack([image[0], image[1].flip(-1)]), atol=1e-5, rtol=0)


def test_all_off_is_the_image_itself():
    views = BatchViews((1.0, 1.0), (1.0, 1.0), flip=False, color=0.0, grayscale=0.0)
    assert views.changes_nothing
    assert not BatchViews().changes_nothing
    image = torch.rand(4, 3, 10, 10)
    first, second = views.pair(image, seed=0)
    torch.testing.assert_close(first, image, atol=1e-5, rtol=0)
    assert torch.equal(first, second)


def test_other_numbers_of_channels_get_brightness_and_contrast():
    views = BatchViews(color=1.0, color_probability=1.0, grayscale=1.0)
    image = torch.rand(4, 5, 8, 8)
    draw = views.draw(4, 8, 8, seed=0)
    got = views.apply(image, draw)
    expected = crop_and_resize(image, draw.numbers[:, :4], draw.numbers[:, 4])
    for kind in (kind for kind in draw.order if kind < 2):
        factor = draw.numbers[:, 5 + kind].view(-1, 1, 1, 1)
        base = torch.zeros(()) if kind == 0 else expected.mean((1, 2, 3), keepdim=True)
        expected = (factor * expected + (1 - factor) * base).clamp(0, 1)
    torch.testing.assert_close(got, expected)


def test_two_views_differ_and_follow_from_the_seed():
    image, views = torch.rand(8, 3, 16, 16), BatchViews(blur=0.5)
    state = torch.get_rng_state()
    first, second = views.pair(image, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(*views) for views in zip(first, second, strict=True))
    again = BatchViews(blur=0.5).pair(image, seed=3)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, views.pair(image, seed=4)[0])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    peer = v2.RandomResizedCrop((height, width), scale=(0.2, 1.0))
    image = torch.zeros(1, height, width)
    found = [peer.make_params([image]) for _ in range(3000)]
    wanted = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in found])
    got = BatchViews().draw(3000, height, width, seed=1).numbers[:, :4]
    for column in range(4):
        assert stats.ks_2samp(got[:, column], wanted[:, column]).pvalue > 1e-3
    assert (got[:, :2] >= 0).all()
    assert (got[:, 0] + got[:, 2] <= height).all()
    assert (got[:, 1] + got[:, 3] <= width).all()


def test_a_shape_that_no_crop_fits_gets_the_central_one():
    views = BatchViews(crop_scale=(1.0, 1.0))
    assert views.draw(2, 10, 50, seed=0).numbers[:, :4].tolist() == [[0, (50 - 13) // 2, 10, 13]] * 2
    assert views.draw(2, 50, 10, seed=0).numbers[:, :4].tolist() == [[(50 - 13) // 2, 0, 13, 10]] * 2


def test_the_distribution_of_the_other_numbers():
    views = BatchViews(color=0.5, color_probability=0.8, grayscale=0.2, blur=0.4, blur_sigma=(0.5, 1.5))
    numbers = views.draw(20000, 32, 32, seed=2).numbers.double()
    grey, sigma = numbers[:, 9], numbers[:, 10]
    jittered = numbers[:, 5] != 1
    for share, chance in ((numbers[:, 4], 0.5), (jittered.double(), 0.8), (grey, 0.2), ((sigma > 0).double(), 0.4)):
        assert abs(float(share.mean()) - chance) < 5 * math.sqrt(chance * (1 - chance) / 20000)
    for column, low, high in ((5, 0.6, 1.4), (6, 0.6, 1.4), (7, 0.6, 1.4), (8, -0.1, 0.1)):
        assert stats.kstest(numbers[jittered, column], "uniform", (low, high - low)).pvalue > 1e-3
        assert (numbers[~jittered, column] == (0 if column == 8 else 1)).all()
    assert stats.kstest(sigma[sigma > 0], "uniform", (0.5, 1.0)).pvalue > 1e-3
    # Independent of each other.
    assert torch.corrcoef(torch.stack([numbers[:, 4], jittered.double(), grey, sigma])).triu(1).abs().max() < 0.03
    orders = [views.draw(1, 2, 2, seed).order for seed in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_at_the_greatest_strength_factors_stay_in_their_ranges():
    numbers = BatchViews(color=2.5, color_probability=1.0).draw(5000, 8, 8, seed=0).numbers
    assert (numbers[:, 5:8] >= 0).all()
    assert (numbers[:, 5:8] <= 3).all()
    assert (numbers[:, 8].abs() <= 0.5).all()


def test_blur_at_sigma_zero_changes_nothing():
    image = torch.rand(2, 3, 40, 40)
    got = gaussian_blur(image, torch.tensor([0.0, 1.0]))
    assert torch.equal(got[0], image[0])
    torch.testing.assert_close(got[1], TF.gaussian_blur(image[1], [5, 5], [1.0, 1.0]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale is \[0.0, 1.0\]; expected two numbers, 0 < least <= greatest <= 1"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale is"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale is"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio is"),
        ({"blur_sigma": (1.0, math.inf)}, "blur_sigma is"),
        ({"color": 3.0}, r"color is 3.0; expected a strength in \[0, 2.5\]"),
        ({"color_probability": 1.5}, "color_probability is 1.5; expected a probability"),
        ({"grayscale": -0.1}, "grayscale is -0.1"),
        ({"blur": math.nan}, "blur is nan"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        BatchViews(**arguments)
