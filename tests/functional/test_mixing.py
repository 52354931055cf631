import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.functional import mixing
from ds_lightning.functional.mixing import cutmix, mixup, paste_boxes


def mixup_one_by_one(x, lam, index):
    return torch.stack([torch.lerp(x[index[i]], x[i], lam[i].to(x.dtype)) for i in range(len(x))])


def cutmix_one_by_one(x, lam, index, center):
    """The paper's algorithm, sample by sample, in plain Python and NumPy."""
    out, shares = x.clone(), []
    height, width = x.shape[2:]
    for i in range(len(x)):
        side = np.sqrt(np.float32(1) - np.float32(lam[i]))
        box_height, box_width = math.floor(np.float32(height) * side), math.floor(np.float32(width) * side)
        top = math.floor(np.float32(center[i, 0]) * np.float32(height)) - box_height // 2
        left = math.floor(np.float32(center[i, 1]) * np.float32(width)) - box_width // 2
        kept = height * width
        for row in range(max(top, 0), min(top + box_height, height)):
            for column in range(max(left, 0), min(left + box_width, width)):
                out[i, :, row, column] = x[index[i], :, row, column]
                kept -= 1
        shares.append(kept / (height * width))
    return out, torch.tensor(shares)


@st.composite
def batches(draw):
    batch, channels = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    lam = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.3, 0.75, 1.0]), min_size=batch, max_size=batch)))
    index = torch.tensor(draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
    if draw(st.booleans()):
        index = torch.randperm(batch, generator=generator)
    x = torch.randn(batch, channels, height, width, generator=generator)
    block = draw(st.sampled_from([1, 64, 1 << 20]))
    return x, lam, index, torch.rand(batch, 2, generator=generator), block


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_mixup_equals_the_loop_over_samples_bit_for_bit(case, dtype):
    x, lam, index, _, block = case
    x = x.to(dtype)
    before = x.clone()
    expected = mixup_one_by_one(x, lam, index)
    assert torch.equal(mixup(x, lam, index), expected)
    assert torch.equal(x, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "BLOCK_BYTES", block)
        assert mixup(x, lam, index, inplace=True) is x
    assert torch.equal(x, expected)


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8]))
def test_cutmix_equals_the_loop_over_pixels_bit_for_bit(case, dtype):
    x, lam, index, center, block = case
    x = (x * 100).clamp(0, 255).to(dtype)
    before = x.clone()
    expected, shares = cutmix_one_by_one(x, lam, index, center)
    mixed, share = cutmix(x, lam, index, center=center)
    assert torch.equal(mixed, expected)
    assert torch.equal(share, shares)
    assert torch.equal(x, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "BLOCK_BYTES", block)
        assert cutmix(x, lam, index, center=center, inplace=True)[0] is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
def test_any_memory_layout(layout, inplace):
    dense = torch.randn(4, 3, 6, 6)
    lam, index, center = torch.tensor([0.2, 0.5, 0.8, 0.0]), torch.tensor([1, 2, 3, 0]), torch.rand(4, 2)
    expected = cutmix_one_by_one(dense, lam, index, center)[0], mixup_one_by_one(dense, lam, index)
    for function, right in zip(
        (
            lambda x: cutmix(x, lam, index, center=center, inplace=inplace)[0],
            lambda x: mixup(x, lam, index, inplace=inplace),
        ),
        expected,
        strict=True,
    ):
        x = (
            dense.clone(memory_format=torch.channels_last)
            if layout == "channels_last"
            else dense.transpose(2, 3).contiguous().transpose(2, 3)
        )
        result = function(x)
        assert torch.equal(result, right)
        assert (result is x) == inplace
        assert torch.equal(x, right if inplace else dense)


def test_partners_in_a_cycle_are_read_before_they_are_written():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 5, 5).contiguous()
    index = torch.tensor([1, 2, 3, 0])
    zero = torch.zeros(4)
    assert mixup(x.clone(), zero, index, inplace=True)[:, 0, 0, 0].tolist() == [1, 2, 3, 0]
    center = torch.full((4, 2), 0.5)
    mixed, share = cutmix(x.clone(), zero, index, center=center, inplace=True)
    assert mixed[:, 0, 0, 0].tolist() == [1, 2, 3, 0]
    assert share.tolist() == [0, 0, 0, 0]


def test_weight_one_keeps_the_sample_and_weight_zero_gives_the_partner():
    x = torch.randn(3, 2, 7, 5)
    x[0, 0, 0, 0], x[1, 1, 2, 2] = -0.0, 1e-42
    index = torch.tensor([2, 0, 1])
    assert torch.equal(mixup(x, torch.ones(3), index), x)
    mixed, share = cutmix(x, torch.ones(3), index)
    assert torch.equal(mixed.view(torch.int32), x.view(torch.int32))
    assert share.tolist() == [1, 1, 1]
    assert torch.equal(mixup(x, torch.zeros(3), index), x[index])


