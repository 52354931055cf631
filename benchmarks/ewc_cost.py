"""What the penalty of ElasticWeightConsolidation adds to a training step.

Both variants take turns in blocks of steps; each has its own copy of the network. Prints JSON.

    python benchmarks/ewc_cost.py --device cpu --model resnet18 --image-size 64 --batch-size 32
    python benchmarks/ewc_cost.py --device cuda --model resnet50 --batch-size 128 --precision bf16 --check-sync
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
import torchvision
from step_time import loss_on_fixed_batch, run
from torch import nn

from ds_lightning.callbacks._consolidated import Consolidated, Names


def main() -> None:
    args = arguments()
    variants = ("plain", "penalty")
    steps = {variant: training_step(variant, args) for variant in variants}
    blocks: dict[str, list[float]] = {variant: [] for variant in variants}
    for variant in variants:  # past compilation and allocation
        run(steps[variant], args.block, args.device)
    for index in range(args.rounds):
        for variant in variants if index % 2 else variants[::-1]:
            blocks[variant].append(1e3 * run(steps[variant], args.block, args.device) / args.block)
    if args.check_sync:
        torch.cuda.set_sync_debug_mode("error")
        steps["penalty"]()
        torch.cuda.set_sync_debug_mode("default")
    ratios = [100 * (b / a - 1) for a, b in zip(blocks["plain"], blocks["penalty"], strict=True)]
    result = {
        "benchmark": "ewc_cost",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": vars(args),
        "ms_per_step": {variant: round(statistics.median(times), 3) for variant, times in blocks.items()},
        "overhead_percent": {
            "median": round(statistics.median(ratios), 2),
            "quartiles": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
        },
        "no_sync_in_step": True if args.check_sync else None,
    }
    print(json.dumps(result, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="resnet18", help="a torchvision model")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--block", type=int, default=10, help="steps of one variant before the other has its turn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--check-sync", action="store_true", help="CUDA: fail on any synchronisation in a step")
    args = parser.parse_args()
    if args.rounds < 2 or args.block < 1:
        parser.error("--rounds must be >= 2 and --block >= 1")
    if args.check_sync and args.device != "cuda":
        parser.error("--check-sync needs --device cuda")
    return args


def training_step(variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """Build a network, its optimizer and one variant of the step on a fixed batch."""
    torch.manual_seed(0)
    net: nn.Module = torchvision.models.get_model(args.model, num_classes=10)
    net = net.to(args.device, memory_format=torch.channels_last)
    fused = {"fused": True} if args.device == "cuda" else {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, **fused)
    names, memory = Names(net, lambda name: True), Consolidated(keeps_start=True)
    if variant == "penalty":
        memory.add({name: torch.rand_like(p) for name, p in net.named_parameters()}, names.selected(), None)
    loss_of = loss_on_fixed_batch(args)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(net).backward()
        if variant == "penalty":
            memory.pull(optimizer, names, 0.01, 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
