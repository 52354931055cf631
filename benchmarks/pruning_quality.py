"""How accurate a pruned ResNet-18 is, for benchmarks/pruning.py."""

import argparse
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
from pruning_speed import early_layers_first
from seed_spread import spread
from torch import Tensor, nn

from ds_lightning.networks import PruningPlan, apply_plan, count_macs, prune_channels, resnet

METHODS = ("progressive", "one_shot_finetune", "scratch")
FINETUNE_SHARES = (0.1, 0.3, 1.0)
BEFORE_ONE_SHOT = 0.6
ONE_FOR_ALL = ("schedule", "importance", "scope", "sparsity", "round_to")
# Of the four sizes of maps, the two large ones and the two small ones.
FRONT = ("features.[0-6]",)
REST = ("features.[789]", "features.10")
SHAPES = {"mnist5k": (1, 28, 28), "fashion": (1, 28, 28), "cifar10": (3, 32, 32)}


@dataclass(frozen=True)
class Run:
    """One training.

    `plan` (of `scratch`) is a PruningPlan's JSON, `weights` (of `one_shot_finetune`) a file; `keep` is where the
    trained weights go. With `early` the one removal takes the layers with large maps first, until that share of all the
    work is left.
    """

    name: str
    cache: str
    method: str = "unpruned"
    target: float = 1.0
    seed: int = 0
    end: float = 0.6
    schedule: str = "cubic"
    importance: str = "magnitude"
    scope: str = "global"
    early: float = 0.0
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
        if run.early:
            early_layers_first(network, x, run.early, run.round_to, run.target, FRONT, REST)
    elif run.method == "scratch":
        apply_plan(network, PruningPlan.from_json(run.plan))
        draw_anew(network)
    settings: dict[str, Any] = {name: getattr(run, name) for name in ("end", *ONE_FOR_ALL)}
    if run.method == "one_shot_finetune":  # after the first step, whose gradients `taylor` needs
        settings |= {"schedule": "one-shot", "start": 1, "sparsity": 0.0}
    removes = run.method == "progressive" or (run.method == "one_shot_finetune" and not run.early)
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


def best(tried: dict[float, Future[dict[str, Any]]]) -> float:
    """Return the value with the best validation accuracy; one alone is not waited for."""
    return max(tried, key=lambda value: tried[value].result()["val"]) if len(tried) > 1 else next(iter(tried))


def scores(tried: dict[float, Future[dict[str, Any]]]) -> dict[str, float]:
    return {f"{value:g}": round(future.result()["val"], 4) for value, future in tried.items()}


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the methods; a seed's runs see the same data in the same order."""
    from contrastive_data import prepare

    for target in options.targets:  # one out of reach fails before any training
        network, x = untrained(options.what, options.width)
        if options.early:
            early_layers_first(network, x, options.early, options.round_to, target, FRONT, REST)
        else:
            prune_channels(network, x, target, round_to=options.round_to, scope=options.scope)
    seeds = range(options.seeds)
    with (
        tempfile.TemporaryDirectory() as folder,
        training_processes(options.jobs, options.device) as pool,
    ):
        prepare(options.what, options.data_dir, Path(folder))
        given = ("steps", "batch_size", "width", "device", "early", *ONE_FOR_ALL)
        base = Run(options.what, folder, **{name: getattr(options, name) for name in given})
        tried = {lr: pool.submit(train, replace(base, lr=lr)) for lr in options.rates}
        lr = best(tried)
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
        chosen_ends = {target: best(by_end) for target, by_end in ends.items()}
        progressive = {
            target: [ends[target][end], *(progress(target, seed, end) for seed in seeds[1:])]
            for target, end in chosen_ends.items()
        }

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
        chosen_rates = {target: best(by_rate) for target, by_rate in second.items()}
        finetuned = {
            target: [second[target][rate], *(finetune(target, seed, rate) for seed in seeds[1:])]
            for target, rate in chosen_rates.items()
        }

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
            "tuned": {
                "lr": lr,
                "validation": scores(tried),
                "finetuning": {
                    f"{target:g}": {"lr": round(rate, 4), "validation": scores(second[target])}
                    for target, rate in chosen_rates.items()
                },
                "progressive": {
                    f"{target:g}": {"end": end, "validation": scores(ends[target])}
                    for target, end in chosen_ends.items()
                },
            },
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
