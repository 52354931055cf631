"""What channel pruning saves, and what it costs in accuracy.

`speed`: torchvision's ResNet-50, 224 x 224 pixels, new weights, pruned to half of its multiply-accumulates. On a CPU:
one image, one thread, CPU time of this process alone; beside ours, torch-pruning by itself at a channel ratio that
comes to half (as it is, and with its `round_to=8`), and the masks that Lightning's ModelPruning sets
(torch.nn.utils.prune, made permanent). On a GPU: training steps (bf16, channels_last),
with `--graph` without the host's share, with `--compile` all networks compiled after pruning; ours with either `scope`
and several `round_to`, and with `--early` in two calls: layers with large maps go first, until that share of all the
work is left. All take turns; medians, and the median over the turns of the ratio to the unpruned network.

`quality`: ResNet-18, SGD and cosine, always as many steps in all. `unpruned`; `progressive`: ProgressivePruning within
the one fit; `one_shot_finetune`: 60% of the steps, then pruned at once, the rest with a second cosine; `scratch`: what
`progressive` ends with, trained from new weights. The rate of `unpruned` is tuned by the validation accuracy of the
first seed, and taken by all; so are, for each target, the rate of the fine-tuning, as a share of it, and the `end` of
`progressive` (--ends). Test accuracies of all seeds and their differences to `unpruned`, paired by seed; seconds are
those of training alone, and depend on how many jobs share a GPU. `mnist5k` is always there; `cifar10` needs
`--data-dir` with cifar10_jpeg.npz, `fashion` the folder that torchvision reads.

Prints JSON.
Run: `python benchmarks/pruning.py speed`, or on a GPU
     `python benchmarks/pruning.py speed --device cuda --graph` and
     `python benchmarks/pruning.py quality cifar10 --data-dir DIR --device cuda --seeds 5 --jobs 8`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_processes import training_processes
from pruning_speed import speed
from seed_spread import spread
from torch import Tensor, nn

from ds_lightning.networks import PruningPlan, apply_plan, count_macs, prune_channels, resnet
from ds_lightning.networks.channel_importance import IMPORTANCES

METHODS = ("progressive", "one_shot_finetune", "scratch")
FINETUNE_SHARES = (0.1, 0.3, 1.0)
BEFORE_ONE_SHOT = 0.6
ONE_FOR_ALL = ("schedule", "importance", "sparsity", "round_to")
SHAPES = {"mnist5k": (1, 28, 28), "fashion": (1, 28, 28), "cifar10": (3, 32, 32)}


@dataclass(frozen=True)
class Run:
    """One training.

    `plan` (of `scratch`) is a PruningPlan's JSON, `weights` (of `one_shot_finetune`) a file; `keep` is where the
    trained weights go.
    """

    name: str
    cache: str
    method: str = "unpruned"
    target: float = 1.0
    seed: int = 0
    end: float = 0.6
    schedule: str = "cubic"
    importance: str = "magnitude"
    sparsity: float = 0.0
    round_to: int = 8
    lr: float = 0.1
    weight_decay: float = 5e-4
    steps: int = 2000
    batch_size: int = 256
    width: int = 64
    device: str = "cpu"
    plan: str = ""
    weights: str = ""
    keep: str = ""


def untrained(name: str, width: int) -> tuple[nn.Module, Tensor]:
    """Return the network, and an example of what it takes."""
    channels, height, size = SHAPES[name]
    return resnet(18, in_channels=channels, num_classes=10, width=width), torch.zeros(1, channels, height, size)


def draw_anew(network: nn.Module) -> None:
    """Give a pruned network the first weights of one that was built so small."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()


