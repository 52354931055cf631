import pytest
import torch

from ds_lightning.functional.seeds import derived_seed


def test_seeds_depend_on_every_part_and_are_the_same_everywhere():
    # The SHA-256 of the text "0/mixing/0/1" starts with these bytes (checked with sha256sum).
    assert derived_seed(0, "mixing", 0, 1) == 0x3510C8BB >> 1
    keys = [(seed, name, rank, step) for seed in range(3) for name in "ab" for rank in range(3) for step in range(9)]
    assert len({derived_seed(seed, *rest) for seed, *rest in keys}) == len(keys)
    assert derived_seed(1, "a", 12) != derived_seed(1, "a", 1, 2)


@pytest.mark.parametrize("seed", [0, 2**40, -1])
def test_any_seed_is_fine_for_a_generator(seed):
    torch.Generator().manual_seed(derived_seed(seed, "x"))
    assert 0 <= derived_seed(seed, "x") < 2**31
