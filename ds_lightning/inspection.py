"""`ds-lightning inspect`: what a checkpoint holds, without importing or running anything that it names."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_lightning.checkpoint_reader import Outline, TensorOutline, check_complete, read_outline
from ds_lightning.errors import ConfigError, DataError

FIRST = 20
_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


def run_inspect_command(argv: list[str]) -> int:
    """Print what is in a checkpoint; returns 0.

    Raises:
        ConfigError: when the file is missing, torn, or no checkpoint; one line.
    """
    parser = argparse.ArgumentParser(
        prog="ds-lightning inspect",
        description="Print what a checkpoint holds, without importing or running anything that it names.",
        epilog="Example:\n  ds-lightning inspect checkpoints/last.ckpt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file as torch.save and Lightning write it")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--all", action="store_true", help=f"list every tensor, not the first {FIRST}")
    args = parser.parse_args(argv)
    try:
        report = inspect_checkpoint(args.checkpoint)
    except (DataError, OSError) as error:
        raise ConfigError(str(error)) from error
    except (RecursionError, OverflowError) as error:
        raise ConfigError(f"{args.checkpoint} nests too deeply or holds absurd numbers; do not load it") from error
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for line in _lines(report, None if args.all else FIRST):
            # Names come from the file: none of them may steer the terminal.
            print("".join(letter if letter.isprintable() else "?" for letter in line))
    return 0


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint in plain Python, without importing or running anything that it names.

    Args:
        path: a file as `torch.save` and Lightning write it.

    Returns:
        The keys are kind, path, bytes, complete, format_version, lightning_version, epoch, global_step, values
        (elements of the module's tensors, a tied one once), tensor_bytes, tensors, optimizers, lr_schedulers,
        callbacks, hyperparameters, loops, other, globals, refused. A checkpoint does not say which torch wrote it.

    Raises:
        FileNotFoundError: when there is no such file.
        DataError: when it is torn, damaged or no checkpoint; one line.

    Example:
        >>> inspect_checkpoint("last.ckpt")["global_step"]  # doctest: +SKIP
        1200
    """
    check_complete(path)
    outline = read_outline(path)
    content = outline.content if isinstance(outline.content, Mapping) else {}
    is_lightning = "pytorch-lightning_version" in content
    state = content.get("state_dict") if is_lightning else content
    tensors = dict(_tensors(state))
    once = {(tensor.place, tensor.shape): tensor for tensor in tensors.values()}.values()
    return {
        "kind": _kind(outline, is_lightning, bool(tensors)),
        "path": str(path),
        "bytes": Path(path).stat().st_size,
        "complete": True,
        "format_version": outline.format_version,
        "lightning_version": _plain(content.get("pytorch-lightning_version")),
        "epoch": _plain(content.get("epoch")),
        "global_step": _plain(content.get("global_step")),
        "values": sum(tensor.values for tensor in once),
        "tensor_bytes": sum(tensor.size for tensor in once),
        "tensors": [{"name": name, "shape": list(t.shape), "dtype": t.dtype} for name, t in tensors.items()],
        "optimizers": [_optimizer(state) for state in _list(content.get("optimizer_states"))],
        "lr_schedulers": [_plain(state) for state in _list(content.get("lr_schedulers"))],
        "callbacks": {str(name): _outline(state) for name, state in _mapping(content.get("callbacks")).items()},
        "hyperparameters": {key: _plain(content[key]) for key in _HYPERPARAMETERS if is_lightning and key in content},
        "loops": _progress(content),
        "other": [str(key) for key in content if key not in _KNOWN] if is_lightning else [],
        "globals": list(outline.globals),
        "refused": list(outline.refused),
    }


_KNOWN = {
    *("epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states"),
    *("lr_schedulers", "hparams_name", "datamodule_hparams_name", *_HYPERPARAMETERS),
}


def _kind(outline: Outline, is_lightning: bool, has_tensors: bool) -> str:
    if outline.content is None:
        return "pickle that can't be followed without running it"
    if is_lightning:
        has_state = isinstance(outline.content, Mapping) and "optimizer_states" in outline.content
        return "Lightning checkpoint" if has_state else "Lightning checkpoint, weights only"
    return "tensors without Lightning's bookkeeping" if has_tensors else "pickled object"


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, TensorOutline]]:
    if isinstance(value, TensorOutline):
        yield prefix or "tensor", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _tensors(inner, f"{prefix}.{index}" if prefix else str(index))


