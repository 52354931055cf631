"""How well each method of few-shot learning solves tasks of classes it has never seen, on the same episodes.

`sinusoid` is the protocol of the paper on MAML (arXiv 1703.03400, 5.1): 70,000 steps of 25 tasks, one inner step.
`omniglot` and `emoji` need `--data-dir` with omniglot_small28.npz or emoji64.npz; training and test classes are of
different alphabets or categories. Transfer learning is tuned for each seed on the validation episodes: what is
trained, rate, weight decay and steps.

Prints JSON: accuracy over 600 test episodes with its 95% interval for each seed, and the spread over the seeds.
Run: `OMP_NUM_THREADS=1 python benchmarks/few_shot.py sinusoid`, or
     `OMP_NUM_THREADS=1 python benchmarks/few_shot.py omniglot --data-dir DIR --ways 5 --shots 1 --seeds 5`.
"""

import argparse
import functools
import json
import logging
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from few_shot_data import EmojiSet, OmniglotSmall

from ds_lightning.datamodules import Episodes, Sinusoids
from ds_lightning.modules import MAML, FewShotModule, PrototypicalNetwork, TransferLearning
from ds_lightning.networks import mlp

SETS = {"omniglot": OmniglotSmall, "emoji": EmojiSet}
METHODS = ("maml", "maml_first_order", "anil", "meta_sgd", "prototypes", "transfer")
# Of the new task, for transfer learning; steps are read from the accuracy after each of them.
TRANSFER: tuple[dict[str, Any], ...] = (
    *({"head": "logistic", "weight_decay": decay} for decay in (1e-3, 1e-2, 1e-1)),
    *({"head": "cosine", "lr": rate, "steps": 100} for rate in (0.01, 0.1)),
    *({"finetune": "all", "lr": rate, "steps": 50} for rate in (3e-4, 3e-3)),
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
    queries: int = 10
    tasks_per_batch: int = 8
    steps: int = 2000
    inner_lr: float = 0.1
    inner_steps: int = 3
    width: int = 64
    train_tasks: int | None = None
    test_episodes: int = 600
    device: str = "cpu"


def trainer(device: str, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator=device, devices=1, num_sanity_val_steps=0, **{**quiet, **options})


def module_of(setting: Setting) -> FewShotModule:
    maml = functools.partial(MAML, inner_lr=setting.inner_lr, inner_steps=setting.inner_steps, multi_step_loss=True)
    made: dict[str, Any] = {
        "maml": functools.partial(maml, learn_inner_lr="per_step"),
        "maml_first_order": functools.partial(maml, learn_inner_lr="per_step", order=1),
        "anil": functools.partial(maml, learn_inner_lr="per_step", adapt="head"),
        "meta_sgd": functools.partial(maml, learn_inner_lr=True),
        "prototypes": PrototypicalNetwork,
        "transfer": TransferLearning,
    }
    # Strides instead of pooling, as the paper does for small drawings; four times as fast.
    options = {"width": setting.width, "stride": setting.name == "omniglot"}
    module: FewShotModule = made[setting.method](network="conv4", network_options=options, lr_scheduler="cosine")
    return module


def run(setting: Setting) -> dict[str, Any]:
    """Return the accuracy on the test episodes, its interval, and the seconds of the training."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(setting.seed, verbose=False)
    source = SETS[setting.name](setting.data_dir)
    data = Episodes(
        source,
        ways=setting.ways,
        shots=setting.shots,
        queries=setting.queries,
        tasks_per_batch=setting.tasks_per_batch,
        episodes_per_epoch=setting.steps * setting.tasks_per_batch // 10,
        val_episodes=100,
        test_episodes=setting.test_episodes,
        groups=source.groups(),
        rotations=setting.name == "omniglot",
        train_tasks=setting.train_tasks,
        seed=setting.seed,
    )
    module = module_of(setting)
    start = time.perf_counter()
    training = trainer(setting.device, max_epochs=10, limit_val_batches=0)
    training.fit(module, data)
    seconds = time.perf_counter() - start
    training_accuracy = float(training.callback_metrics["train/accuracy"])
    options: dict[str, Any] = {}
    if isinstance(module, TransferLearning):
        module, options = tuned(module, data, setting.device)
    # After all steps; for transfer learning after the best ones of the validation.
    found = trainer(setting.device).test(module, data, verbose=False)[0]
    result = {
        "accuracy": found["test/accuracy"],
        "interval": found["test/accuracy_interval"],
        "episodes": int(found["test/episodes"]),
        "training_accuracy": round(training_accuracy, 4),
        "seconds": round(seconds),
        **({"tuned": options} if options else {}),
    }
    print(f"{setting.method} seed {setting.seed}: {result}", file=sys.stderr, flush=True)
    return {**result, "after": {k.rpartition("_")[2]: round(v, 4) for k, v in found.items() if "_after_" in k}}


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
    parser.add_argument("--shots", type=int, nargs="+", default=None)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["maml", "prototypes", "transfer"])
    parser.add_argument("--steps", type=int, default=2000, help="of the training, of images")
    parser.add_argument("--epochs", type=int, default=70, help="of the training, of sinusoids: 1,000 steps each")
    parser.add_argument("--tasks-per-batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--train-tasks", type=int, help="a pool of so few training episodes; left out: new ones always")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        result: dict[str, Any] = {"torch": torch.__version__, "device": options.device, "seeds": options.seeds}
        if options.what == "sinusoid":
            for shots in options.shots or [10, 5]:
                fit = functools.partial(sinusoid, shots, options.epochs, device=options.device)
                result[f"{shots} shots"] = list(pool.map(fit, options.seeds))
        else:
            base = Setting(
                options.what,
                "",
                options.data_dir,
                ways=options.ways,
                shots=(options.shots or [1])[0],
                steps=options.steps,
                tasks_per_batch=options.tasks_per_batch,
                width=options.width,
                train_tasks=options.train_tasks,
                device=options.device,
            )
            result["setting"] = asdict(base)
            wanted = {
                name: [replace(base, method=name, seed=seed) for seed in options.seeds] for name in options.methods
            }
            running = {name: [pool.submit(run, setting) for setting in settings] for name, settings in wanted.items()}
            for name, futures in running.items():
                runs = [future.result() for future in futures]
                result[name] = {"accuracy": spread([each["accuracy"] for each in runs]), "runs": runs}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
