"""What the tests of two views share."""

import torch


def same(one, other):
    """Whether two batches are equal to the bit."""
    assert one.keys() == other.keys()
    return all(
        same(value, other[key]) if isinstance(value, dict) else torch.equal(value, other[key])
        for key, value in one.items()
    )
