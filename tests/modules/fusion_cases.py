"""Small samples of several modalities, some of them absent, and encoders that are easy to follow."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ds_lightning.modules import MultimodalFusion

CLASSES, SAMPLES = 3, 24
_G = torch.Generator().manual_seed(5)
IMAGE = torch.randn(SAMPLES, 1, 8, 8, generator=_G)
AUDIO = torch.randn(SAMPLES, 4, 12, generator=_G)
TABLE = torch.randn(SAMPLES, 2, generator=_G)
LABEL = torch.randint(0, CLASSES, (SAMPLES,), generator=_G)
SEVERAL = (torch.rand(SAMPLES, CLASSES, generator=_G) > 0.6).float()
# Every third sample has no image, every fourth no audio, number 7 no table; all have something.
PRESENT = torch.tensor([[i % 3 != 0, i % 4 != 1, i != 7] for i in range(SAMPLES)])
NAMES = ("image", "audio", "table")
OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"in_channels": 1, "width": 4},
    "audio": {"mels": 4, "width": 8, "depth": 1},
    "table": {"columns": 2, "width": 8},
}


def batch_of(rows: slice = slice(None), fill: float = 0.0, **more: Tensor) -> dict[str, Tensor]:
    """A batch in which absent entries hold `fill`."""
    inputs = {}
    for column, (name, x) in enumerate(zip(NAMES, (IMAGE, AUDIO, TABLE), strict=True)):
        there = PRESENT[:, column].view(-1, *(1,) * (x.dim() - 1))
        inputs[name] = torch.where(there, x, fill)[rows]
    return {**inputs, "present": PRESENT[rows], "label": LABEL[rows], **more}


def model_of(**options: Any) -> MultimodalFusion:
    """A small model whose attention has its say already: with `skip` its head begins at zero, which would hide it."""
    torch.manual_seed(0)
    model = MultimodalFusion(
        **{
            "encoders": dict.fromkeys(NAMES),
            "num_classes": CLASSES,
            "encoder_options": OPTIONS,
            "width": 8,
            "depth": 1,
            "heads": 2,
            "dropout": 0.0,
            "modality_dropout": 0.0,
            **options,
        }
    )
    if model.network is not None and model.network.head is not None:
        model.network.head.reset_parameters()
    return model


class Flat(nn.Module):
    """Features (B, 3) of any input, linear; says how many there are."""

    num_features = 3

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1))
        return out


class Rows(Dataset[Any]):
    """The samples of `batch_of`, one at a time."""

    def __init__(self, labels: Tensor = LABEL, absent: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self.all = batch_of() if absent else {"image": IMAGE, "audio": AUDIO, "table": TABLE}
        self.all = {key: x.to(dtype) if x.is_floating_point() else x for key, x in self.all.items()}
        self.all["label"] = labels

    def __len__(self) -> int:
        return len(self.all["label"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: x[index] for key, x in self.all.items()}


class RowsData(L.LightningDataModule):
    num_classes, modalities = CLASSES, NAMES

    def __init__(self) -> None:
        super().__init__()
        self.input_shapes = {"image": (1, 8, 8), "audio": (4, 12), "table": (2,)}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trainer_in(folder: Any, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"max_epochs": 1, "default_root_dir": folder, "accelerator": "cpu", **quiet, **options})
