"""CIFAR-10 from one file of JPEGs, for benchmarks/continual.py."""

import functools
import io

import numpy as np
import torch

from ds_lightning.datamodules import InMemoryImageData


class CIFARFile(InMemoryImageData):
    """CIFAR-10 from one file of JPEGs."""

    source = "cifar10_jpeg.npz"
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean = (0.491, 0.482, 0.447)
    std = (0.247, 0.243, 0.262)
    path = ""
    test_size: int | None = None

    def load(self):
        images, labels, is_test = read_jpegs(self.path)
        test = is_test.nonzero()[:, 0]
        if self.test_size is not None:
            # The file is sorted by class.
            test = test[torch.linspace(0, len(test) - 1, self.test_size).round().long()]
        return (images[~is_test], labels[~is_test]), (images[test], labels[test])


@functools.lru_cache(maxsize=1)
def read_jpegs(path: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from PIL import Image

    with np.load(path, allow_pickle=False) as table:
        content, offset = table["jpeg"].tobytes(), table["offset"].tolist()
        labels, is_test = table["y"], table["is_test"]
    pictures = [
        np.asarray(Image.open(io.BytesIO(content[start:end])).convert("RGB"))
        for start, end in zip(offset, [*offset[1:], len(content)], strict=True)
        if end > start
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(is_test.astype(bool))
