import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.text_views import TokenViews
from ds_lightning.errors import ConfigError


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    deletion=st.sampled_from([0.0, 0.3, 0.95]),
    distance=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_a_view_has_the_words_in_nearly_their_order(lengths, deletion, distance, seed):
    rows = [list(range(1, length + 1)) for length in lengths]
    text = padded(rows)
    before = text.clone()
    got = TokenViews(deletion, distance)(text, seed)
    assert torch.equal(text, before)
    assert got.dtype == torch.int64
    kept = [[token for token in row if token] for row in got.tolist()]
    assert got.shape[1] == max(map(len, kept))
    for row, view, full in zip(rows, kept, got.tolist(), strict=True):
        assert full == view + [0] * (len(full) - len(view))
        assert len(view) >= 1
        assert set(view) <= set(row)
        assert len(set(view)) == len(view)
        if deletion == 0:
            assert len(view) == len(row)
        rank = {token: place for place, token in enumerate(sorted(view))}
        assert all(abs(rank[token] - place) <= distance for place, token in enumerate(view))


def test_deletion_leaves_the_expected_share():
    text = torch.arange(2, 102).repeat(200, 1)
    got = TokenViews(0.3, 0)(text, seed=0)
    assert abs(float((got > 0).float().mean(1).sum() * got.shape[1]) / (200 * 100) - 0.7) < 0.02
    assert (got[:, 1:] > got[:, :-1])[got[:, 1:] > 0].all()


def test_words_do_change_place_as_far_as_they_may():
    text = torch.arange(1, 51).repeat(100, 1)
    moved = (TokenViews(0.0, 3)(text, seed=0) - text).abs()
    assert moved.unique().tolist() == [0, 1, 2, 3]


def test_two_views_differ_and_follow_from_the_seed():
    text = torch.arange(2, 42).repeat(5, 1)
    state = torch.get_rng_state()
    first, second = TokenViews().pair(text, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.tolist() != second.tolist()
    assert torch.equal(first, TokenViews().pair(text, seed=1)[0])
    assert first.tolist() != TokenViews().pair(text, seed=2)[0].tolist()


def test_with_both_off_the_views_are_the_text():
    text = padded([[3, 4, 5], [6]])
    first, second = TokenViews(0.0, 0).pair(text, seed=1)
    assert torch.equal(first, text)
    assert torch.equal(second, text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"word_deletion": 1.0}, r"word_deletion is 1.0; expected a probability in \[0, 1\)"),
        ({"swap_distance": -1}, "swap_distance is -1; expected an integer >= 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        TokenViews(**arguments)
