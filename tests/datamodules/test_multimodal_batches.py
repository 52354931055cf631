import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.manifest_statistics import Statistics
from ds_lightning.datamodules.multimodal_batches import MultimodalSamples, collate
from ds_lightning.datamodules.spec_augment import SpecAugment

SHAPES = {"audio": (3, 9), "image": (1, 2, 2), "text": (8,), "series": (2, 5), "table": (2,)}


def sample(seed, names):
    g = torch.Generator().manual_seed(seed)
    length = 1 + seed % 6
    every = {
        "audio": torch.randn(3, length, generator=g),
        "image": torch.randint(1, 255, (1, 2, 2), generator=g, dtype=torch.uint8),
        "text": torch.randint(1, 9, (length,), generator=g),
        "series": torch.randn(2, 2 * length, generator=g),
        "table": torch.randn(2, generator=g),
    }
    return {name: every[name] for name in names}


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 99), st.sets(st.sampled_from(sorted(SHAPES)), min_size=0)), min_size=1, max_size=6
    )
)
def test_a_batch_gives_each_sample_back(rows):
    samples = [sample(seed, names) for seed, names in rows]
    batch = collate(samples, SHAPES)
    assert set(batch) == {*SHAPES, "audio_mask", "series_mask", "present"}
    assert batch["present"].tolist() == [[name in found for name in SHAPES] for found in samples]
    for name in SHAPES:
        longest = max([1, *(found[name].shape[-1] for found in samples if name in found)])
        assert batch[name].shape[-1] == (SHAPES[name][-1] if name in ("image", "table") else longest)
        for row, found in enumerate(samples):
            value = batch[name][row]
            if name not in found:
                assert not value.any()
                assert name not in ("audio", "series") or not batch[f"{name}_mask"][row].any()
                continue
            length = found[name].shape[-1]
            torch.testing.assert_close(value[..., :length], found[name])
            assert not value[..., length:].any()
            if name in ("audio", "series"):
                frames = torch.arange(value.shape[-1]) < length
                assert torch.equal(batch[f"{name}_mask"][row], frames)


def test_statistics_are_those_of_numpy_and_a_missing_number_is_the_mean():
    tables = torch.tensor([[1.0, 5.0, 2.0], [3.0, float("nan"), 2.0], [8.0, 7.0, 2.0]])
    audio = [torch.randn(4, n, generator=torch.Generator().manual_seed(n)) * 3 + 7 for n in (2, 5, 9)]
    series = [
        torch.randn(2, n, generator=torch.Generator().manual_seed(n)) + torch.tensor([[5.0], [-5]]) for n in (4, 6)
    ]
    samples = [{"table": row} for row in tables] + [{"audio": a} for a in audio] + [{"series": s} for s in series]
    found = Statistics.of(samples)
    frames = torch.cat(audio, dim=1)
    joined = torch.cat([found.apply("audio", a) for a in audio], dim=1)
    torch.testing.assert_close(joined, (frames - frames.mean()) / frames.std(correction=0))
    joined = torch.cat([found.apply("series", s) for s in series], dim=1)
    torch.testing.assert_close(joined.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(joined.std(1, correction=0), torch.ones(2))
    rows = torch.stack([found.apply("table", row) for row in tables])
    mean, std = 4.0, torch.tensor([1.0, 3.0, 8.0]).std(correction=0)
    torch.testing.assert_close(rows[:, 0], (torch.tensor([1.0, 3.0, 8.0]) - mean) / std)
    # The middle one is missing: 0 is the mean, and the indicator is the last column. The third is constant.
    assert rows[:, 1].tolist() == [-1.0, 0.0, 1.0]
    assert rows[:, 2].tolist() == [0.0, 0.0, 0.0]
    assert rows[:, 3:].tolist() == [[0.0], [1.0], [0.0]]
    again = Statistics.from_state(found.state_dict())
    torch.testing.assert_close(again.apply("table", tables[1]), rows[1])


def data(**options):
    samples = [sample(n, SHAPES) for n in range(12)]
    for found in samples:
        found["text"] = torch.tensor(list(f"word {len(found['text'])}".encode()), dtype=torch.uint8)
    every, none = torch.arange(12), Statistics({})
    return MultimodalSamples(
        samples.__getitem__, every, every, SHAPES, none, encode=lambda text: [len(text)], **options
    )


def test_texts_are_encoded_and_the_labels_are_there():
    batch = data().__getitems__([3, 1])
    assert batch["text"].tolist() == [[6], [6]]
    assert batch["label"].tolist() == [3, 1]


def test_training_augments_by_seed_and_epoch_and_leaves_the_global_generator_alone():
    plain = data()
    augmented = data(transform=lambda image: {"image": 255 - image}, spec_augment=SpecAugment(2, 3, 2), seed=4)
    before = torch.random.get_rng_state()
    first = augmented.__getitems__(list(range(12)))
    assert torch.equal(before, torch.random.get_rng_state())
    again = augmented.__getitems__(list(range(12)))
    assert torch.equal(first["audio"], again["audio"])
    augmented.epoch.fill_(1)
    later = augmented.__getitems__(list(range(12)))
    assert not torch.equal(first["audio"], later["audio"])
    original = plain.__getitems__(list(range(12)))
    assert torch.equal(first["image"], 255 - original["image"])
    masked = first["audio"] != original["audio"]
    assert masked.any()
    assert not first["audio"][masked].any(), "what is masked is the mean, 0"


@pytest.mark.parametrize(
    ("frequency", "time", "most"), [(3, 0, (3, 0)), (0, 4, (0, 4)), (20, 0, (8, 0)), (0, 99, (0, 10))]
)
def test_a_mask_has_each_size_that_is_asked_for_and_lies_anywhere(frequency, time, most):
    torch.manual_seed(0)
    mels = torch.stack([SpecAugment(frequency, time)(torch.ones(8, 20)) for _ in range(500)])
    for masked, largest, size in (((mels == 0).all(2), most[0], 8), ((mels == 0).all(1), most[1], 20)):
        if frequency == 20 and size == 20:
            continue  # a mask of all bands covers all frames
        widths = masked.sum(1)
        assert sorted(set(widths.tolist())) == list(range(largest + 1))
        # One stretch: it begins once.
        assert int((masked.int().diff(dim=1, prepend=torch.zeros(500, 1).int()) == 1).sum(1).max()) <= 1
        assert masked.any(0).all() == (largest > 0)


def test_a_mask_of_several_kinds_leaves_the_original_alone():
    mel = torch.ones(8, 20)
    torch.manual_seed(1)
    assert (SpecAugment(4, 6, masks=3)(mel) == 0).any()
    assert mel.all()
