"""A LightningModule for each training mode."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .classifier import Classifier as Classifier
    from .contrastive import ContrastivePretraining as ContrastivePretraining
    from .few_shot import FewShotModule as FewShotModule
    from .fusion import MultimodalFusion as MultimodalFusion
    from .meta_learning import MAML as MAML
    from .prototypical import PrototypicalNetwork as PrototypicalNetwork
    from .transfer import TransferLearning as TransferLearning

__all__ = [
    "MAML",
    "Classifier",
    "ContrastivePretraining",
    "FewShotModule",
    "MultimodalFusion",
    "PrototypicalNetwork",
    "TransferLearning",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Classifier": ".classifier",
        "ContrastivePretraining": ".contrastive",
        "FewShotModule": ".few_shot",
        "MAML": ".meta_learning",
        "MultimodalFusion": ".fusion",
        "PrototypicalNetwork": ".prototypical",
        "TransferLearning": ".transfer",
    },
)
