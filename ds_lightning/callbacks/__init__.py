"""Callbacks for any LightningModule."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .attention_maps import AttentionMaps as AttentionMaps
    from .continual_metrics import ContinualMetrics as ContinualMetrics
    from .durable_checkpoint import DurableCheckpoint as DurableCheckpoint
    from .embedding_map import EmbeddingMap as EmbeddingMap
    from .episode_pictures import EpisodePictures as EpisodePictures
    from .ewc import ElasticWeightConsolidation as ElasticWeightConsolidation
    from .exact_resume import ExactResume as ExactResume
    from .finite import FiniteGuard as FiniteGuard
    from .layer_lr import DynamicLayerLR as DynamicLayerLR
    from .linear_probe import LinearProbe as LinearProbe
    from .preemption import Preemption as Preemption
    from .pruned_checkpoints import load_pruned as load_pruned
    from .pruning import ProgressivePruning as ProgressivePruning

__all__ = [
    "AttentionMaps",
    "ContinualMetrics",
    "DurableCheckpoint",
    "DynamicLayerLR",
    "ElasticWeightConsolidation",
    "EmbeddingMap",
    "EpisodePictures",
    "ExactResume",
    "FiniteGuard",
    "LinearProbe",
    "Preemption",
    "ProgressivePruning",
    "load_pruned",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AttentionMaps": ".attention_maps",
        "ContinualMetrics": ".continual_metrics",
        "ExactResume": ".exact_resume",
        "DurableCheckpoint": ".durable_checkpoint",
        "DynamicLayerLR": ".layer_lr",
        "ElasticWeightConsolidation": ".ewc",
        "EpisodePictures": ".episode_pictures",
        "EmbeddingMap": ".embedding_map",
        "FiniteGuard": ".finite",
        "LinearProbe": ".linear_probe",
        "Preemption": ".preemption",
        "ProgressivePruning": ".pruning",
        "load_pruned": ".pruned_checkpoints",
    },
)
