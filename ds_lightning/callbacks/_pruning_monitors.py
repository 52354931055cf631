"""What other callbacks remember as the best value, when it is another network's."""

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


def count_afresh(trainer: pl.Trainer) -> None:
    """Let every EarlyStopping forget its best value: a smaller network may well stay below it for long."""
    for callback in trainer.early_stopping_callbacks:
        callback.wait_count = 0
        callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)


def forget_best(trainer: pl.Trainer) -> None:
    """Let every ModelCheckpoint with a monitor forget its best: it is of a network that is larger than the last one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_model_path:
            callback.best_k_models, callback.best_model_score = {}, None
            callback.best_model_path = callback.kth_best_model_path = ""
            rank_zero_info(
                f"ProgressivePruning: {type(callback).__name__} looks for its best {callback.monitor} afresh, now that "
                "all channels are gone that were to go; its files from before stay"
            )
