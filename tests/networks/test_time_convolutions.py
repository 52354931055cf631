from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_lightning.networks import AudioEncoder, SeriesEncoder

CHANNELS = 3
BUILDERS = {
    "audio": lambda **options: AudioEncoder(CHANNELS, **options),
    "series": lambda **o: SeriesEncoder(CHANNELS, **o),
}


def small(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[kind](**{"width": 8, **options}).eval()


def some_frames(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, CHANNELS, length, generator=torch.Generator().manual_seed(seed))


def windows(mask: Tensor, size: int) -> Tensor:
    """A token is real where one of its own frames is."""
    return torch.stack([part.any(dim=1) for part in mask.split(size, dim=1)], dim=1)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(list(BUILDERS)), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_padding_changes_nothing(kind: str, depth: int, length: int, padding: int, seed: int) -> None:
    network = small(kind, depth=depth)
    frames = some_frames(2, length, seed)
    alone, none = network(frames)
    assert none is None
    padded = torch.cat([frames, torch.full((2, CHANNELS, padding), torch.nan)], dim=2)
    mask = torch.arange(length + padding).expand(2, -1) < length
    tokens, real = network(padded, mask)
    assert torch.equal(real, windows(mask, 2**depth))
    for row in range(2):
        assert torch.allclose(tokens[row][real[row]], alone[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_gap_gives_the_masks_of_the_windows_and_the_fill_is_never_read(kind: str) -> None:
    network = small(kind, depth=2)
    mask = torch.rand(4, 23, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[3] = False
    found = []
    for fill in (torch.nan, 5.0):
        frames = some_frames(4, 23).masked_fill(~mask[:, None], fill)
        tokens, real = network(frames, mask)
        network.zero_grad()
        tokens[real].square().sum().backward()
        found.append((tokens[real], [parameter.grad.clone() for parameter in network.parameters()]))
    assert torch.equal(real, windows(mask, 4))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize(("depth", "length", "expected"), [(1, 50, 25), (2, 50, 13), (3, 50, 7), (3, 1, 1), (2, 5, 2)])
def test_each_stage_halves_the_time(depth: int, length: int, expected: int) -> None:
    for kind in BUILDERS:
        network = small(kind, depth=depth)
        tokens, _ = network(some_frames(2, length))
        assert tokens.shape == (2, expected, network.num_features)


def test_tokens_know_where_they_are() -> None:
    network = small("series")
    constant, _ = network(torch.ones(1, CHANNELS, 80))
    inner = constant[0, 5:-5]
    assert torch.cdist(inner, inner).fill_diagonal_(1.0).min() > 0.01


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_neighbour_in_the_batch_changes_nothing_in_training(kind: str) -> None:
    network = small(kind).train()
    frames = some_frames(3, 17)
    assert torch.allclose(network(frames)[0][:1], network(frames[:1])[0], atol=1e-6)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0}, "width is 0; expected at least 1"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; expected a probability"),
    ],
)
def test_wrong_arguments_are_named(kind: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        small(kind, **options)


@pytest.mark.parametrize(
    ("frames", "mask", "text"),
    [
        (torch.zeros(2, 4, 9), None, r"has the shape \(2, 4, 9\) .* expected float \(B, 3, T\)"),
        (torch.zeros(2, 3), None, r"has the shape \(2, 3\)"),
        (torch.zeros(2, 3, 0), None, "with T at least 1"),
        (torch.zeros(2, 3, 9, dtype=torch.int64), None, "type torch.int64"),
        (torch.zeros(2, 3, 9), torch.ones(2, 8, dtype=torch.bool), r"mask of .* shape \(2, 8\); .* shape \(2, 9\)"),
        (torch.zeros(2, 3, 9), torch.ones(2, 9), "mask of .* is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(frames: Tensor, mask: Tensor | None, text: str) -> None:
    for kind in BUILDERS:
        with pytest.raises(ValueError, match=text):
            small(kind)(frames, mask)
