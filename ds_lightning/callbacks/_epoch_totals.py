"""What adds up inside an epoch and is in no checkpoint of Lightning's: metrics, logged values, gradients."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

_PLAIN_ARGUMENTS = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


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


def read_logged(results: _ResultCollection) -> dict[str, dict[str, Any]]:
    """Return what `self.log` has gathered in this epoch: sums, the last step's values, and its arguments."""
    states = {}
    for key, entry in results.items():
        if entry.has_reset or not entry._update_count:
            continue
        meta, step = entry.meta, entry._forward_cache
        states[key] = {
            "sums": {name: getattr(entry, name).detach().clone() for name in _parts(entry)},
            "step": step.detach().clone() if isinstance(step, Tensor) else None,
            "is_tensor": entry.is_tensor,
            "reduction": meta.reduce_fx.__name__,
            "sync": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
            "group": meta.sync.group is not None,
            "arguments": {name: getattr(meta, name) for name in _PLAIN_ARGUMENTS},
        }
    return states


def write_logged(
    results: _ResultCollection, states: dict[str, dict[str, Any]], module: pl.LightningModule, reduce: Any
) -> None:
    """Put back what `self.log` had gathered.

    What is logged again takes the arguments of that call, which may hold what no checkpoint can (a process group), and
    adds up with what was there.

    Args:
        results: of the training epoch.
        states: what `read_logged` gave.
        module: whose metrics the values may be.
        reduce: the strategy's reduction over processes.
    """
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    for key, state in states.items():
        if state["is_tensor"] or state["arguments"]["metric_attribute"] in metrics:
            results[key] = _entry(state, metrics, module.device, reduce)
    before = set(states) & set(results)
    log = results.log

    def log_again(fx: str, name: str, *values: Any, **arguments: Any) -> None:
        key = f"{fx}.{name}"
        if key not in before:
            log(fx, name, *values, **arguments)
            return
        before.remove(key)
        old = results.pop(key)
        log(fx, name, *values, **arguments)
        if not old.has_reset:
            _add(results[key], old)
        if not before:
            forget_logged(results)

    if before:
        vars(results)["log"] = log_again


def forget_logged(results: _ResultCollection) -> None:
    """Leave the collection as Lightning made it."""
    vars(results).pop("log", None)


def _entry(state: dict[str, Any], metrics: dict[str, Metric], device: torch.device, reduce: Any) -> _ResultMetric:
    meta = _Metadata(**state["arguments"], reduce_fx=getattr(torch, state["reduction"]))
    meta.sync = _Sync(fn=reduce, _should=state["sync"], rank_zero_only=state["rank_zero_only"])
    if state["group"]:
        rank_zero_warn(
            f"ExactResume: {meta.name!r} is logged with a sync_dist_group, which is in no checkpoint; where it is not "
            "logged again in this epoch, it is reduced over all processes"
        )
    entry = _ResultMetric(meta, state["is_tensor"]).to(device)
    for name, value in state["sums"].items():
        setattr(entry, name, value.to(device))
    if not entry.is_tensor:
        assert meta.metric_attribute is not None
        vars(entry)["value"] = metrics[meta.metric_attribute]
    entry._forward_cache = None if state["step"] is None else state["step"].to(device)
    entry._update_count = 1
    return entry


def _add(entry: _ResultMetric, old: _ResultMetric) -> None:
    if not (entry.is_tensor and old.is_tensor):
        return
    extreme = entry.meta.is_max_reduction or entry.meta.is_min_reduction
    for name in _parts(entry):
        now = getattr(entry, name)
        before = getattr(old, name).to(now.device)
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
    if not entry.is_tensor or not meta.on_epoch:
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
