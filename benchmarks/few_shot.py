"""How well each method of few-shot learning solves tasks of classes it has never seen, on the same episodes.

`sinusoid` is the protocol of the paper on MAML (arXiv 1703.03400, 5.1): 70,000 steps of 25 tasks, one inner step.
`omniglot` and `emoji` need `--data-dir` with omniglot_small28.npz or emoji64.npz; training and test classes are of
different alphabets or categories. Transfer learning is tuned for each seed on the validation episodes: what is
trained, rate, weight decay and steps.

Prints JSON: accuracy over 600 test episodes with its 95% interval for each seed, and the spread over the seeds.
Run: `OMP_NUM_THREADS=1 python benchmarks/few_shot.py sinusoid`, or
     `OMP_NUM_THREADS=1 python benchmarks/few_shot.py omniglot --data-dir DIR --seeds 0 1 2 3 4`.
"""

import argparse
import functools
import json
import logging
import math
import statistics
import sys
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import lightning.pytorch as pl
import torch
from few_shot_data import EmojiSet, OmniglotSmall
from gpu_processes import training_processes

from ds_lightning.datamodules import Episodes, Sinusoids
from ds_lightning.modules import MAML, FewShotModule, PrototypicalNetwork, TransferLearning
from ds_lightning.networks import mlp

SETS = {"omniglot": OmniglotSmall, "emoji": EmojiSet}
TRAIN_WAYS = 20
EVAL_TASKS = 20
METHODS = ("maml", "maml_first_order", "anil", "meta_sgd", "prototypes", "transfer")
# Of the new task, for transfer learning; steps are read from the accuracy after each of them.
TRANSFER: tuple[dict[str, Any], ...] = (
    *({"head": "logistic", "weight_decay": decay} for decay in (1e-3, 1e-2, 1e-1)),
    *({"head": "cosine", "lr": rate, "steps": 100} for rate in (0.01, 0.1)),
    *({"finetune": "all", "lr": rate, "steps": 20} for rate in (1e-3, 3e-3)),
)


@dataclass(frozen=True)
class Setting:
    """One training and test."""

    name: str
    method: str
    data_dir: str = ""
    seed: int = 0
    ways: int = 5
    shots: int = 1
    queries: int = 5
    tasks_per_batch: int = 16
    steps: int = 2000
    inner_lr: float = 0.4
    inner_steps: int = 1
    test_steps: int = 3
    width: int = 64
    stride: bool = False
    norm: str = "group"
    train_tasks: int | None = None
    test_episodes: int = 600
    device: str = "cpu"


def trainer(device: str, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator=device, devices=1, num_sanity_val_steps=0, **{**quiet, **options})


def module_of(setting: Setting) -> FewShotModule:
    maml = functools.partial(
        MAML, inner_lr=setting.inner_lr, inner_steps=setting.inner_steps, test_steps=setting.test_steps
    )
    made: dict[str, Any] = {
        "maml": maml,
        "maml_first_order": functools.partial(maml, order=1),
        "anil": functools.partial(maml, adapt="head"),
        "meta_sgd": functools.partial(maml, learn_inner_lr=True),
        "prototypes": PrototypicalNetwork,
        "transfer": TransferLearning,
    }
    options = {"width": setting.width, "stride": setting.stride, "norm": setting.norm}
    module: FewShotModule = made[setting.method](network="conv4", network_options=options, lr_scheduler="cosine")
    return module


def episodes(setting: Setting, **change: Any) -> Episodes:
    source = SETS[setting.name](setting.data_dir, seed=setting.seed)
    options: dict[str, Any] = {
        "ways": setting.ways,
        "shots": setting.shots,
        "queries": setting.queries,
        "tasks_per_batch": setting.tasks_per_batch,
        "episodes_per_epoch": setting.steps * setting.tasks_per_batch // 10,
        "val_episodes": 60,
        "test_episodes": setting.test_episodes,
        "groups": source.groups(),
        "rotations": setting.name == "omniglot",
        "augment": True,
        "train_tasks": setting.train_tasks,
        "seed": setting.seed,
    }
    return Episodes(source, **{**options, **change})


