"""Networks and data of benchmarks/layer_lr.py: sets that lie on the device, and batches that are cut out there."""

import functools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = {"cifar10": 10, "mnist5k": 10, "sst2": 2}
VALIDATION = {"cifar10": 2000, "mnist5k": 500}
# The classes that a network is pre-trained on, and the others.
PARTS = {"first": range(5), "second": range(5, 10)}
MAX_LENGTH = 64
CIFAR_MEAN, CIFAR_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


@dataclass(frozen=True)
class Data:
    """A set on one device: inputs and labels of each split.

    Images are uint8 (N, H, W, C), those of training with `padding` black pixels on each side; texts are ids (N, L).
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    words: int = 0
    mean: Tensor | None = None
    std: Tensor | None = None
    padding: int = 0
    mirror: bool = False

    def draws(self, steps: int, batch_size: int, seed: int) -> Tensor:
        """Return all that is random in the batches, (steps, batch_size, 4): sample, row, column, mirrored.

        It depends on the seed alone, so that methods are compared on the same batches. Every epoch has its order.
        """
        generator = torch.Generator().manual_seed(seed)
        count, needed = len(self.train[1]), steps * batch_size
        epochs = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
        shifts = torch.randint(2 * self.padding + 1, (2, needed), generator=generator)
        mirrored = torch.randint(2 if self.mirror else 1, (needed,), generator=generator)
        drawn = torch.stack([torch.cat(epochs)[:needed], *shifts, mirrored], dim=1)
        return drawn.view(steps, batch_size, 4).to(self.train[1].device)

    def batch(self, draw: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and labels of one draw, (batch_size, 4); images with `size` pixels a side."""
        inputs, labels = self.train
        sample, row, column, mirrored = draw.unbind(1)
        if self.mean is None:
            return inputs[sample], labels[sample]
        place = torch.arange(inputs.shape[1] - 2 * self.padding, device=draw.device)
        rows = row[:, None] + place
        columns = column[:, None] + torch.where(mirrored[:, None] > 0, place.flip(0), place)
        cut = inputs[sample[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.images(cut, size), labels[sample]

    def images(self, pixels: Tensor, size: int) -> Tensor:
        """Map uint8 (B, H, W, C) to normalized (B, C, size, size), in the memory order of the pixels."""
        x = ((pixels / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        return x if size == x.shape[-1] else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    def correct(self, network: nn.Module, split: str, size: int) -> Tensor:
        """Return the share of a split that a network gets right, on the device."""
        inputs, labels = getattr(self, split)
        right = []
        for x, y in zip(inputs.split(1000), labels.split(1000), strict=True):
            right.append((network(x if self.mean is None else self.images(x, size)).argmax(1) == y).sum())
        return torch.stack(right).sum() / len(labels)


def prepare(name: str, data_dir: str, cache: Path) -> None:
    """Read a set once into a file that all processes map.

    Args:
        name: `cifar10`, `mnist5k` or `sst2`.
        data_dir: folder of cifar10_jpeg.npz and sst2_{train,dev,test}.txt.
        cache: an existing folder.
    """
    if name == "sst2":
        torch.save(_read_texts(Path(data_dir)), cache / "sst2.pt")
        return
    if name == "mnist5k":
        from ds_lightning.datamodules import MNIST5k

        (images, labels), (test_images, test_labels) = MNIST5k().load()
    else:
        from continual_data import read_jpegs

        everything, truth, is_test = read_jpegs(str(Path(data_dir) / "cifar10_jpeg.npz"))
        images, labels, test_images, test_labels = everything[~is_test], truth[~is_test], everything[is_test], None
        test_labels = truth[is_test]
    # The files are sorted by class. The validation part is the same for all seeds.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    val, train = order[: VALIDATION[name]], order[VALIDATION[name] :]
    splits = {"train": (images[train], labels[train]), "val": (images[val], labels[val])}
    splits["test"] = (test_images, test_labels)
    torch.save({key: (x.permute(0, 2, 3, 1).contiguous(), y) for key, (x, y) in splits.items()}, cache / f"{name}.pt")


def _read_texts(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    from ds_lightning.datamodules.text_reading import read_texts
    from ds_lightning.datamodules.text_vocabulary import Vocabulary, most_common

    read = {key: read_texts(folder / f"sst2_{part}.txt") for key, part in (("val", "dev"), ("test", "test"))}
    read["train"] = read_texts(folder / "sst2_train.txt")
    words = Vocabulary(most_common(read["train"].texts, 10_000, "word", True))
    found = {}
    for key, (texts, labels) in read.items():
        ids = torch.zeros(len(texts), MAX_LENGTH, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            numbers = words.encode(text, MAX_LENGTH)
            row[: len(numbers)] = torch.tensor(numbers)
        found[key] = ids, torch.tensor([int(label) for label in labels or ()])
    return found


@functools.lru_cache(maxsize=4)
def load(name: str, cache: str, part: str, device: str) -> Data:
    """Put a set on the device, once a process.

    Args:
        name: of a set that is prepared.
        cache: the folder of its file.
        part: a key of PARTS, to keep these classes alone; or empty.
        device: `cpu` or `cuda`.
    """
    splits = torch.load(Path(cache) / f"{name}.pt", mmap=True, weights_only=True)
    if part:
        kept = {key: (y >= PARTS[part].start) & (y < PARTS[part].stop) for key, (_, y) in splits.items()}
        splits = {key: (x[kept[key]], y[kept[key]] - PARTS[part].start) for key, (x, y) in splits.items()}
    classes = len(PARTS[part]) if part else CLASSES[name]
    on_device = {key: (x.to(device), y.to(device)) for key, (x, y) in splits.items()}
    if name == "sst2":
        return Data(**on_device, classes=classes, words=1 + max(int(x.max()) for x, _ in splits.values()))
    mean, std = (CIFAR_MEAN, CIFAR_STD) if name == "cifar10" else (MNIST_MEAN, MNIST_STD)
    padding = 4 if name == "cifar10" else 2
    x, y = on_device.pop("train")
    return Data(
        **on_device,
        train=(F.pad(x, (0, 0, padding, padding, padding, padding)), y),
        classes=classes,
        mean=torch.tensor(mean, device=device),
        std=torch.tensor(std, device=device),
        padding=padding,
        mirror=name == "cifar10",  # digits are no digits in the mirror
    )


class ViT(nn.Module):
    """A small vision transformer, with the mean over the patches: images (B, 3, size, size) -> (B, classes)."""

    def __init__(
        self, size: int, classes: int, patch: int = 4, width: int = 192, depth: int = 4, heads: int = 3
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        # Its blocks are copies, which would all start alike.
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.head(self.blocks(tokens).mean(1))
        return out


def without_norms(network: nn.Module) -> nn.Module:
    """Take the norm layers out of a ResNet; biases take their place, and smaller residuals keep the signal's size."""
    blocks = [module for module in network.modules() if isinstance(getattr(module, "body", None), nn.Sequential)]
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                child.bias = nn.Parameter(torch.zeros(child.out_channels))
    for block in blocks:
        last = [layer for layer in block.body if isinstance(layer, nn.Conv2d)][-1]
        with torch.no_grad():
            last.weight.mul_(len(blocks) ** -0.5)
    return network


def build(name: str, data: Data, size: int) -> nn.Module:
    """Return a network with new weights for a set of data, whose images have `size` pixels a side."""
    if name == "resnet50":
        import torchvision

        return torchvision.models.resnet50(num_classes=data.classes)
    if name == "resnet50_narrow":
        from timm.models.resnet import Bottleneck, ResNet

        # A quarter of the width; the last norm of a block begins at one, as torchvision's does.
        return ResNet(Bottleneck, [3, 4, 6, 3], data.classes, channels=(16, 32, 64, 128), zero_init_last=False)
    if name == "vit":
        return ViT(size, data.classes)
    if name == "text":
        from ds_lightning.networks import TextEncoder

        return TextEncoder(data.words, max_length=MAX_LENGTH, num_classes=data.classes)
    from ds_lightning.networks import resnet

    channels = data.train[0].shape[-1]
    depth, _, kind = name.removeprefix("resnet").partition("_")
    network = resnet(int(depth), in_channels=channels, num_classes=data.classes)
    return without_norms(network) if kind == "nonorm" else network


def head_of(network: nn.Module) -> str:
    """Return the name of the last linear layer."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def summary(multipliers: dict[str, float], network: nn.Module) -> dict[str, float]:
    """Return the smallest and largest multiplier, and where layers have names, convolutions' median over the head's."""
    if not multipliers:
        return {}
    found = {"smallest": min(multipliers.values()), "largest": max(multipliers.values())}
    named = {name.removeprefix("network."): value for name, value in multipliers.items()}
    modules = dict(network.named_modules())
    convolutions = [value for name, value in named.items() if isinstance(modules.get(name), nn.Conv2d)]
    if convolutions and head_of(network) in named:
        found["conv_to_head"] = statistics.median(convolutions) / named[head_of(network)]
    return found
