import subprocess
import sys

import numpy as np
import pytest
import torch

from ds_lightning.datamodules.transforms import (
    SeededTransform,
    apply_transform,
    evaluation_transform,
    training_transform,
)
from ds_lightning.errors import DataError

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_albumentations_is_imported_late_and_without_asking_the_network():
    code = (
        "import os, sys; os.environ.pop('NO_ALBUMENTATIONS_UPDATE', None)\n"
        "import ds_lightning.datamodules.transforms\n"
        "assert 'albumentations' not in sys.modules\n"
        "assert os.environ['NO_ALBUMENTATIONS_UPDATE'] == '1'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_evaluation_transform_is_the_centre():
    image = np.zeros((80, 160, 3), np.uint8)
    image[:, 60:100] = 200  # the middle quarter of the width
    result = apply_transform(evaluation_transform(35), image)  # shorter side 80 -> 40, so half the scale
    assert result.shape == (3, 35, 35)
    assert (result[:, :, 9:26] == 200).all()  # 20 columns around the centre, less the blurred borders
    assert (result[:, :, :6] == 0).all()
    assert (result[:, :, 29:] == 0).all()


def test_the_training_transform_depends_on_seed_epoch_and_batch():
    def once(seed, epoch, first):
        transform = SeededTransform(training_transform(16), seed)
        transform.epoch.fill_(epoch)
        transform.begin(first)
        return torch.stack([transform(IMAGE) for _ in range(4)])

    first = once(1, 0, 5)
    assert first.shape == (4, 3, 16, 16)
    assert torch.equal(first, once(1, 0, 5))
    assert not torch.equal(first[0], first[1])
    for other in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        assert not torch.equal(first, once(*other))


def test_results_of_other_forms():
    chw = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert apply_transform(lambda image: {"image": chw}, IMAGE) is chw
    assert apply_transform(lambda image: {"image": image[:, :, 0]}, IMAGE).shape == (1, 40, 60)
    with pytest.raises(DataError, match=r"transform returned float32; expected a uint8 image: leave out Norm"):
        apply_transform(lambda image: {"image": image.astype(np.float32)}, IMAGE)
