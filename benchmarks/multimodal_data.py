"""AV-MNIST-5k and the Tux Paint stamps as batches of several modalities, for benchmarks/multimodal.py."""

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from few_shot_data import AffineJitter
from frozen_features import lite0, sentence_features
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ds_lightning.datamodules.text_vocabulary import Vocabulary, most_common
from ds_lightning.functional.seeds import derived_seed

ORDER = {"avmnist": ("image", "audio"), "stamps": ("image", "text", "audio")}
FILES = {"avmnist": ("avmnist5k.npz",), "stamps": ("stamps_img_text.npz", "stamps_speech.npz")}
STAMP_CLASSES = 10
HOP_SECONDS = 0.02
LITE0_SIZE = 224


def prepare(what: str, data_dir: str, cache: Path, language: str, device: str) -> dict[str, bool]:
    """Read a set into a file of the cache; return which pretrained encoders are there."""
    paths = [Path(data_dir, name) for name in FILES[what]]
    for path in paths:
        if not path.is_file():
            sys.exit(f"{path} is missing; set --data-dir to the folder that has it")
    saved, found = _avmnist(paths[0]) if what == "avmnist" else _stamps(paths[0], paths[1], language, device)
    torch.save(saved, cache / f"{what}.pt")
    return found


@functools.lru_cache(maxsize=1)
def prepared(path: str) -> dict[str, Any]:
    return torch.load(path, mmap=True, weights_only=True)


