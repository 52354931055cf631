"""The trainings of benchmarks/contrastive.py: with labels, without them, and from a teacher."""

import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from contrastive_data import labelled, views
from torch import Tensor
from torch.nn import functional as F

from ds_lightning.callbacks import LinearProbe
from ds_lightning.functional.batch import input_of, labelled_batch
from ds_lightning.modules import Classifier, ContrastivePretraining


@dataclass(frozen=True)
class Run:
    """One training.

    `train_size` is the number of labels; None: all. `keep` is where the trained weights go, `teacher` the file of those
    whose answers take the place of labels.
    """

    name: str
    cache: str
    seed: int = 0
    train_size: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    augment: str = "none"
    steps: int = 2000
    batch_size: int = 256
    network: str = "resnet8"
    network_options: str = "{}"
    encoder: str = ""
    keep: str = ""
    teacher: str = ""
    split: str = "val"
    device: str = "cpu"


@dataclass(frozen=True)
class Pretraining:
    """One pre-training without labels."""

    name: str
    cache: str
    seed: int = 0
    epochs: int = 100
    batch_size: int = 512
    lr: float = 1e-3
    weight_decay: float = 1e-4
    temperature: float = 0.2
    view_options: str = "{}"
    network: str = "resnet8"
    network_options: str = "{}"
    shares: tuple[float, ...] = (1.0,)
    steps: int = -1
    device: str = "cpu"


class ChannelsLast(pl.Callback):
    """Puts convolutions into the order in which a GPU's tensor cores are fastest."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.to(memory_format=torch.channels_last)


def trainer(device: str, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    if device == "cuda":
        quiet |= {"precision": "bf16-mixed", "benchmark": True}
        callbacks = (*callbacks, ChannelsLast())
    return pl.Trainer(
        accelerator=device, devices=1, num_sanity_val_steps=0, callbacks=list(callbacks), **{**quiet, **options}
    )


def start(seed: int) -> float:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    pl.seed_everything(seed, verbose=False)
    return time.perf_counter()


def optimizer_of(run: Run) -> Any:
    if run.optimizer == "adamw":
        return lambda params: torch.optim.AdamW(params, lr=run.lr, weight_decay=run.weight_decay)
    return lambda params: torch.optim.SGD(params, lr=run.lr, momentum=0.9, nesterov=True, weight_decay=run.weight_decay)


class Student(Classifier):
    """Learns what a teacher of the same architecture says of each augmented batch, and no label."""

    teacher: tuple[torch.nn.Module, ...] = ()  # a tuple, so that it is no part of this module

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = input_of(labelled_batch(batch))
        with torch.no_grad():
            said = self.teacher[0](x).float().softmax(1)
        loss: Tensor = F.cross_entropy(self(x), said)
        return loss


def supervised(run: Run) -> dict[str, Any]:
    """Train with labels, from scratch or from an encoder; return the accuracy on the run's split."""
    begin = start(run.seed)
    size = run.batch_size if run.train_size is None else min(run.batch_size, max(16, run.train_size // 8))
    data = labelled(
        run.name,
        Path(run.cache),
        batch_size=size,
        seed=run.seed,
        train_size=run.train_size,
        augment=run.augment,
        pin_memory=run.device == "cuda",
    )
    options: dict[str, Any] = {"network_options": json.loads(run.network_options)}
    if run.encoder:
        options["encoder"] = run.encoder
    module = (Student if run.teacher else Classifier)(
        run.network, optimizer=optimizer_of(run), lr_scheduler="cosine", **options
    )
    if isinstance(module, Student):
        data.prepare_data()
        data.setup("fit")  # of texts the classes are not known before
        teacher = Classifier(run.network, num_classes=data.num_classes, **options)
        teacher.configure_model()
        teacher.load_state_dict(torch.load(run.teacher, map_location="cpu", weights_only=True))
        teacher.to(run.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        module.teacher = (teacher,)
    fit = trainer(run.device, max_steps=run.steps, max_epochs=-1, limit_val_batches=0)
    fit.fit(module, data)
    if run.keep:
        torch.save(module.state_dict(), run.keep)
    data.batch_size = 1000
    judge = trainer(run.device)
    evaluate = judge.test if run.split == "test" else judge.validate
    accuracy = evaluate(module, data, verbose=False)[0][f"{run.split}/accuracy"]
    seconds = time.perf_counter() - begin
    kind = "distilled" if run.teacher else "finetune" if run.encoder else "supervised"
    size_said = run.train_size or "all"
    print(
        f"{run.name} {kind} {size_said} labels, seed {run.seed}, "
        f"{run.optimizer} {run.lr:g} {run.weight_decay:g} {run.augment}: "
        f"{run.split} {accuracy:.4f} ({seconds:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return {"accuracy": accuracy, "seconds": seconds}


def pretrain(run: Pretraining) -> dict[str, Any]:
    """Pre-train, save, and probe on the test samples."""
    begin = start(run.seed)
    cache = Path(run.cache)
    view_options = {**json.loads(run.view_options), "pin_memory": run.device == "cuda"}
    data = views(run.name, cache, batch_size=run.batch_size, seed=run.seed, options=view_options)
    module = ContrastivePretraining(
        run.network,
        encoder_options=json.loads(run.network_options),
        temperature=run.temperature,
        optimizer=lambda params: torch.optim.AdamW(params, lr=run.lr, weight_decay=run.weight_decay),
        lr_scheduler="cosine",
    )
    fit = trainer(run.device, max_epochs=run.epochs, max_steps=run.steps, limit_val_batches=0)
    fit.fit(module, data)
    seconds = time.perf_counter() - begin
    path = cache / f"{run.name}_seed{run.seed}.ckpt"
    fit.save_checkpoint(path, weights_only=True)
    data.batch_size = 1000
    probe = LinearProbe(labels=run.shares, knn=20)
    (found,) = trainer(run.device, probe, limit_val_batches=1).validate(module, data, verbose=False)
    figures = {name.removeprefix("probe/"): value for name, value in found.items() if name.startswith("probe/")}
    figures |= {"loss": float(fit.callback_metrics["train/loss"]), "effective_rank": found["val/effective_rank"]}
    print(f"{run.name} pre-trained, seed {run.seed}: {figures} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return {**figures, "seconds": seconds, "path": str(path)}


def tfidf(run: Run) -> dict[str, Any]:
    """Return the test accuracy of TF-IDF and logistic regression, the usual baseline for texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from ds_lightning.datamodules.text_reading import read_texts

    begin = start(run.seed)
    cache = Path(run.cache)
    data = labelled(run.name, cache, batch_size=64, seed=run.seed, train_size=run.train_size)
    (texts, labels), (test_texts, truth) = (read_texts(data.paths[split]) for split in ("train", "test"))
    chosen = range(len(texts))
    if run.train_size is not None:
        generator = torch.Generator().manual_seed(run.seed)
        chosen = torch.randperm(len(texts), generator=generator)[: run.train_size].tolist()
    vectors = TfidfVectorizer(sublinear_tf=True).fit([texts[index] for index in chosen])
    judge = LogisticRegression(C=10, max_iter=1000)
    judge.fit(vectors.transform([texts[index] for index in chosen]), [labels[index] for index in chosen])
    accuracy = judge.score(vectors.transform(test_texts), truth)
    return {"accuracy": float(accuracy), "seconds": time.perf_counter() - begin}
