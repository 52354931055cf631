"""A module whose attention and predictions are known in closed form, that the tests of AttentionMaps share."""

from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ds_lightning.datamodules.text_vocabulary import Vocabulary

ORDER = ("image", "text", "audio")


class Maps(NamedTuple):
    names: tuple[str, ...]
    matrix: Tensor
    tokens: dict[str, Tensor]


class Records(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, Any] = {}
        self.files: dict[str, Any] = {}

    def log_figure(self, figure: Any, name: str) -> None:
        assert name not in self.figures
        figure.canvas.draw()
        self.figures[name] = figure

    def log_json(self, content: Any, name: str) -> None:
        assert name not in self.files
        self.files[name] = content


class Rows(pl.LightningDataModule):
    """Samples whose class is in the image's mean and, for class 2, in the sound; the text tells nothing.

    The samples are sorted by class, so that a permutation inside a batch would change nothing.
    """

    class_names = ("dark", "bright", "loud")
    modalities = ORDER

    def __init__(self, samples: int = 30, batch: int = 5, absent: bool = True, fill: float = 0.0) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(["red", "car", "$x_2"])
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for index in range(samples):
            label = index * 3 // samples
            length = 4 + index % 3
            present = torch.tensor([True, not absent or index % 4 != 0, not absent or index % 5 != 1])
            image = torch.full((1, 4, 4), float(label == 1))
            text = torch.randint(1, 5, (3,), generator=generator)
            audio = torch.full((2, length), float(label == 2))
            row = {"image": image, "text": text, "audio": audio}
            row = {
                n: v if bool(p) else torch.full_like(v, fill if v.is_floating_point() else 7)
                for (n, v), p in zip(row.items(), present, strict=True)
            }
            self.rows.append({**row, "present": present, "label": torch.tensor(label)})
        self.batch = batch

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        found = {key: torch.stack([row[key] for row in rows]) for key in ("image", "text", "present", "label")}
        longest = max(row["audio"].shape[1] for row in rows)
        found["audio"] = torch.stack(
            [nn.functional.pad(row["audio"], (0, longest - row["audio"].shape[1])) for row in rows]
        )
        found["audio_mask"] = torch.stack([torch.arange(longest) < row["audio"].shape[1] for row in rows])
        return found

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch, collate_fn=self.collate)


class Known(pl.LightningModule):
    """Says `loud` where the present sound is loud, else what the image's mean says; attends as `share` says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout()
        self.modes: list[bool] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.modes.append(self.training)
        torch.rand(1)
        level = (batch["audio"] * batch["audio_mask"][:, None]).sum(dim=(1, 2)) / batch["audio_mask"].sum(dim=1) / 2
        loud = torch.where(batch["present"][:, 2], level, 0.0)
        bright = batch["image"].mean(dim=(1, 2, 3))
        return torch.stack([torch.full_like(bright, 0.5), bright, 2 * loud], dim=1) + self.weight

    def share(self, batch: dict[str, Tensor]) -> Tensor:
        """Fused and present modalities alike, but the image attends to itself alone; other rows are NaN."""
        present = batch["present"]
        keys = torch.cat([torch.ones(len(present), 1), present.float()], dim=1)
        matrix = (keys / keys.sum(dim=1, keepdim=True))[:, None].repeat(1, 4, 1)
        matrix[:, 1] = torch.tensor([0.0, 1, 0, 0])
        matrix[:, 1:][~present] = torch.nan
        return matrix

    def attention_maps(self, batch: dict[str, Tensor]) -> Maps:
        matrix = self.share(batch)
        tokens = {"image": 4, "text": batch["text"].shape[1], "audio": 2}
        parts = {
            name: matrix[:, 0, row, None].expand(-1, tokens[name]) / tokens[name] for row, name in enumerate(ORDER, 1)
        }
        return Maps(("fused", *ORDER), matrix, parts)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.dropout(self(batch) - batch["label"][:, None]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log(
            "val/accuracy", (self(batch).argmax(dim=1) == batch["label"]).float().mean(), batch_size=len(batch["label"])
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    base = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path, "logger": False}
    return pl.Trainer(**{**base, **quiet, **options}, callbacks=list(callbacks))
