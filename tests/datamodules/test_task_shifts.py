import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.mnist5k import read_digits
from ds_lightning.datamodules.task_shifts import (
    DOMAINS,
    GaussianBlur,
    GaussianNoise,
    LookUp,
    Pixelate,
    PixelPermutation,
    Rotation,
    domain_shift,
)

DIGITS = read_digits()[0][::500]
ROWS = torch.arange(len(DIGITS))
COLOUR = torch.randint(0, 256, (3, 3, 9, 14), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_permutation_moves_whole_pixels_and_keeps_all_of_them():
    pixels = torch.arange(9 * 14).view(1, 1, 9, 14).expand(2, 3, 9, 14).to(torch.uint8)
    moved = PixelPermutation(9, 14, seed=3)(pixels, ROWS[:2], 0)
    assert sorted(moved[0, 0].flatten().tolist()) == list(range(126))
    assert moved[0, 0].flatten().tolist() != list(range(126))
    assert torch.equal(moved, moved[:1, :1].expand_as(moved))
    assert not torch.equal(moved, PixelPermutation(9, 14, seed=4)(pixels, ROWS[:2], 0))
    assert torch.equal(moved, PixelPermutation(9, 14, seed=3)(pixels, ROWS[:2], 0))


@pytest.mark.parametrize("angle", [-120.0, 17.0, 30.0, 90.0, 180.0])
@pytest.mark.parametrize("images", [DIGITS, COLOUR], ids=["square", "wide"])
def test_a_rotation_is_scipys(images, angle):
    turned = Rotation(*images.shape[2:], angle)(images, ROWS[: len(images)], 0)
    expected = scipy.ndimage.rotate(
        images.numpy().astype(float), angle, axes=(3, 2), reshape=False, order=1, mode="grid-constant"
    )
    # scipy and torch round a pixel that lies between two values either way.
    assert np.abs(turned.numpy() - expected).max() <= 0.51


def test_a_quarter_turn_goes_counter_clockwise():
    assert torch.equal(Rotation(28, 28, 90)(DIGITS, ROWS, 0), torch.rot90(DIGITS, 1, (2, 3)))


@pytest.mark.parametrize("sigma", [0.5, 1.4, 3.0])
def test_a_blur_is_scipys(sigma):
    radius = max(1, int(np.ceil(3 * sigma)))
    expected = scipy.ndimage.gaussian_filter(
        COLOUR.numpy().astype(float), (0, 0, sigma, sigma), mode="nearest", radius=(0, 0, radius, radius)
    )
    assert np.abs(GaussianBlur(9, 14, sigma)(COLOUR, ROWS[:3], 0).numpy() - expected).max() <= 0.51


def test_noise_belongs_to_the_sample_and_its_split():
    noise = GaussianNoise(1, 28, 28, deviation=20, seed=1)
    grey = torch.full((500, 1, 28, 28), 128, dtype=torch.uint8)
    rows = torch.arange(500)
    noisy = noise(grey, rows, 0)
    order = torch.randperm(500)
    assert torch.equal(noise(grey, order, 0), noisy[order])
    assert torch.equal(noise(grey[:1], rows[7:8], 0)[0], noisy[7])
    difference = noisy.double() - 128
    assert abs(difference.mean()) < 0.2
    assert difference.std() == pytest.approx(20, rel=0.01)
    correlation = torch.corrcoef(difference.flatten(1)) - torch.eye(500, dtype=torch.float64)
    assert correlation.abs().max() < 0.25
    assert not torch.equal(noise(grey, rows, 1), noisy)
    assert not torch.equal(GaussianNoise(1, 28, 28, deviation=20, seed=2)(grey, rows, 0), noisy)


def test_light_is_a_function_of_the_grey_value():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    changed = {name: domain_shift(name, (1, 16, 16), 1.0, 0)(every, ROWS[:1], 0) for name in DOMAINS[3:6]}
    for value in range(256):
        row, column = divmod(value, 16)
        got = {name: int(image[0, 0, row, column]) for name, image in changed.items()}
        assert abs(got["contrast"] - (127.5 + (value - 127.5) / 3)) <= 0.5
        assert got["bright"] == min(value + 90, 255)
        assert abs(got["dark"] - value / 3) <= 0.5
    assert torch.equal(LookUp(lambda value: 255 - value)(every, ROWS[:1], 0), 255 - every)


def test_pixelate_is_the_mean_of_a_block():
    coarse = Pixelate(4)(COLOUR, ROWS[:3], 0)
    for top in range(0, 9, 4):
        for left in range(0, 14, 4):
            block = COLOUR[:, :, top : top + 4, left : left + 4].double().mean((2, 3), keepdim=True)
            assert (coarse[:, :, top : top + 4, left : left + 4] - block).abs().max() <= 0.51


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(DOMAINS),
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 12), st.integers(1, 12)),
    st.floats(0.1, 5),
)
def test_every_domain_keeps_shape_type_and_the_callers_images(name, shape, severity):
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    before = images.clone()
    shift = domain_shift(name, shape, severity, seed=0)
    if shift is None:
        assert name == "clear"
        return
    changed = shift(images, torch.tensor([0, 1]), 0)
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(images, before)
