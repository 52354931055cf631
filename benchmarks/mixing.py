"""MixUp and CutMix against torchvision's and timm's: images a second and extra peak memory, as JSON.

    python benchmarks/mixing.py                      # CPU, one thread, 256 x 3 x 224 x 224
    python benchmarks/mixing.py --device cuda --rounds 50

Every round runs all cases one after another; a ratio is the median over the rounds of the ratio in one round.
On the CPU each case has its memory measured in a process of its own: the peak of the resident set, less what it was
before the call.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from ds_lightning.datamodules import BatchMixer
from ds_lightning.functional import cutmix, mixup

CLASSES = 1000
CALLS_IN_FLIGHT = 10  # on a GPU, where the host should run ahead
PEERS = {"mixup": ("torchvision_mixup", "timm_mixup"), "cutmix": ("torchvision_cutmix", "timm_cutmix")}


def make_cases(image: torch.Tensor, label: torch.Tensor) -> dict[str, Callable[[], object]]:
    from torchvision.transforms import v2

    batch, device = image.shape[0], image.device
    generator = torch.Generator().manual_seed(0)
    lam = torch.rand(batch, generator=generator).to(device)
    index = torch.randperm(batch, generator=generator).to(device)
    pair = {"image": image, "label": label}
    mixers = {"mixup": BatchMixer(mixup_alpha=1.0), "cutmix": BatchMixer(cutmix_alpha=1.0)}
    peers = {"mixup": v2.MixUp(num_classes=CLASSES), "cutmix": v2.CutMix(num_classes=CLASSES)}
    cases: dict[str, Callable[[], object]] = {
        "mixup": lambda: mixup(image, lam, index),
        "mixup_inplace": lambda: mixup(image, lam, index, inplace=True),
        "mixup_datamodule": lambda: mixers["mixup"](pair, inplace=True),
        "torchvision_mixup": lambda: peers["mixup"](image, label),
        "cutmix": lambda: cutmix(image, lam, index),
        "cutmix_inplace": lambda: cutmix(image, lam, index, inplace=True),
        "cutmix_datamodule": lambda: mixers["cutmix"](pair, inplace=True),
        "torchvision_cutmix": lambda: peers["cutmix"](image, label),
    }
    try:
        from timm.data import Mixup
    except ImportError:
        return cases
    options = {"label_smoothing": 0.0, "num_classes": CLASSES}
    by_batch = {
        "mixup": Mixup(mixup_alpha=1.0, cutmix_alpha=0.0, **options),
        "cutmix": Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, **options),
    }
    by_sample = {
        "mixup": Mixup(mixup_alpha=1.0, cutmix_alpha=0.0, mode="elem", **options),
        "cutmix": Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem", **options),
    }
    # timm's one-hot labels are made on the GPU unless told otherwise, and it writes into its input.
    if device.type == "cuda":
        return cases | {f"timm_{name}": lambda name=name: by_batch[name](image, label) for name in by_batch}
    for kind, made in (("timm", by_batch), ("timm_elem", by_sample)):
        for name, peer in made.items():
            cases[f"{kind}_{name}"] = lambda peer=peer: peer(image, label)
    return cases


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS_IN_FLIGHT):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / CALLS_IN_FLIGHT
    begin = time.perf_counter()
    result = function()
    spent = time.perf_counter() - begin
    del result
    return spent


def extra_memory(arguments: argparse.Namespace, name: str) -> float:
    """MiB over the batch itself at the highest point of one call."""
    if arguments.device == "cuda":
        image, label = make_batch(arguments)
        case = make_cases(image, label)[name]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = case()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--memory-of", name, "--size", *map(str, arguments.size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(arguments: argparse.Namespace) -> None:
    small = argparse.Namespace(size=[4, *arguments.size[1:2], 32, 32], device="cpu")
    make_cases(*make_batch(small))[arguments.memory_of]()  # loads what the first call loads
    image, label = make_batch(arguments)
    case = make_cases(image, label)[arguments.memory_of]
    before = resident_peak()
    result = case()
    after = resident_peak()
    del result
    print((after - before) / 1024)


def resident_peak() -> int:
    """KiB. Linux only; `ru_maxrss` would start at the parent's peak, which exec passes on."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def make_batch(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(*arguments.size, device=arguments.device)
    return image, torch.randint(CLASSES, (arguments.size[0],), device=arguments.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=4, default=[256, 3, 224, 224], metavar=("B", "C", "H", "W"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        return print_memory(arguments)

    device = torch.device(arguments.device)
    cases = make_cases(*make_batch(arguments))
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(2):
        for case in cases.values():
            seconds(case, device)
    for _ in range(arguments.rounds):
        for name, case in cases.items():
            times[name].append(seconds(case, device))

    batch = arguments.size[0]
    report = {
        name: {
            "images_per_second": round(batch / statistics.median(spent)),
            "milliseconds": round(1000 * statistics.median(spent), 3),
            "extra_memory_mib": round(extra_memory(arguments, name), 1),
        }
        for name, spent in times.items()
    }
    ratios = {
        f"{ours}/{peer}": round(statistics.median(b / a for a, b in zip(times[ours], times[peer], strict=True)), 2)
        for kind, peers in PEERS.items()
        for ours in (kind, f"{kind}_inplace", f"{kind}_datamodule")
        for peer in peers
        if peer in times
    }
    setting = {
        "size": arguments.size,
        "batch_mib": round(4 * torch.Size(arguments.size).numel() / 2**20, 1),
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
    }
    print(json.dumps({"setting": setting, "cases": report, "speed_ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