def train(run: Run) -> dict[str, Any]:
    """Train, and return the accuracies, what was kept, and the seconds."""
    from contrastive_data import labelled
    from contrastive_training import start, trainer

    from ds_lightning.callbacks import ProgressivePruning
    from ds_lightning.modules import Classifier
    from ds_lightning.networks.pruning_plan import plan_of

    start(run.seed)
    network, x = untrained(run.name, run.width)
    macs = count_macs(network, x)
    data = labelled(
        run.name,
        Path(run.cache),
        batch_size=run.batch_size,
        seed=run.seed,
        augment="crop_flip",
        pin_memory=run.device == "cuda",
    )
    torch.zeros(1, device=run.device)  # starting the device is nobody's time
    begin = time.perf_counter()
    if run.method == "one_shot_finetune":
        network.load_state_dict(torch.load(run.weights, map_location="cpu", weights_only=True))
    elif run.method == "scratch":
        apply_plan(network, PruningPlan.from_json(run.plan))
        draw_anew(network)
    settings: dict[str, Any] = {name: getattr(run, name) for name in ("end", *ONE_FOR_ALL)}
    if run.method == "one_shot_finetune":  # after the first step, whose gradients `taylor` needs
        settings |= {"schedule": "one-shot", "start": 1, "sparsity": 0.0}
    removes = run.method in ("progressive", "one_shot_finetune")
    callbacks = [ProgressivePruning(run.target, **settings)] if removes else []
    module = Classifier(
        network,
        num_classes=10,
        optimizer=lambda params: torch.optim.SGD(
            params, lr=run.lr, momentum=0.9, nesterov=True, weight_decay=run.weight_decay
        ),
        lr_scheduler="cosine",
    )
    trainer(run.device, *callbacks, max_steps=run.steps, max_epochs=-1, limit_val_batches=0).fit(module, data)
    seconds = time.perf_counter() - begin
    if run.keep:
        torch.save(network.state_dict(), run.keep)
    data.batch_size = 1000
    judge = trainer(run.device)
    found = judge.validate(module, data, verbose=False)[0] | judge.test(module, data, verbose=False)[0]
    plan = plan_of(network)
    result = {
        "val": found["val/accuracy"],
        "test": found["test/accuracy"],
        "macs_share": count_macs(network.cpu(), x) / macs,
        "seconds": seconds,
        "plan": plan.to_json() if plan is not None else "",
    }
    print(
        f"{run.name} {run.method} {run.target:g}, seed {run.seed}, rate {run.lr:g}, end {run.end:g}, "
        f"{run.steps} steps: val {result['val']:.4f}, test {result['test']:.4f}, "
        f"MACs {result['macs_share']:.3f} ({seconds:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return result


def best(tried: dict[float, Future[dict[str, Any]]]) -> tuple[float, dict[str, float]]:
    """Return the value with the best validation accuracy, and the accuracies of all."""
    found = {value: future.result()["val"] for value, future in tried.items()}
    return max(found, key=found.__getitem__), {f"{value:g}": round(score, 4) for value, score in found.items()}


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the methods; a seed's runs see the same data in the same order."""
    from contrastive_data import prepare

    for target in options.targets:  # one out of reach fails before any training
        prune_channels(*untrained(options.what, options.width), target, round_to=options.round_to)
    seeds = range(options.seeds)
    with (
        tempfile.TemporaryDirectory() as folder,
        training_processes(options.jobs, options.device) as pool,
    ):
        prepare(options.what, options.data_dir, Path(folder))
        given = ("steps", "batch_size", "width", "device", *ONE_FOR_ALL)
        base = Run(options.what, folder, **{name: getattr(options, name) for name in given})
        tried = {lr: pool.submit(train, replace(base, lr=lr)) for lr in options.rates}
        lr, tuning = best(tried)
        base = replace(base, lr=lr)
        early = round(BEFORE_ONE_SHOT * options.steps)
        paths = [f"{folder}/seed{seed}.pt" for seed in seeds]
        first = replace(base, steps=early)
        one_shot = options.targets if "one_shot_finetune" in options.methods else []
        before = [pool.submit(train, replace(first, seed=seed, keep=paths[seed])) for seed in seeds if one_shot]

        def progress(target: float, seed: int, end: float) -> Future[dict[str, Any]]:
            return pool.submit(train, replace(base, method="progressive", target=target, seed=seed, end=end))

        grown = options.targets if {"progressive", "scratch"} & set(options.methods) else []
        ends = {target: {end: progress(target, 0, end) for end in options.ends} for target in grown}
        # The tuned one is the first seed's.
        unpruned = [tried[lr], *(pool.submit(train, replace(base, seed=seed)) for seed in seeds[1:])]
        progressive, ending = {}, {}
        for target, by_end in ends.items():
            end, accuracies = best(by_end)
            progressive[target] = [by_end[end], *(progress(target, seed, end) for seed in seeds[1:])]
            ending[f"{target:g}"] = {"end": end, "validation": accuracies}

        def finetune(target: float, seed: int, rate: float) -> Future[dict[str, Any]]:
            before[seed].result()
            rest = replace(base, method="one_shot_finetune", steps=options.steps - early, weights=paths[seed])
            return pool.submit(train, replace(rest, target=target, seed=seed, lr=rate))

        def scratch(target: float, seed: int) -> Future[dict[str, Any]]:
            plan = progressive[target][seed].result()["plan"]
            return pool.submit(train, replace(base, method="scratch", target=target, seed=seed, plan=plan))

        second = {
            target: {lr * share: finetune(target, 0, lr * share) for share in FINETUNE_SHARES} for target in one_shot
        }
        again = options.targets if "scratch" in options.methods else []
        anew = {target: [scratch(target, seed) for seed in seeds] for target in again}
        finetuned, finetuning = {}, {}
        for target, by_rate in second.items():
            rate, accuracies = best(by_rate)
            finetuned[target] = [by_rate[rate], *(finetune(target, seed, rate) for seed in seeds[1:])]
            finetuning[f"{target:g}"] = {"lr": round(rate, 4), "validation": accuracies}

        plain = [future.result() for future in unpruned]
        early_seconds = [future.result()["seconds"] for future in before]

        def row(futures: list[Future[dict[str, Any]]], already: list[float] | None = None) -> dict[str, Any]:
            runs = [future.result() for future in futures]
            seconds = [run["seconds"] + more for run, more in zip(runs, already or [0.0] * len(runs), strict=True)]
            return {
                "accuracy": spread([run["test"] for run in runs]),
                "to_unpruned": spread([run["test"] - other["test"] for run, other in zip(runs, plain, strict=True)]),
                "macs_share": [round(run["macs_share"], 4) for run in runs],
                "seconds": round(statistics.median(seconds), 1),
            }

        result = {
            "setting": {**asdict(base), "cache": None, "one_shot_at": early},
            "tuned": {"lr": lr, "validation": tuning, "finetuning": finetuning, "progressive": ending},
            "unpruned": row(unpruned),
            "targets": {
                f"{target:g}": {
                    name: row(runs[target], early_seconds if name == "one_shot_finetune" else None)
                    for name, runs in (
                        ("progressive", progressive),
                        ("one_shot_finetune", finetuned),
                        ("scratch", anew),
                    )
                    if target in runs
                }
                for target in options.targets
            },
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("speed")
    timing.add_argument("--turns", type=int, default=20)
    timing.add_argument("--per-turn", type=int, default=5, help="passes or steps")
    timing.add_argument("--batch-size", type=int, default=128, help="of training steps")
    timing.add_argument("--image-size", type=int, default=224)
    timing.add_argument("--graph", action="store_true", help="each training step as one CUDA graph")
    timing.add_argument("--compile", action="store_true", help="training steps of networks that torch.compile took")
    timing.add_argument("--scopes", nargs="+", choices=("global", "layer"), default=["global", "layer"])
    timing.add_argument("--round-to", type=int, nargs="+", default=[8, 16, 32, 64], help="of training steps")
    timing.add_argument("--early", type=float, nargs="*", default=[], help="of training steps")
    judging = commands.add_parser("quality")
    judging.add_argument("what", choices=tuple(SHAPES))
    judging.add_argument("--data-dir", default="data", help="folder of the files")
    judging.add_argument("--seeds", type=int, default=1, help="how many; the first one tunes")
    judging.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25], help="shares of the MACs to keep")
    judging.add_argument(
        "--ends", type=float, nargs="+", default=[0.3, 0.45, 0.6], help="of progressive, to choose from"
    )
    judging.add_argument(
        "--rates", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2], help="of unpruned, to choose from"
    )
    judging.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="beside unpruned")
    judging.add_argument("--schedule", choices=("cubic", "linear", "one-shot"), default="cubic", help="of progressive")
    judging.add_argument("--importance", choices=IMPORTANCES, default="magnitude", help="of both that remove")
    judging.add_argument("--sparsity", type=float, default=0.0, help="of progressive")
    judging.add_argument("--round-to", type=int, default=8, help="channels are multiples of this")
    judging.add_argument("--steps", type=int, default=2000, help="of each method, in all")
    judging.add_argument("--batch-size", type=int, default=256)
    judging.add_argument("--width", type=int, default=64, help="channels of the first stage")
    judging.add_argument("--jobs", type=int, default=1, help="processes")
    for command in (timing, judging):
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    begin = time.perf_counter()
    result = (speed if options.command == "speed" else quality)(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    environment = {"torch": torch.__version__, "device": device, "jobs": getattr(options, "jobs", 1)}
    print(json.dumps({**environment, "seconds": round(time.perf_counter() - begin), **result}, indent=2))


if __name__ == "__main__":
    main()