def _plain(value: Any) -> Any:
    """Turn a value into what JSON can hold; tensors become their shape and dtype."""
    if isinstance(value, TensorOutline):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    # JSON has no infinity, which is what a best score starts from.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _outline(state: Any) -> dict[str, Any]:
    tensors = [tensor for _, tensor in _tensors(state)]
    keys = [str(key) for key in _mapping(state)]
    return {"keys": keys, "tensors": len(tensors), "tensor_bytes": sum(tensor.size for tensor in tensors)}


def _optimizer(state: Any) -> dict[str, Any]:
    """Describe an optimizer: a checkpoint does not name its class, but what it keeps tells the family."""
    entries = _mapping(_mapping(state).get("state"))
    names = {str(name): None for entry in entries.values() for name in _mapping(entry)}
    groups = [_mapping(group) for group in _list(_mapping(state).get("param_groups"))]
    return {
        "state": list(names),
        "parameters_with_state": len(entries),
        "tensor_bytes": sum(tensor.size for _, tensor in _tensors(entries)),
        "groups": [
            {
                "parameters": len(_list(group.get("params"))),
                **{str(key): _plain(value) for key, value in group.items() if key != "params"},
            }
            for group in groups
        ],
    }


def _progress(content: Mapping[Any, Any]) -> dict[str, Any]:
    fit = _mapping(_mapping(content.get("loops")).get("fit_loop"))
    progress = {}
    for name, key in (("epochs", "epoch_progress"), ("batches", "epoch_loop.batch_progress")):
        counts = _mapping(fit.get(key))
        if counts:
            progress[name] = {"total": _plain(counts.get("total")), "current": _plain(counts.get("current"))}
            if "is_last_batch" in counts:
                progress[name]["is_last_batch"] = _plain(counts["is_last_batch"])
    return progress


def _size(count: int) -> str:
    amount, units = float(count), ["KiB", "MiB", "GiB", "TiB"]
    if count < 1024:
        return f"{count} B"
    while amount >= 1024 and units:
        amount, unit = amount / 1024, units.pop(0)
    return f"{amount:.1f} {unit}"


def _short(value: Any, width: int = 200) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _lines(report: Mapping[str, Any], first: int | None) -> Iterator[str]:
    yield f"{report['path']}: {report['kind']}, {_size(report['bytes'])}, complete (every CRC-32 is right)"
    lightning = report["lightning_version"] or "not recorded"
    yield f"versions        lightning {lightning}; torch not recorded (file format {report['format_version']})"
    if report["global_step"] is not None:
        yield f"progress        epoch {report['epoch']}, global step {report['global_step']}"
    for name, counts in report["loops"].items():
        # Lightning saves before it counts the batch as completed, but after it counts it as processed.
        done, span = ("completed", "fit") if name == "epochs" else ("processed", "epoch")
        now, total = _mapping(counts["current"]), _mapping(counts["total"])
        yield f"  {name:14}{now.get(done)} {done} in this {span}, {total.get(done)} in all"
    yield f"values          {report['values']:,} in parameters and buffers, {_size(report['tensor_bytes'])}"
    tensors = report["tensors"]
    shown = tensors[:first]
    width = max((len(tensor["name"]) for tensor in shown), default=0)
    for tensor in shown:
        yield f"  {tensor['name']:{width}}  {tensor['shape']!s:20} {tensor['dtype']}"
    if len(shown) < len(tensors):
        yield f"  and {len(tensors) - len(shown)} more (--all lists them)"
    for index, optimizer in enumerate(report["optimizers"]):
        kept = ", ".join(optimizer["state"]) or "no state"
        yield f"optimizer {index}     {kept} of {optimizer['parameters_with_state']} parameters, " + _size(
            optimizer["tensor_bytes"]
        )
        for group in optimizer["groups"]:
            yield f"  group         {_short(group)}"
    for index, scheduler in enumerate(report["lr_schedulers"]):
        yield f"lr scheduler {index}  {_short(scheduler)}"
    for name, state in report["callbacks"].items():
        yield f"callback        {name}: {len(state['keys'])} keys, {state['tensors']} tensors"
    for name, values in report["hyperparameters"].items():
        yield f"{name}"
        for key, value in _mapping(values).items():
            yield f"  {key}: {_short(value)}"
    if report["other"]:
        yield f"also            {', '.join(report['other'])}"
    if report["refused"]:
        yield "would import    (names marked ! are not on the safe list: weights_only=True refuses this file)"
        for name in report["globals"]:
            yield f"  {'!' if name in report['refused'] else ' '} {name}"
    else:
        yield f"would import    {len(report['globals'])} names, all on the safe list: it loads with weights_only=True"