def run(setting: Setting, tests: list[tuple[int, int]]) -> dict[str, Any]:
    """Train, and return for each (ways, shots) the accuracy on the test episodes and its interval."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(setting.seed, verbose=False)
    module = module_of(setting)
    start = time.perf_counter()
    training = trainer(setting.device, max_epochs=10, limit_val_batches=0)
    training.fit(module, episodes(setting, val_episodes=0, eval_ways=tests[0][0]))
    result: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start),
        "training_accuracy": round(float(training.callback_metrics["train/accuracy"]), 4),
    }
    for ways, shots in tests:
        evaluated = {"eval_ways": ways, "eval_shots": shots, "eval_queries": setting.queries}
        data = episodes(setting, tasks_per_batch=EVAL_TASKS, **evaluated)
        tested, options = module, {}
        if isinstance(module, TransferLearning):
            tested, options = tuned(module, data, setting.device)
        validated = trainer(setting.device).validate(tested, data, verbose=False)[0]
        # After all steps; for transfer learning after the best ones of the validation.
        found = trainer(setting.device).test(tested, data, verbose=False)[0]
        result[f"{ways}-way {shots}-shot"] = {
            "validation": validated["val/accuracy"],
            "accuracy": found["test/accuracy"],
            "interval": found["test/accuracy_interval"],
            "episodes": int(found["test/episodes"]),
            "after": {key.rpartition("_")[2]: round(value, 4) for key, value in found.items() if "_after_" in key},
            **({"tuned": options} if options else {}),
        }
    print(f"{setting.method} seed {setting.seed}: {result}", file=sys.stderr, flush=True)
    return result


def tuned(module: TransferLearning, data: Episodes, device: str) -> tuple[FewShotModule, dict[str, Any]]:
    """Return the pre-trained network with the best setting for new tasks, by validation episodes."""
    best = -1.0
    chosen: dict[str, Any] = {}
    for options in TRANSFER:
        found = trainer(device).validate(TransferLearning(module.network, **options), data, verbose=False)[0]
        steps = {int(key.rpartition("_")[2]): value for key, value in found.items() if "_after_" in key}
        if not steps:
            steps = {0: found["val/accuracy"]}
        step = max(steps, key=lambda each: steps[each])
        if steps[step] > best:
            best, chosen = steps[step], {**options, **({"steps": step} if "steps" in options else {})}
    return TransferLearning(module.network, **chosen), chosen


def sinusoid(shots: int, epochs: int, seed: int, device: str) -> dict[str, Any]:
    """Return the mean squared error after 0 to 10 steps of a network trained for one."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    data = Sinusoids(shots=shots, queries=shots, val_episodes=0, seed=seed)
    module = MAML(mlp(1, 1), inner_lr=0.01, inner_steps=1, test_steps=10)
    start = time.perf_counter()
    trainer(device, max_epochs=epochs, limit_val_batches=0).fit(module, data)
    seconds = time.perf_counter() - start
    found = trainer(device).test(module, data, verbose=False)[0]
    after = {int(key.rpartition("_")[2]): round(value, 4) for key, value in found.items() if "_after_" in key}
    result = {"mse_after": after, "interval_after_10": round(found["test/mse_interval"], 4), "seconds": round(seconds)}
    print(f"sinusoid {shots} shots, seed {seed}: {result}", file=sys.stderr, flush=True)
    return result


def spread(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    found = {"mean": statistics.fmean(values), "standard_error": error, "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sinusoid", *SETS))
    parser.add_argument("--data-dir", default="", help="folder of the .npz files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the network, the episodes and the split")
    parser.add_argument("--tasks", nargs="+", default=["5x1", "5x5"], help="ways x shots of the test, of images")
    parser.add_argument("--shots", type=int, nargs="+", default=[10, 5], help="of sinusoids")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["maml", "prototypes", "transfer"])
    parser.add_argument("--steps", type=int, default=2000, help="of the training, of images")
    parser.add_argument("--epochs", type=int, default=70, help="of the training, of sinusoids: 1,000 steps each")
    parser.add_argument("--tasks-per-batch", type=int, default=16, help="of 5 ways; fewer where there are more")
    parser.add_argument("--inner-lr", type=float, default=0.4)
    parser.add_argument("--inner-steps", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--stride", action="store_true", help="strides instead of pooling: four times as fast")
    parser.add_argument("--norm", choices=("group", "batch"), default="group", help="the papers have batch")
    parser.add_argument("--train-tasks", type=int, help="a pool of so few training episodes; left out: new ones always")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, in turn on the GPUs that are there")
    options = parser.parse_args()
    with training_processes(options.jobs, options.device) as pool:
        result: dict[str, Any] = {"torch": torch.__version__, "device": options.device, "seeds": options.seeds}
        if options.what == "sinusoid":
            for shots in options.shots:
                fit = functools.partial(sinusoid, shots, options.epochs, device=options.device)
                result[f"{shots} shots"] = list(pool.map(fit, options.seeds))
        else:
            result |= images(options, pool)
    print(json.dumps(result, indent=2))


def images(options: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Run every method over the seeds; MAML is trained for each kind of task, the others once for all."""
    tests = [(int(ways), int(shots)) for ways, shots in (kind.split("x") for kind in options.tasks)]
    names = {field.name for field in fields(Setting)}
    base = Setting(options.what, "", **{key: value for key, value in vars(options).items() if key in names})
    running: dict[str, dict[tuple[tuple[int, int], ...], list[Future[dict[str, Any]]]]] = {}
    for method in options.methods:
        once = method in ("prototypes", "transfer")
        for kinds in [tuple(tests)] if once else [(test,) for test in tests]:
            # Prototypes learn better from more ways than they are tested with (arXiv 1703.05175, 3.1). A pool of
            # training tasks is the same for all methods.
            ways, shots = (TRAIN_WAYS if once and base.train_tasks is None else kinds[0][0]), kinds[0][1]
            tasks = max(1, base.tasks_per_batch * 5 // ways)
            setting = replace(base, method=method, ways=ways, shots=shots, tasks_per_batch=tasks)
            running.setdefault(method, {})[kinds] = [
                pool.submit(run, replace(setting, seed=seed), list(kinds)) for seed in options.seeds
            ]
    result: dict[str, Any] = {"setting": asdict(base)}
    for method, groups in running.items():
        found = result[method] = {}
        for kinds, futures in groups.items():
            runs = [future.result() for future in futures]
            for kind in (f"{ways}-way {shots}-shot" for ways, shots in kinds):
                found[kind] = {"accuracy": spread([each[kind]["accuracy"] for each in runs]), "runs": runs}
    return result


if __name__ == "__main__":
    main()
