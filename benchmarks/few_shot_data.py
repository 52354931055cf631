"""Omniglot-small and emoji pictures, for benchmarks/few_shot.py; run it to measure how fast episodes are made."""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ds_lightning.datamodules import Episodes, InMemoryImageData, MNIST5k

OMNIGLOT, EMOJI = "omniglot_small28.npz", "emoji64.npz"


class AffineJitter:
    """Turns each image by up to 15 degrees, scales it by up to 20% in each direction, shears and shifts it a little.

    What comes in from outside is the image's border.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, image: Tensor) -> Tensor:
        """Return the changed copy of images (B, C, H, W) uint8."""
        drawn = 2 * torch.rand(len(image), 6, generator=self.generator) - 1
        angle, scale = math.pi / 12 * drawn[:, 0], 1 + 0.2 * drawn[:, 1:3]
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        stretch = torch.diag_embed(scale)
        stretch[:, 0, 1] = 0.2 * drawn[:, 3]
        theta = torch.cat([turn @ stretch, 0.15 * drawn[:, 4:, None]], 2).to(image.device, non_blocking=True)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        moved = F.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)
        return moved.round_().to(torch.uint8)


class FileImages(InMemoryImageData):
    """Images of one .npz file: no test part, because episodes take all images and split the classes."""

    def __init__(self, data_dir: str = "data", **options: Any) -> None:
        super().__init__(**options)
        self.data_dir = data_dir

    def setup(self, stage: str | None = None) -> None:
        """Read the images."""
        super().setup(stage)
        self.augment = AffineJitter(self.seed)

    def load(self):
        images, labels, self.class_names, self.class_groups, self.units = read(str(Path(self.data_dir, self.source)))
        # A test part is asked for: the first image of each class, which is not in the other part.
        first = torch.zeros(len(labels), dtype=torch.bool)
        first[[int((labels == number).nonzero()[0, 0]) for number in range(len(self.class_names))]] = True
        self.parts = (~first, first)
        return tuple((images[part], labels[part]) for part in self.parts)

    def load_splits(self):
        splits = super().load_splits()
        for part, chosen in zip(splits, (self.parts[0], self.parts[0], self.parts[1]), strict=True):
            part.units = self.units[chosen]
        return splits

    def groups(self) -> dict[str, str]:
        """Class name -> group, for `Episodes(groups=...)`."""
        self.setup()
        return self.class_groups


class OmniglotSmall(FileImages):
    """Omniglot-small: 242 characters of 8 alphabets by 20 drawers, 28 x 28; a group is an alphabet."""

    source = OMNIGLOT
    mean, std = (0.0806,), (0.2361,)


class EmojiSet(FileImages):
    """Emojis of two vendors, 64 x 64 RGB; a class is a subcategory, a group is a category.

    Both pictures of an emoji have one unit, so they are never both in an episode. Subcategories with fewer than
    `MIN_EMOJIS` emojis are left out.
    """

    source = EMOJI
    mean, std = (0.796, 0.746, 0.701), (0.300, 0.293, 0.340)


MIN_EMOJIS = 10


@functools.lru_cache(maxsize=2)
def read(path: str) -> tuple[torch.Tensor, torch.Tensor, list[str], dict[str, str], torch.Tensor]:
    """Return images, labels, names of the classes, groups of the classes, and units of the images."""
    if not Path(path).is_file():
        sys.exit(f"{path} is missing; set --data-dir to the folder that has it")
    with np.load(path, allow_pickle=False) as table:
        if Path(path).name == OMNIGLOT:
            pixels, names, groups = table["x"][:, :, :, None], table["cls"], table["alphabet"]
            things = np.arange(len(names))
        else:
            pixels, names, groups = table["x"], table["subcategory"], table["category"]
            things = np.unique(table["name"], return_inverse=True)[1]
            per_class = {name: len(set(things[names == name].tolist())) for name in set(names.tolist())}
            kept = np.array([per_class[name] >= MIN_EMOJIS for name in names.tolist()])
            pixels, names, groups, things = pixels[kept], names[kept], groups[kept], things[kept]
    class_names, labels = np.unique(names, return_inverse=True)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    group_of = dict(zip(names.tolist(), groups.tolist(), strict=True))
    return images, torch.from_numpy(labels), class_names.tolist(), group_of, torch.from_numpy(things)


def plain_episode(images: list[torch.Tensor], by_class: list[list[int]], generator: torch.Generator) -> dict[str, Any]:
    """Make an episode as one would at first: a loop over classes and samples, each normalised by itself."""
    parts: dict[str, Any] = {name: {"image": [], "label": []} for name in ("support", "query")}
    for label, number in enumerate(torch.randperm(len(by_class), generator=generator)[:5].tolist()):
        members = by_class[number]
        order = torch.randperm(len(members), generator=generator)[:16].tolist()
        for place, sample in enumerate(order):
            part = parts["support" if place < 1 else "query"]
            part["image"].append((images[members[sample]].float() / 255 - 0.1307) / 0.3081)
            part["label"].append(label)
    return {
        name: {"image": torch.stack(part["image"]), "label": torch.tensor(part["label"])}
        for name, part in parts.items()
    }


def rate(make: Callable[[], int], repeats: int = 5) -> float:
    """Return episodes a second, the median of some repeats."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        rates.append(make() / (time.perf_counter() - start))
    return statistics.median(rates)


def speed(data: InMemoryImageData, episodes: int = 400) -> dict[str, float]:
    """Episodes a second, 5-way 1-shot with 15 queries, 4 a batch, normalised, on one thread."""
    made = Episodes(data, ways=5, splits=(1.0, 0.0, 0.0), episodes_per_epoch=episodes, val_episodes=0)
    made.setup()
    source = made.source
    images = list(source.load(torch.arange(len(source.labels)), None))
    by_class = [(source.labels == number).nonzero()[:, 0].tolist() for number in range(len(source.class_names))]
    generator = torch.Generator().manual_seed(0)

    def ours() -> int:
        return sum(len(made.on_after_batch_transfer(batch, 0)["classes"]) for batch in made.train_dataloader())

    def plain() -> int:
        batches = []
        for _ in range(episodes // 4):
            four = [plain_episode(images, by_class, generator) for _ in range(4)]
            batches.append([torch.stack([one[part]["image"] for one in four]) for part in ("support", "query")])
        return 4 * len(batches)

    found = {"ours": rate(ours), "plain loop": rate(plain)}
    return {
        **{name: round(value) for name, value in found.items()},
        "ratio": round(found["ours"] / found["plain loop"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="", help=f"folder of {OMNIGLOT}; without it only MNIST5k is measured")
    data_dir = parser.parse_args().data_dir
    torch.set_num_threads(1)
    found = {"MNIST5k": speed(MNIST5k())}
    if data_dir:
        found["Omniglot-small"] = speed(OmniglotSmall(data_dir))
    print(json.dumps({"episodes a second, 5-way 1-shot, 15 queries, 1 x 28 x 28": found}, indent=2))


if __name__ == "__main__":
    main()
