"""A corpus of bad inputs, each made from a seed and given to the door that a user would use."""

import random

from .case import Case, Outcome, Place
from .checkpoints import checkpoint_cases
from .configs import config_cases
from .good_images import good_image_cases
from .images import image_cases
from .stores import store_cases
from .sweep_files import sweep_cases

__all__ = ["Case", "Outcome", "Place", "corpus"]


def corpus(seed: int = 0) -> list[Case]:
    """Return every case; the seed decides where files are cut and which bits are flipped."""
    chance = random.Random(seed)
    cases = [*config_cases(), *sweep_cases(), *checkpoint_cases(chance), *image_cases(chance)]
    cases += [*good_image_cases(), *store_cases(chance)]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in set(names) if names.count(name) > 1)
    return cases
