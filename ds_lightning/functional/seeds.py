"""A seed for each random stream, from the user's seed and what the stream is for."""

import hashlib


def derived_seed(seed: int, *key: str | int) -> int:
    """Return a seed in [0, 2**31) that depends on all of its arguments.

    Args:
        seed: the user's seed.
        key: what the stream is for, such as `("mixing", rank, step)`.

    Example:
        >>> derived_seed(0, "mixing", 0, 1) == derived_seed(0, "mixing", 1, 0)
        False
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
