"""A folder with a manifest of several modalities, and a small model, for tests."""

import csv

import lightning.pytorch as L
import numpy as np
import torch
from manifest_cases import write_wave
from PIL import Image

SCHEMA = {
    "columns": {
        "photo": {"modality": "image", "size": 4, "channels": 1, "augment": {"crop_padding": 1}},
        "words": {"modality": "text", "max_length": 5, "vocab_size": 30},
        "clip": {
            "modality": "audio",
            "sample_rate": 8000,
            "mels": 4,
            "max_seconds": 0.2,
            "spec_augment": {"frequency": 1},
        },
        "age": "table",
        "income": "table",
    },
    "label": "y",
}
CLASSES = ("bird", "cat")


def write_rows(folder, count=24, name="all.csv", first=0):
    """Row n has an image of n, n % 4 + 1 words, a clip of another length, and lacks something now and then."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(first, first + count):
        Image.fromarray(np.full((4, 4), n, dtype=np.uint8)).save(folder / f"{n}.png")
        write_wave(folder / f"{n}.wav", np.sin(np.arange(200 + 60 * (n % 9)) * 0.2) * 0.4)
        rows.append(
            {
                "photo": "" if n % 7 == 3 else f"{n}.png",
                "words": " ".join(["one", "two", "three", "four"][: n % 4 + 1]),
                "clip": "" if n % 5 == 2 else f"{n}.wav",
                "age": n,
                "income": "" if n % 6 == 1 else n * n,
                "y": CLASSES[n % 2],
            }
        )
    write_csv(folder / name, rows)
    return folder / name


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class SumsOfInputs(L.LightningModule):
    """Learns from the sum of each input, and keeps the batches that it got."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append({name: value.clone() for name, value in batch.items()})
        sums = [batch[name].flatten(1).float().mean(1) for name in ("image", "text", "audio", "table")]
        logits = self.layer(torch.nn.functional.dropout(torch.stack(sums, 1), 0.2))
        losses = [
            torch.nn.functional.cross_entropy(logits, batch[name], reduction="none")
            for name in ("label", "label_mixed")
            if name in batch
        ]
        share = batch.get("mix", torch.ones(len(logits)))
        return (share * losses[0] + (1 - share) * losses[-1]).mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options})
