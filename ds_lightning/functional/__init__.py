"""Pure functions on tensors; they import torch alone."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .batch import as_batch as as_batch
    from .batch import input_of as input_of
    from .batch import restrict as restrict
    from .continual import average_accuracy as average_accuracy
    from .continual import backward_transfer as backward_transfer
    from .continual import forgetting as forgetting
    from .continual import forward_transfer as forward_transfer
    from .continual import largest_drop as largest_drop
    from .contrastive import info_nce as info_nce
    from .contrastive import nt_xent as nt_xent
    from .embedding_quality import alignment as alignment
    from .embedding_quality import effective_rank as effective_rank
    from .embedding_quality import recall_at as recall_at
    from .embedding_quality import uniformity as uniformity
    from .fisher import FisherSum as FisherSum
    from .fisher import fisher_diagonal as fisher_diagonal
    from .fisher import fisher_sums as fisher_sums
    from .fisher_labels import label_loss as label_loss
    from .fisher_labels import model_labels as model_labels
    from .gathering import gather_rows as gather_rows
    from .gradient_cache import cached_embeddings as cached_embeddings
    from .gradient_statistics import layer_gradient_moments as layer_gradient_moments
    from .maml import adapted_outputs as adapted_outputs
    from .maml import inner_adapt as inner_adapt
    from .maml import multi_step_weights as multi_step_weights
    from .maml import use_batch_statistics as use_batch_statistics
    from .mixing import cutmix as cutmix
    from .mixing import mixup as mixup

__all__ = [
    "FisherSum",
    "adapted_outputs",
    "alignment",
    "as_batch",
    "average_accuracy",
    "backward_transfer",
    "cached_embeddings",
    "cutmix",
    "effective_rank",
    "fisher_diagonal",
    "fisher_sums",
    "forgetting",
    "forward_transfer",
    "gather_rows",
    "info_nce",
    "inner_adapt",
    "input_of",
    "label_loss",
    "largest_drop",
    "layer_gradient_moments",
    "mixup",
    "model_labels",
    "multi_step_weights",
    "nt_xent",
    "recall_at",
    "restrict",
    "uniformity",
    "use_batch_statistics",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "average_accuracy": ".continual",
        "backward_transfer": ".continual",
        "forgetting": ".continual",
        "forward_transfer": ".continual",
        "largest_drop": ".continual",
        "FisherSum": ".fisher",
        "as_batch": ".batch",
        "cutmix": ".mixing",
        "input_of": ".batch",
        "fisher_diagonal": ".fisher",
        "fisher_sums": ".fisher",
        "adapted_outputs": ".maml",
        "inner_adapt": ".maml",
        "multi_step_weights": ".maml",
        "use_batch_statistics": ".maml",
        "label_loss": ".fisher_labels",
        "model_labels": ".fisher_labels",
        "layer_gradient_moments": ".gradient_statistics",
        "mixup": ".mixing",
        "restrict": ".batch",
        "nt_xent": ".contrastive",
        "info_nce": ".contrastive",
        "gather_rows": ".gathering",
        "cached_embeddings": ".gradient_cache",
        "alignment": ".embedding_quality",
        "uniformity": ".embedding_quality",
        "effective_rank": ".embedding_quality",
        "recall_at": ".embedding_quality",
    },
)
