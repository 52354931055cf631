"""What does not go together in contrastive pre-training."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import MODALITIES


def check_method(
    encoder: str | nn.Module | Mapping[str, str | nn.Module],
    loss: str | None,
    projector: Sequence[int],
    momentum_encoder: float | None,
    queue_size: int,
    hardness: float,
    micro_batch: int | None,
    encoder_options: Mapping[str, Any] | None,
) -> None:
    """Refuse arguments of `ContrastivePretraining` that are outside their range, or of two methods.

    Raises:
        ConfigError: names the argument.
    """
    pairs = isinstance(encoder, Mapping)
    if isinstance(encoder, Mapping):
        if len(encoder) != 2 or not set(encoder) <= set(MODALITIES):
            raise ConfigError(
                f"encoder has the keys {sorted(encoder)}; expected two of {', '.join(MODALITIES)}, or one encoder"
            )
        wrong = [key for key, value in (encoder_options or {}).items() if key not in encoder or not _is_dict(value)]
        if wrong:
            raise ConfigError(
                f"encoder_options has {wrong[0]!r}; expected options by modality, {{{min(encoder)}: {{}}}}"
            )
    if loss not in (None, "nt_xent", "info_nce"):
        raise ConfigError(f"loss is {loss!r}; expected nt_xent, info_nce or nothing")
    if loss == "nt_xent" and (pairs or momentum_encoder is not None):
        raise ConfigError("loss is 'nt_xent'; expected info_nce for pairs and with momentum_encoder")
    if any(width < 1 for width in projector):
        raise ConfigError(f"projector is {list(projector)}; expected widths of at least 1")
    if pairs and not projector:
        raise ConfigError("projector is empty; two encoders need one, to give embeddings of one size")
    if momentum_encoder is not None and not 0.0 <= momentum_encoder < 1.0:
        raise ConfigError(f"momentum_encoder is {momentum_encoder}; expected a share in [0, 1), such as 0.99")
    if pairs and momentum_encoder is not None:
        raise ConfigError("momentum_encoder is for views; expected nothing with two encoders")
    if queue_size < 0:
        raise ConfigError(f"queue_size is {queue_size}; expected at least 0")
    if queue_size and momentum_encoder is None:
        raise ConfigError(f"queue_size is {queue_size}; it needs momentum_encoder, whose keys stay comparable")
    if not hardness >= 0.0:
        raise ConfigError(f"hardness is {hardness}; expected at least 0")
    if micro_batch is not None and micro_batch < 1:
        raise ConfigError(f"micro_batch is {micro_batch}; expected at least 1, or nothing")


def refuse_sharded(strategy: Strategy) -> None:
    """Refuse a strategy that gives each rank parts of a parameter.

    Raises:
        ConfigError: names it.
    """
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"ContrastivePretraining is not made for {type(strategy).__name__}: slow encoder and micro-batches need "
            "whole parameters on each rank; expected strategy='ddp', with micro_batch where memory is short"
        )


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)
