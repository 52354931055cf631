"""What learning rates layer by layer are worth: DynamicLayerLR beside a tuned baseline and what else there is.

Every method has its own rate: the best final validation accuracy, mean over the first two seeds (`--tuning-seeds`; one
alone may choose a rate that is wrong by a factor of two), on a grid of factor 2, which grows until the best has a worse
one on both sides (`bracketed`), at most `--extensions` times. With that rate every seed is trained: for a seed all
methods have the same first weights, batches and augmentation. Weight decay is the optimizer's (SGD 5e-4, AdamW 0.05),
that of a peer its usual one. On a GPU, networks of images run as CUDA graphs.

The accuracy on a fixed validation part is read at 20 evenly spaced steps. Targets are 60, 75, 90 and 97% of the way
from chance to the baseline's final accuracy, the mean over its seeds. Steps to a target are interpolated linearly on
the highest accuracy so far. `fewer_steps_percent` is against the baseline of the same seed; a target that was not
reached counts as reached with the last step, and `not_reached` says how often that was, for the method and for the
baseline: a figure with either above 0 is a bound. `of_mean_curve` is the same on the mean over the seeds.
`test_to_baseline` and `val_to_baseline` are differences of final accuracies, paired by seed. `multipliers` are those
of the layers at half-time and at the end, means over the seeds; `conv_to_head` is the convolutions' median over the
last layer's.

`slow_head` is the baseline with 1/25 of its rate for the last layer, `slow_head_default` DynamicLayerLR on the layers
before it as well. Peers are timm's: LARS, LAMB, NovoGrad, Muon (convolutions flattened, AdamW for the rest) and layer
decay of 0.75. A method `NAME={"rule": "variance", "alpha": 0.7}` is DynamicLayerLR with these arguments; with
`"optimizer": "muon"` on a peer, with `"slow_head": true` on the layers before a slow head.

`finetune`, `finetune_sgd`, `finetune_resnet50_sgd` and `small_finetune` start from a network that is trained here on
half of the classes, and train on the others. `small` needs no file; the others need `--data-dir` with cifar10_jpeg.npz
or sst2_{train,dev,test}.txt.

Prints JSON; each training says one line on stderr. With `--log FILE`, trainings are kept there and never run twice.
Run: `OMP_NUM_THREADS=1 python benchmarks/layer_lr.py small --jobs 2`, or on GPUs
     `python benchmarks/layer_lr.py resnet50_sgd vit_adamw --data-dir DIR --device cuda --jobs 32`.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gpu_processes import training_processes
from layer_lr_methods import METHODS, PEERS, Run, arguments_of, train
from layer_lr_networks import prepare
from layer_lr_report import report

ALL = METHODS
SHORT = ("baseline", "default", "variance", "variance_fade", "trust", "trust_fade")
RESNET50 = Run("", "resnet50", "cifar10", "sgd", steps=400, batch_size=128, size=64)
RESNET18 = Run("", "resnet18", "cifar10", "sgd", steps=600, batch_size=128, size=32)
SMALL = Run("", "resnet8", "mnist5k", "sgd", steps=150, batch_size=32, size=28)
SETTINGS: dict[str, tuple[Run, tuple[str, ...]]] = {
    "resnet50_sgd": (RESNET50, ALL),
    "resnet50_adamw": (replace(RESNET50, optimizer="adamw"), ALL),
    "resnet50_narrow_sgd": (Run("", "resnet50_narrow", "cifar10", "sgd", steps=200, batch_size=64, size=32), SHORT),
    "vit_adamw": (replace(RESNET18, network="vit", optimizer="adamw"), ALL),
    "resnet18_sgd": (RESNET18, SHORT),
    "resnet18_adamw": (replace(RESNET18, optimizer="adamw"), SHORT),
    "resnet18_nonorm_sgd": (replace(RESNET18, network="resnet18_nonorm"), SHORT),
    "finetune": (replace(RESNET18, optimizer="adamw", steps=400, part="second"), (*SHORT, "layer_decay")),
    "finetune_sgd": (replace(RESNET18, steps=400, part="second"), SHORT),
    "finetune_resnet50_sgd": (replace(RESNET50, part="second"), SHORT),
    "text_adamw": (Run("", "text", "sst2", "adamw", steps=600, batch_size=64), SHORT),
    "small": (SMALL, SHORT[:4]),
    "small_finetune": (replace(SMALL, part="second"), SHORT[:4]),
    "small_nonorm": (replace(SMALL, network="resnet8_nonorm"), SHORT[:4]),
}
# Where a method's search starts: by its own name, else by the setting's, else by the optimizer's.
GRIDS = {
    "sgd": (0.025, 0.05, 0.1, 0.2),
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3),
    "resnet50_sgd": (0.01, 0.02, 0.04, 0.08),
    "resnet50_narrow_sgd": (0.01, 0.02, 0.04),
    "vit_adamw": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "finetune": (1.25e-4, 2.5e-4, 5e-4, 1e-3),
    "finetune_sgd": (6.25e-3, 0.0125, 0.025, 0.05),
    "finetune_resnet50_sgd": (6.25e-3, 0.0125, 0.025, 0.05),
    "text_adamw": (1.25e-4, 2.5e-4, 5e-4, 1e-3),
    "lars": (0.5, 1.0, 2.0),
    "lamb": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "novograd": (5e-3, 1e-2, 2e-2, 4e-2),
    "muon": (1e-3, 2e-3, 4e-3, 8e-3),
}


PRETRAIN_RATE = {"sgd": 0.025, "adamw": 1e-3}  # of what is fine-tuned


class Trainings:
    """Hands trainings to the processes, keeps what comes back in a file, and takes from there what it has already."""

    def __init__(self, pool: Any, log: str) -> None:
        self.pool, self.log = pool, Path(log) if log else None
        self.known: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        if self.log is not None and self.log.exists():
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of one that was cut
                    row = json.loads(line)
                    self.known[row["run"]] = row["result"]

    def start(self, run: Run) -> Future[Any]:
        name = json.dumps({**asdict(run), "initial": bool(run.initial), "keep": "", "cache": "", "deadline": 0})
        future: Future[Any] = Future()
        if name in self.known and (not run.keep or Path(run.keep).exists()):
            future.set_result(self.known[name])
            return future
        future = self.pool.submit(train, run)
        future.add_done_callback(lambda done: self._write(name, done))
        return future

    def result(self, future: Future[Any]) -> dict[str, Any] | None:
        """Return what a training found; None when it failed, or did not start within the budget."""
        try:
            found: dict[str, Any] | None = future.result()
        except Exception as error:  # one that fails must not take the others' results along
            said = f"{type(error).__name__}: {error}"
            if said not in self.failed:
                self.failed.append(said)
                print(said, file=sys.stderr, flush=True)
            return None
        return found

    def _write(self, name: str, done: Future[Any]) -> None:
        if self.log is not None and done.exception() is None and done.result() is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"run": name, "result": done.result()}) + "\n")


def tuned(
    base: Run, grid: Sequence[float], options: argparse.Namespace, trainings: Trainings
) -> tuple[dict[float, dict[int, dict[str, Any]]], float | None, bool]:
    """Return the tuning seeds' results by rate and seed, the best rate, and whether both its neighbours are worse."""
    seeds, extensions = range(options.tuning_seeds), options.extensions

    def start(lr: float) -> dict[int, Future[Any]]:
        return {seed: trainings.start(replace(base, lr=lr, seed=seed)) for seed in seeds}

    started = {lr: start(lr) for lr in grid}
    while True:
        results = {}
        for lr, futures in started.items():
            found = {
                seed: result for seed, future in futures.items() if (result := trainings.result(future)) is not None
            }
            if len(found) == len(seeds):
                results[lr] = found
        if not results:
            return {}, None, False
        best = max(sorted(results), key=lambda lr: final(results[lr]))
        wanted = [lr for at_edge, lr in ((best == min(started), best / 2), (best == max(started), best * 2)) if at_edge]
        if not wanted or extensions < 1:
            return results, best, min(results) < best < max(results)
        extensions -= 1
        started |= {lr: start(lr) for lr in wanted}


