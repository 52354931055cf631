"""What DynamicLayerLR adds to a training step, beside one parameter group a layer as the peer.

Variants take turns in blocks of steps; each has its own copy of the network. Prints JSON.

    python benchmarks/layer_lr_cost.py --device cpu --model small --batch-size 32
    python benchmarks/layer_lr_cost.py --device cuda --model resnet50 --image-size 224 --batch-size 256 \
        --precision bf16 --check-sync
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from step_time import loss_on_fixed_batch, run
from torch import nn
from torch.optim import Optimizer

from ds_lightning.callbacks._layers import find_layers
from ds_lightning.callbacks._scaled_steps import ScaledSteps, VarianceRule

MODELS = {"resnet50": torchvision.models.resnet50, "small": torchvision.models.resnet18}
VARIANTS = ("plain", "statistics", "callback", "groups")


def main() -> None:
    args = arguments()
    steps = {variant: training_step(variant, args) for variant in VARIANTS}
    blocks: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:  # past compilation, allocation and the rule's first readings
        run(steps[variant], args.every * 3 + 1, args.device)
    for index in range(args.rounds):
        order = VARIANTS[index % len(VARIANTS) :] + VARIANTS[: index % len(VARIANTS)]
        for variant in order:
            blocks[variant].append(1e3 * run(steps[variant], args.block, args.device) / args.block)
    no_sync = check_sync(steps["callback"], args) if args.check_sync else None
    ratios = {
        variant: [a / b for a, b in zip(blocks[variant], blocks["plain"], strict=True)] for variant in VARIANTS[1:]
    }
    print(
        json.dumps(
            {
                "benchmark": "layer_lr_cost",
                "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "settings": vars(args),
                "ms_per_step": {variant: round(statistics.median(blocks[variant]), 3) for variant in VARIANTS},
                "overhead_percent": {
                    variant: {
                        "median": round(100 * (statistics.median(values) - 1), 2),
                        "quartiles": [round(100 * (q - 1), 2) for q in statistics.quantiles(values, n=4)[::2]],
                    }
                    for variant, values in ratios.items()
                },
                "no_sync_in_steps": no_sync,
            },
            indent=2,
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=sorted(MODELS), default="small", help="small: ResNet-18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--rule", choices=["variance", "trust"], default="variance", help="trust: as with SGD")
    parser.add_argument("--every", type=int, default=10, help="steps between two readings")
    parser.add_argument("--block", type=int, default=10, help="steps of one variant before the next has its turn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--check-sync", action="store_true", help="CUDA: fail on any synchronisation in a step")
    args = parser.parse_args()
    if args.rounds < 2 or args.block < 1 or args.every < 1:
        parser.error("--rounds must be >= 2, --block and --every >= 1")
    if args.check_sync and args.device != "cuda":
        parser.error("--check-sync needs --device cuda")
    return args


def training_step(variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """Build a network, its optimizer and one variant of the step on a fixed batch."""
    torch.manual_seed(0)
    net: nn.Module = MODELS[args.model](num_classes=10).to(args.device, memory_format=torch.channels_last)
    layers = find_layers(net, net.parameters())
    groups: list[dict[str, object]] = [{"params": list(net.parameters())}]
    if variant == "groups":
        layered = {id(tensor) for layer in layers for tensor in layer.tensors}
        rest = [p for p in net.parameters() if id(p) not in layered]
        groups = [{"params": list(layer.tensors), "lr": 1e-4 * (1 + i % 2)} for i, layer in enumerate(layers)]
        groups.append({"params": rest})
    fused = {"fused": True} if args.device == "cuda" else {}
    optimizer: Optimizer = (
        torch.optim.AdamW(groups, lr=1e-4, **fused)
        if args.optimizer == "adamw"
        else torch.optim.SGD(groups, lr=1e-4, momentum=0.9, weight_decay=5e-4, **fused)
    )
    if variant in ("statistics", "callback"):
        # With bounds of 1 every multiplier is exactly 1: readings, and no scaling.
        bounds = (0.4, 2.3) if variant == "callback" else (1.0, 1.0)
        trust = {"name": "trust", "trust": 1.0, "reference": "start"} if args.rule == "trust" else {}
        rule = VarianceRule(0.5, bounds, args.every, 0.95, 0, **trust)
        ScaledSteps(optimizer, partial(find_layers, net), rule)
    loss_of = loss_on_fixed_batch(args)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()

    return step


def check_sync(step: Callable[[], None], args: argparse.Namespace) -> bool:
    """Take steps over two readings with synchronisation as an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * args.every + 1):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


if __name__ == "__main__":
    main()
