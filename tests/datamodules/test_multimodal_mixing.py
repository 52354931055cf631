import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.multimodal_mixing import MultimodalMixer
from ds_lightning.errors import ConfigError, NoEffectWarning


def batch(present, seed=0):
    g = torch.Generator().manual_seed(seed)
    size = len(present)
    lengths = torch.randint(1, 6, (size,), generator=g)
    mask = (torch.arange(5) < lengths[:, None]) & present[:, 2:3]
    return {
        "image": torch.randn(size, 1, 2, 2, generator=g) * present[:, 0, None, None, None],
        "text": torch.randint(1, 9, (size, 4), generator=g) * present[:, 1:2],
        "audio": torch.randn(size, 3, 5, generator=g) * mask[:, None],
        "audio_mask": mask,
        "present": present,
        "label": torch.arange(size),
    }


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.integers(1, 7), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_one_weight_and_one_partner_for_all_modalities(rows, seed):
    present = torch.tensor([[bool(row & 1), bool(row & 2), bool(row & 4)] for row in rows])
    one = batch(present, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        mixed = MultimodalMixer(1.0, seed).mix(MultimodalMixer(1.0, seed).draw(one))
    assert set(mixed) == {*one, "label_mixed", "mix"}
    assert torch.equal(mixed["present"], present)
    assert sorted(mixed["label_mixed"].tolist()) == list(range(len(rows)))
    for row, (partner, share) in enumerate(zip(mixed["label_mixed"].tolist(), mixed["mix"].tolist(), strict=True)):
        assert torch.equal(present[row], present[partner])
        if partner == row:
            assert share == 1
        larger = row if share >= 0.5 else partner
        torch.testing.assert_close(mixed["image"][row], share * one["image"][row] + (1 - share) * one["image"][partner])
        assert torch.equal(mixed["text"][row], one["text"][larger])
        real = one["audio_mask"][larger]
        assert torch.equal(mixed["audio_mask"][row], real)
        expected = share * one["audio"][row] + (1 - share) * one["audio"][partner]
        torch.testing.assert_close(mixed["audio"][row], torch.where(real, expected, 0))


def test_labels_of_several_classes_are_mixed_apart():
    one = {**batch(torch.ones(4, 3, dtype=torch.bool)), "label": torch.eye(4)}
    mixer = MultimodalMixer(1.0)
    mixed = mixer.mix(mixer.draw(one))
    assert torch.equal(mixed["label"], torch.eye(4))
    assert sorted(mixed["label_mixed"].argmax(1).tolist()) == [0, 1, 2, 3]


def test_the_counter_is_the_whole_state():
    one = batch(torch.ones(6, 3, dtype=torch.bool))
    mixer = MultimodalMixer(0.4, seed=2)
    drawn = [mixer.draw(one)["mix"] for _ in range(3)]
    other = MultimodalMixer(0.4, seed=2)
    other.load_state_dict({"batches": 2})
    assert torch.equal(other.draw(one)["mix"], drawn[2])
    assert not torch.equal(drawn[1], drawn[2])
    assert not torch.equal(MultimodalMixer(0.4, seed=2, rank=1).draw(one)["mix"], drawn[0])


def test_what_can_not_be_mixed_is_said_once():
    alone = batch(torch.tensor([[True, False, False], [True, True, False]]))
    mixer = MultimodalMixer()
    with pytest.warns(NoEffectWarning, match="no two have the same modalities"):
        mixed = mixer.mix(mixer.draw(alone))
    assert mixed["mix"].tolist() == [1, 1]
    torch.testing.assert_close(mixed["image"], alone["image"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer.draw(alone)
    with pytest.raises(ConfigError, match="mix_alpha is 0"):
        MultimodalMixer(0.0)
