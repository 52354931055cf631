"""ds_lightning: training modes, callbacks, data and sweeps for PyTorch Lightning, tracked in MLflow."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from ds_lightning.callbacks import DynamicLayerLR as DynamicLayerLR
    from ds_lightning.datamodules import CIFAR10 as CIFAR10
    from ds_lightning.datamodules import FashionMNIST as FashionMNIST
    from ds_lightning.datamodules import ImageFolder as ImageFolder
    from ds_lightning.datamodules import MNIST5k as MNIST5k
    from ds_lightning.modules import Classifier as Classifier
    from ds_lightning.sweeps import SearchSpace as SearchSpace
    from ds_lightning.sweeps import Sweep as Sweep
    from ds_lightning.tracking import MLflowTracker as MLflowTracker

__version__ = "0.1.0"

__all__ = [
    "CIFAR10",
    "Classifier",
    "DynamicLayerLR",
    "FashionMNIST",
    "ImageFolder",
    "MLflowTracker",
    "MNIST5k",
    "SearchSpace",
    "Sweep",
    "__version__",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CIFAR10": ".datamodules",
        "Classifier": ".modules",
        "DynamicLayerLR": ".callbacks",
        "FashionMNIST": ".datamodules",
        "ImageFolder": ".datamodules",
        "MLflowTracker": ".tracking",
        "MNIST5k": ".datamodules",
        "SearchSpace": ".sweeps",
        "Sweep": ".sweeps",
    },
)
