import warnings

import pytest
import torch
from scipy import stats

from ds_lightning.datamodules.mixer import BatchMixer, sample_beta
from ds_lightning.errors import NoEffectWarning
from ds_lightning.functional.mixing import mixup


def a_batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, 12, 10, generator=generator)
    return {"image": image, "label": torch.arange(size), "table": torch.ones(size, 2)}


@pytest.mark.parametrize("alpha", [0.001, 0.2, 0.4, 1.0, 1.5, 8.0])
def test_weights_follow_the_beta_distribution(alpha):
    size = 20_000
    draws = sample_beta(alpha, size, torch.Generator().manual_seed(5)).numpy()
    assert draws.min() >= 0
    assert draws.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(draws.mean() - 0.5) < 5 * (variance / size) ** 0.5
    fourth = stats.beta(alpha, alpha).stats(moments="k") + 3
    assert abs(draws.var() - variance) < 5 * variance * ((fourth - 1) / size) ** 0.5
    # At 0.001 nearly all of the mass is nearer to 0 or 1 than float64 can say.
    if alpha > 0.01:
        assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_mixup_returns_what_it_says():
    batch = a_batch()
    before = batch["image"].clone()
    mixed = BatchMixer(mixup_alpha=0.4, seed=3)(batch)
    assert torch.equal(batch["image"], before)
    assert set(batch) == {"image", "label", "table"}
    assert torch.equal(mixed["label"], batch["label"])
    assert mixed["label_mixed"].sort().values.tolist() == list(range(8))
    # Labels are the row numbers, so label_mixed says who the partner was.
    assert torch.equal(mixed["image"], mixup(before, mixed["mix"], mixed["label_mixed"]))
    assert mixed["mix"].dtype == torch.float32
    assert torch.equal(mixed["table"], batch["table"])


def test_cutmix_reports_the_pixels_that_were_kept():
    batch = a_batch(32)
    mixed = BatchMixer(cutmix_alpha=1.0, seed=3)(batch)
    kept = (mixed["image"] == batch["image"]).all(dim=1)
    partner = (mixed["image"] == batch["image"][mixed["label_mixed"]]).all(dim=1)
    assert (kept | partner).all()
    own = mixed["label_mixed"] == batch["label"]  # a permutation may leave a sample alone
    share = kept.float().mean(dim=(1, 2))
    torch.testing.assert_close(mixed["mix"][~own], share[~own])
    assert (mixed["mix"] < 1).float().mean() > 0.5


def test_inplace_gives_the_same_numbers_in_the_same_memory():
    for arguments in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        apart, own = a_batch(), a_batch()
        expected = BatchMixer(**arguments)(apart)
        result = BatchMixer(**arguments)(own, inplace=True)
        assert result["image"] is own["image"]
        assert torch.equal(result["image"], expected["image"])


def test_cutmix_takes_uint8_and_pairs():
    image = torch.randint(256, (6, 1, 5, 5), dtype=torch.uint8)
    mixed = BatchMixer(cutmix_alpha=1.0)((image, torch.arange(6)))
    assert mixed["image"].dtype == torch.uint8
    assert set(mixed) == {"image", "label", "label_mixed", "mix"}


def test_a_fair_coin_chooses_between_the_two_for_each_batch():
    mixer = BatchMixer(mixup_alpha=1.0, cutmix_alpha=1.0, seed=0)
    batch = a_batch()
    boxes = 0
    for _ in range(400):
        mixed = mixer(batch)
        partner = batch["image"][mixed["label_mixed"]]
        boxes += bool(((mixed["image"] == batch["image"]) | (mixed["image"] == partner)).all())
    assert stats.binomtest(boxes, 400).pvalue > 0.001


def test_mix_probability_is_per_sample():
    mixer = BatchMixer(mixup_alpha=1.0, mix_probability=0.3)
    batch = a_batch(50)
    mixes = torch.cat([mixer(batch)["mix"] for _ in range(40)])
    assert stats.binomtest(int((mixes < 1).sum()), 2000, 0.3).pvalue > 0.001
    kept = BatchMixer(mixup_alpha=1.0, mix_probability=0.0)(batch)
    assert torch.equal(kept["image"], batch["image"])
    assert kept["mix"].tolist() == [1.0] * 50


@pytest.mark.parametrize("size", [2, 3, 7])
def test_odd_sizes(size):
    mixed = BatchMixer(mixup_alpha=1.0, cutmix_alpha=1.0)(a_batch(size))
    assert mixed["image"].shape[0] == mixed["mix"].shape[0] == size


def test_a_batch_of_one_warns_once_and_stays_as_it_is():
    mixer, batch = BatchMixer(cutmix_alpha=1.0), a_batch(1)
    with pytest.warns(NoEffectWarning, match="batch of one sample has no partner"):
        mixed = mixer(batch)
    assert torch.equal(mixed["image"], batch["image"])
    assert mixed["label_mixed"].tolist() == [0]
    assert mixed["mix"].tolist() == [1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer(batch)


def run(mixer, steps):
    return [mixer(a_batch(8, seed=step)) for step in steps]


def same(left, right):
    return all(torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)


def test_seed_and_rank_decide_and_the_global_generator_does_not():
    arguments = {"mixup_alpha": 0.5, "cutmix_alpha": 1.0}
    torch.manual_seed(1)
    first = run(BatchMixer(**arguments, seed=7), range(4))
    state = torch.manual_seed(2).get_state()
    assert same(first, run(BatchMixer(**arguments, seed=7), range(4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, run(BatchMixer(**arguments, seed=8), range(4)))
    assert not same(first, run(BatchMixer(**arguments, seed=7, rank=1), range(4)))
    assert not torch.equal(first[0]["mix"], first[1]["mix"])


def test_the_state_goes_on_with_the_stream():
    whole = run(BatchMixer(mixup_alpha=0.5, cutmix_alpha=1.0), range(6))
    half = BatchMixer(mixup_alpha=0.5, cutmix_alpha=1.0)
    run(half, range(3))
    resumed = BatchMixer(mixup_alpha=0.5, cutmix_alpha=1.0)
    resumed.load_state_dict(half.state_dict())
    assert same(whole[3:], run(resumed, range(3, 6)))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "mixup_alpha and cutmix_alpha are both 0"),
        ({"mixup_alpha": -0.1}, r"mixup_alpha is -0.1; expected a finite number >= 0"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha is nan"),
        ({"mixup_alpha": 1.0, "mix_probability": 1.1}, r"mix_probability is 1.1; expected a number in \[0, 1\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        BatchMixer(**arguments)
