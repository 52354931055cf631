"""LightningDataModules that yield dictionaries of tensors."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .contrastive_views import ContrastiveViews as ContrastiveViews
    from .episodes import Episodes as Episodes
    from .image_data import ImageData as ImageData
    from .image_folder import ImageFolder as ImageFolder
    from .in_memory import InMemoryImageData as InMemoryImageData
    from .mixer import BatchMixer as BatchMixer
    from .mnist5k import MNIST5k as MNIST5k
    from .multimodal import MultimodalManifest as MultimodalManifest
    from .pairs import Pairs as Pairs
    from .sinusoids import Sinusoids as Sinusoids
    from .tasks import TaskStream as TaskStream
    from .text_files import TextFiles as TextFiles
    from .torchvision_sets import CIFAR10 as CIFAR10
    from .torchvision_sets import FashionMNIST as FashionMNIST

__all__ = [
    "CIFAR10",
    "BatchMixer",
    "ContrastiveViews",
    "Episodes",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "InMemoryImageData",
    "MNIST5k",
    "MultimodalManifest",
    "Pairs",
    "Sinusoids",
    "TaskStream",
    "TextFiles",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BatchMixer": ".mixer",
        "CIFAR10": ".torchvision_sets",
        "ContrastiveViews": ".contrastive_views",
        "Episodes": ".episodes",
        "FashionMNIST": ".torchvision_sets",
        "ImageData": ".image_data",
        "ImageFolder": ".image_folder",
        "InMemoryImageData": ".in_memory",
        "MNIST5k": ".mnist5k",
        "MultimodalManifest": ".multimodal",
        "Pairs": ".pairs",
        "Sinusoids": ".sinusoids",
        "TaskStream": ".tasks",
        "TextFiles": ".text_files",
    },
)