def final(found: dict[int, dict[str, Any]]) -> float:
    """Return the final validation accuracy, mean over the seeds."""
    return statistics.fmean(result["curve"][-1] for result in found.values())


def follow(
    base: Run, grid: Sequence[float], options: argparse.Namespace, trainings: Trainings, before: Future[Any] | None
) -> dict[str, Any]:
    """Tune one method in one setting and train its seeds."""
    if before is not None and trainings.result(before) is None:
        return {"tuning": {}, "rate": None, "bracketed": False, "seeds": {}}
    results, best, bracketed = tuned(base, grid, options, trainings)
    seeds: dict[int, dict[str, Any]] = {}
    if best is not None:
        rest = range(options.tuning_seeds, options.seeds)
        others = {seed: trainings.start(replace(base, lr=best, seed=seed)) for seed in rest}
        found = results[best] | {seed: trainings.result(future) for seed, future in others.items()}
        seeds = {seed: result for seed, result in found.items() if result is not None}
    tuning = {f"{lr:g}": round(final(results[lr]), 4) for lr in sorted(results)}
    return {"tuning": tuning, "rate": best, "bracketed": bracketed, "seeds": seeds}


def grid_of(base: Run, method: str) -> Sequence[float]:
    peer = arguments_of(method).get("optimizer", method)
    return GRIDS.get(peer) or GRIDS.get(base.setting) or GRIDS[base.optimizer]


