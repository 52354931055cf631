"""A LightningModule that knows nothing of ds_lightning learns two tasks, with and without three more lines.

Task one: digits upright; task two: the same digits turned by 90 degrees. Prints JSON: the accuracy on each task after
the second, by seed. Run: OMP_NUM_THREADS=1 python benchmarks/continual_stranger.py [--seeds 5]
"""

import argparse
import json
import logging
import statistics
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import ElasticWeightConsolidation
from ds_lightning.datamodules.mnist5k import read_digits


class Stranger(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def accuracies(seed: int, remembers: bool, epochs: int) -> list[float]:
    """Return the accuracy on the test digits of both tasks after training on one, then on the other."""
    pl.seed_everything(seed, verbose=False)
    images, labels = read_digits()
    x = images.float() / 255
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:4000], order[4000:]
    tasks = (x, x.rot90(dims=(2, 3)))
    module = Stranger()
    callbacks = [ElasticWeightConsolidation()] if remembers else []
    for pixels in tasks:
        loader = DataLoader(TensorDataset(pixels[train], labels[train]), batch_size=64, shuffle=True)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    module.eval()
    with torch.no_grad():
        return [(module(pixels[test]).argmax(1) == labels[test]).float().mean().item() for pixels in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="a task")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result: dict[str, Any] = {"torch": torch.__version__, "seeds": options.seeds}
    for name, remembers in (("plain", False), ("with ElasticWeightConsolidation", True)):
        found = [accuracies(seed, remembers, options.epochs) for seed in range(options.seeds)]
        result[name] = {
            task: {kind.__name__: round(kind(values), 4) for kind in (statistics.median, min, max)}
            for task, values in zip(("upright", "turned"), zip(*found, strict=True), strict=True)
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
