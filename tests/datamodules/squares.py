"""The small made-up image set that these tests share."""

import torch

from ds_lightning.datamodules import InMemoryImageData


class Squares(InMemoryImageData):
    """Grey squares; the class is the brightness, and each pixel says which image it is."""

    class_names = ("dark", "light", "bright")
    source = "made up"

    def load(self):
        images = torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1).repeat(1, 1, 6, 6)
        labels = torch.arange(90) % 3
        return (images[:60], labels[:60]), (images[60:], labels[60:])


def ready(data):
    data.setup()
    return data