def bench(options: argparse.Namespace, pool: Any, cache: Path) -> dict[str, Any]:
    """Run all settings at once, so that no process is idle while one method is tuned."""
    trainings = Trainings(pool, options.log)
    deadline = time.time() + options.budget
    beside = Path(options.log) if options.log else cache / "pretrained"
    bases, followed = {}, {}
    with ThreadPoolExecutor(len(options.settings) * (1 + len(ALL) + len(options.methods or ()))) as threads:
        for setting in options.settings:
            base, methods = SETTINGS[setting]
            place = {"device": options.device, "cache": str(cache), "deadline": deadline}
            base = replace(base, setting=setting, warmup=options.warmup, points=options.points, **place)
            before = None
            if base.part:
                weights = str(beside.with_suffix(f".{setting}.pt").resolve())
                first = replace(base, setting=f"{setting}: before", part="first", keep=weights)
                first = replace(first, steps=options.pretrain_steps, lr=PRETRAIN_RATE[base.optimizer])
                before = trainings.start(first)
                base = replace(base, initial=weights)
            bases[setting] = base = replace(base, steps=options.steps or base.steps)
            for method in dict.fromkeys(("baseline", *(options.methods or methods))):
                run, grid = replace(base, method=method), options.rates or grid_of(base, method)
                followed[setting, method] = threads.submit(follow, run, grid, options, trainings, before)
        tables = {
            setting: report(base, {method: row.result() for (name, method), row in followed.items() if name == setting})
            for setting, base in bases.items()
        }
    return {"settings": tables, "failed": trainings.failed}


def method(name: str) -> str:
    """Check a method's name, or the arguments of one that is given as NAME={...}."""
    if "=" in name:
        given = arguments_of(name)
        if "optimizer" in given and (given["optimizer"] not in PEERS or given.get("slow_head")):
            raise argparse.ArgumentTypeError(f"{name}: optimizer is one of {', '.join(PEERS)}, and without slow_head")
    elif name not in METHODS:
        raise argparse.ArgumentTypeError(f'{name} is none of {", ".join(METHODS)}, and not NAME={{"argument": value}}')
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"{', '.join(SETTINGS)}; small when left out")
    parser.add_argument("--data-dir", default="data", help="folder of the files")
    parser.add_argument(
        "--methods", nargs="+", type=method, help="instead of the setting's own; the baseline always is"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="so many of them tune the rates")
    parser.add_argument("--steps", type=int, help="instead of the setting's own")
    parser.add_argument("--rates", type=float, nargs="+", help="the grid to start from, instead of each method's own")
    parser.add_argument("--extensions", type=int, default=4, help="how often a grid may grow")
    parser.add_argument("--warmup", type=int, default=0, help="steps of a linear warm-up of all methods")
    parser.add_argument("--points", type=int, default=20, help="readings of the validation accuracy")
    parser.add_argument("--pretrain-steps", type=int, default=2000, help="of what fine-tuning starts from")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no training starts")
    parser.add_argument("--log", default="", help="file that keeps every training, and gives it back next time")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, in turn on the GPUs that are there")
    options = parser.parse_args()
    options.settings = options.settings or ["small"]
    options.tuning_seeds = min(options.tuning_seeds, options.seeds)
    if unknown := set(options.settings) - SETTINGS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(SETTINGS)}")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in {SETTINGS[setting][0].data for setting in options.settings}:
            prepare(name, options.data_dir, Path(folder))
        with training_processes(options.jobs, options.device) as pool:
            tables = bench(options, pool, Path(folder))
    environment = {"torch": torch.__version__, "device": options.device, "jobs": options.jobs, "seeds": options.seeds}
    if options.device == "cuda":
        environment["device"] = torch.cuda.get_device_name()
    print(json.dumps({**environment, "seconds": round(time.perf_counter() - begin), **tables}, indent=2))


if __name__ == "__main__":
    main()
