"""How well classes are told apart: the metrics of a validation or a test, and the confusion matrix."""

from collections.abc import Iterable, Sequence
from typing import Any

from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)


def class_metrics(num_classes: int) -> MetricCollection:
    """Return accuracy, macro F1 and expected calibration error (15 bins) of logits (B, num_classes) and labels (B,).

    Args:
        num_classes: at least 2.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        }
    )


def log_confusion(
    loggers: Iterable[Any], confusion: MulticlassConfusionMatrix, class_names: Sequence[str] | None, stage: str
) -> None:
    """Hand a confusion matrix to every logger that takes one (`log_confusion_matrix`); nothing when it is empty.

    Args:
        loggers: the Trainer's.
        confusion: the metric that was updated.
        class_names: None numbers the classes.
        stage: `val` or `test`.
    """
    if confusion.update_count == 0:
        return
    matrix = confusion.compute().cpu()
    names = class_names or [str(number) for number in range(len(matrix))]
    for logger in loggers:
        log_confusion_matrix = getattr(logger, "log_confusion_matrix", None)
        if log_confusion_matrix is not None:
            log_confusion_matrix(matrix, names, stage)
