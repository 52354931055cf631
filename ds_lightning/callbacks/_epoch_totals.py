"""What adds up inside an epoch and is in no checkpoint of Lightning's: metrics, logged means, gradients."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import Tensor
from torchmetrics import Metric


def update_counts(module: pl.LightningModule) -> dict[str, int]:
    """Return how often each metric of the module was updated, by its name."""
    return {name: metric._update_count for name, metric in module.named_modules() if isinstance(metric, Metric)}


def read_metrics(module: pl.LightningModule, counts: dict[str, int] | None) -> dict[str, dict[str, Any]]:
    """Return the states of the metrics that were updated.

    Args:
        module: whose `modules()` are searched.
        counts: `update_counts` at the start of the running validation, whose metrics are left out: Lightning resets
            them at its end. None outside of validation.
    """
    states = {}
    for name, metric in module.named_modules():
        if not isinstance(metric, Metric) or not metric._update_count:
            continue
        if counts is not None and counts.get(name) != metric._update_count:
            continue
        values = {key: _detached(getattr(metric, key)) for key in metric._defaults}
        states[name] = {"updates": metric._update_count, "values": values}
    return states


def write_metrics(module: pl.LightningModule, states: dict[str, dict[str, Any]]) -> None:
    """Give the metrics their states back; those that the module has no more are left out."""
    for name, metric in module.named_modules():
        if not isinstance(metric, Metric) or name not in states:
            continue
        for key, value in states[name]["values"].items():
            setattr(metric, key, _moved(value, metric.device))
        metric._update_count = states[name]["updates"]
        metric._computed = None


def read_logged(results: _ResultCollection) -> dict[str, dict[str, Tensor]]:
    """Return the running sums of `self.log(..., on_epoch=True)`."""
    return {
        key: {name: getattr(entry, name).detach().clone() for name in _parts(entry)}
        for key, entry in results.items()
        if _parts(entry)
    }


def add_logged(results: _ResultCollection, states: dict[str, dict[str, Tensor]]) -> None:
    """Add saved sums to the entries that are there, which hold one batch, and take these out of `states`.

    An entry can't be made before the user logs it, because Lightning keeps the reduction with it.
    """
    for key in [key for key in states if key in results]:
        saved, entry = states.pop(key), results[key]
        for name in _parts(entry):
            now = getattr(entry, name)
            before = saved[name].to(now.device)
            extreme = entry.meta.is_max_reduction or entry.meta.is_min_reduction
            setattr(entry, name, entry.meta.reduce_fx(before, now) if extreme else before + now)


def read_gradients(module: pl.LightningModule) -> dict[str, Tensor]:
    """Return the gradients that are accumulated so far."""
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def write_gradients(module: pl.LightningModule, gradients: dict[str, Tensor]) -> None:
    """Give the parameters their accumulated gradients back."""
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device)


def _parts(entry: _ResultMetric) -> tuple[str, ...]:
    meta = entry.meta
    if not entry.is_tensor or not meta.on_epoch or meta.is_custom_reduction or not entry._update_count:
        return ()
    return ("value", "cumulated_batch_size") if meta.is_mean_reduction else ("value",)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [part.detach().clone() for part in value] if isinstance(value, list) else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [part.to(device) for part in value] if isinstance(value, list) else value
