"""How fast two views of a batch are made: all samples at once, and one by one with torchvision and albumentations.

Run: OMP_NUM_THREADS=1 python benchmarks/view_speed.py [--device cpu] [--batch-size 256] [--rounds 7] [--blur 0]

All make SimCLR's views for small images (crop, mirror image, colour jitter at strength 0.5, grey) of the same uint8
images, as float32 from 0 to 1. torchvision's v2 transforms run on each sample by itself, as in a data set, on uint8
until the end (`torchvision`) or on floats (`torchvision_float`, whose formulas are ours). The rivals take turns; the
figure is images a second, each with two views, the median of the rounds. Prints JSON. On a GPU only ours runs there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import albumentations as A
import torch
from torch import Tensor
from torchvision.transforms import v2

from ds_lightning.datamodules.view_transforms import BatchViews

Views = Callable[[], tuple[Tensor, Tensor]]
SHAPES = ((3, 32, 32), (1, 28, 28))


def batched(image: Tensor, blur: float) -> Views:
    views, seed = BatchViews(blur=blur), iter(range(10**9))
    return lambda: views.pair(image, next(seed))


def one_by_one(image: Tensor, blur: float, as_float: bool) -> Views:
    size = tuple(image.shape[-2:])
    to_float = v2.ToDtype(torch.float32, scale=True)
    kernel = 2 * max(1, min(size) // 20) + 1
    steps = [
        v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        *([v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur)] if blur else []),
    ]
    view = v2.Compose([to_float, *steps] if as_float else [*steps, to_float])

    def both() -> tuple[Tensor, Tensor]:
        first, second = (torch.stack([view(sample) for sample in image]) for _ in range(2))
        return first, second

    return both


def by_albumentations(image: Tensor, blur: float) -> Views:
    size = tuple(image.shape[-2:])
    colors = [A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8), A.ToGray(p=0.2)]
    if image.shape[1] == 1:
        colors = [A.RandomBrightnessContrast(0.4, 0.4, p=0.8)]
    kernel = 2 * max(1, min(size) // 20) + 1
    smooth = [A.GaussianBlur((kernel, kernel), (0.1, 2.0), p=blur)] if blur else []
    view = A.Compose([A.RandomResizedCrop(size, scale=(0.2, 1.0)), A.HorizontalFlip(p=0.5), *colors, *smooth])
    samples = [sample.permute(1, 2, 0).contiguous().numpy() for sample in image]

    def one() -> Tensor:
        made = [torch.from_numpy(view(image=sample)["image"]) for sample in samples]
        return torch.stack(made).permute(0, 3, 1, 2).to(torch.float32).div_(255).contiguous()

    return lambda: (one(), one())


def seconds(views: Views, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    views()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, object]:
    image = torch.randint(256, (args.batch_size, *shape), dtype=torch.uint8)
    rivals = {
        "ours": batched(image.to(args.device), args.blur),
        "torchvision": one_by_one(image, args.blur, as_float=False),
        "torchvision_float": one_by_one(image, args.blur, as_float=True),
        "albumentations": by_albumentations(image, args.blur),
    }
    for views in rivals.values():
        views()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(args.rounds):
        for name, views in rivals.items():
            times[name].append(seconds(views, args.device if name == "ours" else "cpu"))
    median = {name: statistics.median(found) for name, found in times.items()}
    return {
        "images_per_second": {name: round(args.batch_size / taken) for name, taken in median.items()},
        "ms_per_batch": {name: round(1e3 * taken, 2) for name, taken in median.items()},
        "times_faster": {name: round(taken / median["ours"], 1) for name, taken in median.items() if name != "ours"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blur", type=float, default=0.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "benchmark": "view_speed",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": vars(args),
        "shapes": {"x".join(map(str, shape)): measure(shape, args) for shape in SHAPES},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
