"""A made-up image set of many small classes, and what these tests ask of its episodes."""

import torch

from ds_lightning.datamodules import Episodes, InMemoryImageData

CLASSES, EACH, SIDE = 20, 12, 4


class Marks(InMemoryImageData):
    """Image i of class c has the pixels (c, i, 0, 0, ...): it says what it is, and can't be turned unseen."""

    class_names = tuple(f"{'abcde'[number // 4]}{number % 4}" for number in range(CLASSES))
    source = "made up"
    mean, std = (0.25,), (0.5,)

    def load(self):
        labels = torch.arange(CLASSES).repeat_interleave(EACH)
        images = torch.zeros(CLASSES * EACH, 1, SIDE, SIDE, dtype=torch.uint8)
        images[:, 0, 0, 0] = labels + 100
        images[:, 0, 0, 1] = torch.arange(CLASSES * EACH) % EACH + 1
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
        images, labels = images[order], labels[order]
        held = labels.argsort(stable=True)[::EACH]
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held] = False
        return (images[rest], labels[rest]), (images[held], labels[held])


def episodes(data=None, **options):
    given = {"ways": 3, "shots": 2, "queries": 4, "splits": (0.6, 0.2, 0.2), "tasks_per_batch": 4}
    given |= {"episodes_per_epoch": 24, "val_episodes": 10, "test_episodes": 10, **options}
    made = Episodes(data or Marks(), **given)
    made.prepare_data()
    made.setup()
    return made


def as_bytes(image):
    return ((image.double() * 0.5 + 0.25) * 255).round().to(torch.uint8)


def marks(image):
    """Read (class, image) of upright images (..., 1, SIDE, SIDE) uint8."""
    return image[..., 0, 0, 0].long() - 100, image[..., 0, 0, 1].long() - 1


def same(first, second):
    """Say whether two lists of batches are equal, bit for bit."""
    return len(first) == len(second) and all(
        torch.equal(a["classes"], b["classes"])
        and all(torch.equal(a[part][key], b[part][key]) for part in ("support", "query") for key in a[part])
        for a, b in zip(first, second, strict=True)
    )