def _avmnist(path: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    with np.load(path, allow_pickle=False) as table:
        image = np.concatenate([table["imgdeg_train"], table["imgdeg_test"]])[:, None]
        audio = np.concatenate([table["melnoisy_train"], table["melnoisy_test"]])
        label = np.concatenate([table["y_train"], table["y_test"]]).astype(np.int64)
        train = len(table["y_train"])
    saved = {
        "columns": {"image": torch.from_numpy(image), "audio": torch.from_numpy(audio)},
        "present": torch.ones(len(label), 2, dtype=torch.bool),
        "label": torch.from_numpy(label),
        "class_names": [str(digit) for digit in range(10)],
        "test": torch.arange(len(label)) >= train,
    }
    return saved, {}


def _stamps(pictures: Path, speech: Path, language: str, device: str) -> tuple[dict[str, Any], dict[str, bool]]:
    with np.load(pictures, allow_pickle=False) as table:
        names = [name for name, _ in Counter(table["category"].tolist()).most_common(STAMP_CLASSES)]
        kept = np.isin(table["category"], names).nonzero()[0]
        image = torch.from_numpy(table["x"][kept]).permute(0, 3, 1, 2).contiguous()
        captions = table["caption_en"][kept].tolist()
        label = torch.tensor([names.index(name) for name in table["category"][kept].tolist()])
    place = {item: row for row, item in enumerate(kept.tolist())}
    with np.load(speech, allow_pickle=False) as table:
        # Each look into the file unpacks a whole array.
        clips, items, seconds, languages = (table[name] for name in ("logmel", "item", "dur", "lang"))
    audio = torch.zeros(len(kept), *clips.shape[1:], dtype=torch.uint8)
    frames = torch.zeros(len(kept), dtype=torch.int64)
    # Of several clips of an item the first is taken.
    for clip in reversed((languages == language).nonzero()[0].tolist()):
        row = place.get(int(items[clip]))
        if row is not None:
            audio[row] = torch.from_numpy(clips[clip])
            frames[row] = min(max(1, round(float(seconds[clip]) / HOP_SECONDS)), audio.shape[-1])
    if not frames.any():
        sys.exit(f"{speech} has no clip in {language!r}; choose another --language")
    present = torch.ones(len(kept), 3, dtype=torch.bool)
    present[:, 2] = frames > 0
    saved: dict[str, Any] = {
        "columns": {"image": image, "audio": audio},
        "frames": frames,
        "captions": captions,
        "present": present,
        "label": label,
        "class_names": names,
    }
    network, sentences = lite0(), sentence_features(captions)
    if network is not None:
        saved["lite0"] = _maps(network, image, device)
    if sentences is not None:
        saved["minilm"] = sentences
    return saved, {"lite0": network is not None, "minilm": sentences is not None}


@torch.inference_mode()
def _maps(network: Any, pictures: Tensor, device: str) -> Tensor:
    """Return the last feature maps (N, 1280, 7, 7), half precision."""
    network.to(device)
    found = []
    for part in pictures.split(32):
        images = part.to(device).float() / 127.5 - 1
        images = F.interpolate(images, size=LITE0_SIZE, mode="bicubic", antialias=True, align_corners=False)
        found.append(network.forward_features(images).half().cpu())
    return torch.cat(found)


def split_rows(saved: dict[str, Any], seed: int, tuning: bool) -> dict[str, Tensor]:
    """Return the rows of each part; the validation rows are the same for all seeds and never tested.

    Of AV-MNIST-5k the test part is the official one, and all other rows are trained on once tuning is over. Of stamps
    a fifth of the samples is tested, in groups of one caption, so that no test stamp's words were learned with it.
    """
    if "test" in saved:
        known = (~saved["test"]).nonzero()[:, 0]
        order = known[torch.randperm(len(known), generator=_generator(0, "validation"))]
        val = order[: len(order) // 10]
        return {"train": order[len(val) :] if tuning else order, "val": val, "test": saved["test"].nonzero()[:, 0]}
    names = sorted(set(saved["captions"]))
    group = torch.tensor([names.index(caption) for caption in saved["captions"]])
    order = torch.randperm(len(names), generator=_generator(0, "validation"))
    val, rest = order[: len(names) // 10], order[len(names) // 10 :]
    rest = rest[torch.randperm(len(rest), generator=_generator(seed, "test"))]
    parts = {"val": val, "test": rest[: len(names) // 5], "train": rest[len(names) // 5 :]}
    return {split: torch.isin(group, part).nonzero()[:, 0] for split, part in parts.items()}


def _generator(seed: int, key: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, key))


class ArrayBatches(pl.LightningDataModule):
    """Batches of rows of arrays, put together, normalised and changed at random on the device.

    Args:
        saved: what `prepare` wrote.
        rows: of each part.
        modalities: those that the batches hold, in their order.
        seed: of order and augmentation.
        batch_size: of training.
        features: pretrained encoders whose output takes the place of what they saw: `lite0`, `minilm`.
        augment: whether training pictures are changed; masks in the sound cost more than they gave.
    """

    def __init__(
        self,
        saved: dict[str, Any],
        rows: dict[str, Tensor],
        modalities: tuple[str, ...],
        seed: int,
        batch_size: int,
        features: tuple[str, ...] = (),
        augment: bool = True,
    ) -> None:
        super().__init__()
        self.rows, self.modalities, self.batch_size, self.augment = rows, modalities, batch_size, augment
        self.class_names = saved["class_names"]
        self.num_classes = len(self.class_names)
        columns, train = dict(saved["columns"]), rows["train"]
        if "captions" in saved:
            words = most_common([saved["captions"][row] for row in train.tolist()], 10_000, "word", True)
            self.vocabulary = Vocabulary(words)
            self.vocab_size = len(self.vocabulary)
            tokens = [torch.tensor(self.vocabulary.encode(caption, 64)) for caption in saved["captions"]]
            columns["text"] = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        for name, key in (("image", "lite0"), ("text", "minilm")):
            if key in features and name in modalities:
                columns[name] = saved[key]
        whole = ORDER["stamps" if "captions" in saved else "avmnist"]
        self.held = {name: columns[name] for name in modalities}
        self.held["present"] = saved["present"][:, [whole.index(name) for name in modalities]]
        self.held["label"] = saved["label"]
        if "audio" in modalities and "frames" in saved:
            self.held["audio_mask"] = torch.arange(columns["audio"].shape[-1]) < saved["frames"][:, None]
        self.scales = {
            name: _scale(columns[name], train, self.held["present"][:, k]) for k, name in enumerate(modalities)
        }
        self.input_shapes = {name: tuple(columns[name].shape[1:]) for name in modalities}
        self.generator = _generator(seed, "order")
        self.affine = AffineJitter(derived_seed(seed, "affine"))

    def train_dataloader(self) -> DataLoader[Any]:
        size = min(self.batch_size, len(self.rows["train"]))
        return DataLoader(self.rows["train"], size, shuffle=True, drop_last=True, generator=self.generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows["val"], 256)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows["test"], 256)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> dict[str, Tensor]:
        self.held = {name: column.to(batch.device) for name, column in self.held.items()}
        found = {name: column[batch] for name, column in self.held.items()}
        changed = self.augment and self.trainer is not None and self.trainer.training
        for name, scale in self.scales.items():
            if changed and name == "image" and found[name].dtype == torch.uint8:
                found[name] = self.affine(found[name])
            if scale is not None:
                found[name] = (found[name].float() - scale[0]) / scale[1]
        return found


def _scale(column: Tensor, train: Tensor, present: Tensor) -> tuple[float, float] | None:
    """Return mean and deviation of the training samples that have the modality; None for token ids."""
    if column.dtype == torch.int64:
        return None
    std, mean = torch.std_mean(column[train[present[train]]].float())
    return float(mean), float(std)
