"""SIGKILL a fit at random moments, go on from its newest checkpoint, and compare with a fit that was left alone.

Run: OMP_NUM_THREADS=1 python benchmarks/fit_kills.py [--kills 50] [--callbacks none dynamic_layer_lr finite_guard]

Each row is one set of callbacks: shuffled MNIST5k with MixUp, CutMix and an augmentation in 2 worker processes, a
network with dropout, a checkpoint every 5 steps. A process is killed with all its workers at a random moment, and a
new one goes on; the same fit is run again with other moments until there were so many kills. Prints JSON: the
kills, after how many trained steps they came, how many fits ended with weights bit-equal to the undisturbed one.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from ds_lightning.callbacks import DurableCheckpoint, DynamicLayerLR, ExactResume, FiniteGuard
from ds_lightning.checkpoints import newest_checkpoint
from ds_lightning.datamodules import MNIST5k
from ds_lightning.modules import Classifier

CALLBACKS: dict[str, list[Any]] = {
    "none": [],
    "dynamic_layer_lr": [lambda: DynamicLayerLR("variance", every=2, warmup=10)],
    "finite_guard": [FiniteGuard],
    "all": [lambda: DynamicLayerLR("variance", every=2, warmup=10), FiniteGuard],
}
STEPS = 120


def jitter(image: np.ndarray) -> dict[str, np.ndarray]:
    """Add noise from three global generators at once: what a user's own augmentation may draw from."""
    shift = random.randint(0, 2) + int(np.random.randint(0, 3)) + int(torch.randint(0, 3, ()))
    return {"image": np.roll(image, shift, axis=1)}


def network() -> nn.Module:
    """Return a small convolutional network with dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 13 * 13, 10),
    )


class Progress(Callback):
    """Write the number of trained steps where the killer reads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.file.write_text(str(trainer.global_step))


def fit(folder: Path, name: str) -> None:
    """Train in this process from the newest checkpoint in the folder, and leave the final weights there."""
    os.setsid()  # so that the killer reaches the workers too, as a machine that goes down would
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_everything(1, verbose=False)
    data = MNIST5k(
        batch_size=64,
        num_workers=2,
        train_size=1280,
        mixup_alpha=0.4,
        cutmix_alpha=1.0,
        transform=jitter,
    )
    model = Classifier(network(), num_classes=10, in_channels=1, image_size=28)
    saver = DurableCheckpoint(folder / "checkpoints", every_n_train_steps=5, save_last=True)
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), saver, Progress(folder / "step"), *(make() for make in CALLBACKS[name])],
    )
    trainer.fit(model, data, ckpt_path=newest_checkpoint(folder / "checkpoints"))
    temporary = folder / "final.tmp"
    torch.save(model.state_dict(), temporary)
    temporary.rename(folder / "final.pt")


def disturbed(context: Any, folder: Path, name: str, dice: random.Random, kills: int, usual: float) -> list[int]:
    """Run one fit to its end with up to `kills` kills; return the step at each of them."""
    at: list[int] = []
    while not (folder / "final.pt").exists():
        process = context.Process(target=fit, args=(folder, name))
        process.start()
        # Over the whole time of a fit: start, restore, first step, saving, and near the end.
        process.join(dice.uniform(0.05, usual) if len(at) < kills else None)
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            step = folder / "step"
            at.append(int(step.read_text() or 0) if step.exists() else 0)
        elif process.exitcode != 0:
            raise RuntimeError(f"the fit in {folder} ended with {process.exitcode}")
    return at


def row(context: Any, root: Path, name: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill the fit with one set of callbacks until there were so many kills."""
    dice = random.Random(f"{seed} {name}")
    whole = root / "whole"
    whole.mkdir(parents=True)
    start = time.perf_counter()
    disturbed(context, whole, name, dice, 0, 0.0)
    usual = time.perf_counter() - start
    truth = torch.load(whole / "final.pt", weights_only=True)
    at: list[int] = []
    fits = equal = 0
    while len(at) < kills:
        folder = root / str(fits)
        folder.mkdir()
        at += disturbed(context, folder, name, dice, min(8, kills - len(at)), usual)
        final = torch.load(folder / "final.pt", weights_only=True)
        fits += 1
        equal += all(torch.equal(truth[key], final[key]) for key in truth)
    return {"kills": len(at), "fits": fits, "bit_equal": equal, "steps": STEPS, "killed_at_step": at}


def main() -> None:
    """Print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each set of callbacks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--callbacks", nargs="+", choices=list(CALLBACKS), default=list(CALLBACKS))
    arguments = parser.parse_args()
    # Imports are done once, in the server that forks the fits: a new process for each, without their 5 s.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [name for name in sys.modules if name.startswith(("ds_lightning.", "lightning.pytorch"))]
    )
    warm = context.Process(target=os.getpid)
    warm.start()
    warm.join()
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            name: row(context, Path(folder) / name, name, arguments.kills, arguments.seed)
            for name in arguments.callbacks
        }
    print(json.dumps({"torch": torch.__version__, "seed": arguments.seed, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