def test_cutmix_copies_inf_and_nan_only_inside_the_box():
    x = torch.zeros(2, 1, 4, 4)
    x[1] = torch.nan
    x[1, 0, 0, 0] = torch.inf
    mixed, _ = cutmix(x, torch.tensor([0.75, 1.0]), torch.tensor([1, 1]), center=torch.full((2, 2), 0.5))
    assert mixed[0].isnan().sum() == 4
    assert mixed[0, 0, 0, 0] == 0


def test_cutmix_reports_the_share_of_pixels_that_were_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 13, 17).contiguous()
    lam = torch.rand(64, generator=generator)
    index = (torch.arange(64) + 1) % 64
    mixed, share = cutmix(x, lam, index, generator=generator)
    kept = (mixed == x).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(share, kept)
    assert (share >= lam - 1e-6).all()  # clipping and rounding down only ever keep more


def test_cutmix_draws_centers_from_the_given_generator():
    x, lam, index = torch.randn(8, 1, 9, 9), torch.full((8,), 0.5), torch.randperm(8)
    first, again, other = (
        cutmix(x, lam, index, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_flow_to_the_sample_and_to_its_partner(inplace):
    lam, index = torch.tensor([0.75, 1.0]), torch.tensor([1, 0])
    x = torch.ones(2, 1, 4, 4, requires_grad=True)
    mixup(x, lam, index, inplace=inplace).sum().backward()
    assert x.grad[:, 0, 0, 0].tolist() == [0.75, 1.25]
    x.grad = None
    mixed, _ = cutmix(x, lam, index, center=torch.full((2, 2), 0.5), inplace=inplace)
    mixed.sum().backward()
    assert x.grad.sum(dim=(1, 2, 3)).tolist() == [12, 20]


def test_mixup_takes_any_shape_and_an_empty_batch():
    x = torch.randn(3, 7)
    lam, index = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 2, 0])
    torch.testing.assert_close(mixup(x, lam, index), lam[:, None] * x + (1 - lam[:, None]) * x[index])
    none = torch.zeros(0, dtype=torch.int64)
    for inplace in (False, True):
        assert mixup(torch.zeros(0, 3, 4, 4), torch.zeros(0), none, inplace=inplace).shape == (0, 3, 4, 4)
        assert cutmix(torch.zeros(0, 3, 4, 4), torch.zeros(0), none, inplace=inplace)[1].shape == (0,)


X, LAM, INDEX = torch.zeros(2, 1, 4, 4), torch.ones(2), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lam": torch.ones(3)}, r"lam has shape \(3,\), torch.float32, on cpu; expected \(2,\), floating"),
        ({"lam": torch.ones(2, dtype=torch.int64)}, "lam has shape .* torch.int64"),
        ({"lam": torch.tensor([0.5, 1.5])}, r"lam is in \[0.5, 1.5\]; expected \[0, 1\]"),
        ({"lam": torch.tensor([0.5, torch.nan])}, "lam is in"),
        ({"index": torch.tensor([0, 2])}, r"index is in \[0, 2\]; expected \[0, 2\)"),
        ({"index": torch.tensor([0, -1])}, r"index is in \[-1, 0\]"),
        ({"index": torch.ones(2)}, "index has shape .* expected .*int64"),
        ({"lam": torch.ones(2, device="meta")}, "lam .* on meta; expected .* on cpu"),
        ({"x": torch.zeros(2, 1, 4, 4, dtype=torch.int64)}, "x .*torch.int64; expected"),
    ],
)
@pytest.mark.parametrize("function", [mixup, cutmix])
def test_wrong_input_is_named(function, changes, text):
    with pytest.raises(ValueError, match=text):
        function(**({"x": X, "lam": LAM, "index": INDEX} | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x": torch.zeros(2, 4, 4)}, r"x has shape \(2, 4, 4\).*expected \(B, C, H, W\)"),
        ({"center": torch.zeros(2)}, r"center has shape \(2,\).*expected \(2, 2\)"),
        ({"center": torch.ones(2, 2)}, r"center is in \[1, 1\]; expected \[0, 1\)"),
    ],
)
def test_wrong_input_of_cutmix_is_named(changes, text):
    with pytest.raises(ValueError, match=text):
        cutmix(**({"x": X, "lam": LAM, "index": INDEX} | changes))


def test_mixup_refuses_integers():
    with pytest.raises(ValueError, match=r"x is torch.uint8; expected a floating dtype"):
        mixup(X.to(torch.uint8), LAM, INDEX)


def test_paste_boxes_refuses_other_boxes():
    with pytest.raises(ValueError, match=r"boxes has shape \(2, 2\); expected \(2, 4\)"):
        paste_boxes(X, INDEX, torch.zeros(2, 2, dtype=torch.int64))
