"""Small batches of views and of pairs."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SIZE, SAMPLES = 16, 32
# Patches of 4 pixels, which a convolution can tell from the noise.
PATCHES = torch.randn(SAMPLES, 1, 4, 4, generator=torch.Generator().manual_seed(7))
PATTERNS = PATCHES.repeat_interleave(4, 2).repeat_interleave(4, 3)
SENTENCES = torch.randint(2, 30, (SAMPLES, 6), generator=torch.Generator().manual_seed(8))
SMALL = {"encoder_options": {"width": 4}, "in_channels": 1, "image_size": SIZE, "projector": (16, 8)}
TEXT = {"encoder_options": {"vocab_size": 30, "width": 16, "depth": 1, "heads": 2}, "projector": (8,)}


class Views(Dataset[Any]):
    """Two noisy copies of a pattern, or the same sentence twice; the same for the same index."""

    def __init__(self, modality: str = "image", noise: float = 0.5, labels: int | None = None) -> None:
        self.modality, self.noise, self.labels = modality, noise, labels

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)

        def view() -> dict[str, Tensor]:
            if self.modality == "text":
                return {"text": SENTENCES[index]}
            return {"image": PATTERNS[index] + self.noise * torch.randn(1, SIZE, SIZE, generator=generator)}

        label = {} if self.labels is None else {"label": torch.tensor(index % self.labels)}
        return {"first": view(), "second": view(), "index": torch.tensor(index), **label}


class ImagesAndTexts(Dataset[Any]):
    """A pattern and a sentence that belong together."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": PATTERNS[index], "text": SENTENCES[index]}


class Viewed(L.LightningDataModule):
    """What a DataModule tells the modules."""

    input_shape, vocab_size = (1, SIZE, SIZE), 30

    def __init__(self, data: Dataset[Any] | None = None, batch_size: int = 16) -> None:
        super().__init__()
        self.data, self.batch_size = data or Views(), batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        # Lightning's own sampler would shuffle.
        ranks = self.trainer.world_size if self.trainer else 1
        sampler = DistributedSampler(self.data, ranks, self.trainer.global_rank, shuffle=False) if ranks > 1 else None
        return DataLoader(self.data, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size)

    predict_dataloader = val_dataloader


def batch(**options: Any) -> dict[str, Any]:
    """Return all views as one batch."""
    (found,) = DataLoader(Views(**options), batch_size=SAMPLES)
    return found


def trainer(tmp_path: Any, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 1}
    return L.Trainer(**{"max_epochs": 1, "default_root_dir": tmp_path, "accelerator": "cpu", **quiet, **options})
