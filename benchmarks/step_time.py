"""Training steps on one batch of images, and their time on the CPU and on a GPU."""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def run(step: Callable[[], None], count: int, device: str) -> float:
    """Seconds for so many steps: of the wall, with the device's work; on the CPU of this process alone."""
    if device == "cpu":
        begin = time.process_time()  # other work on the machine does not count
        for _ in range(count):
            step()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def loss_on_fixed_batch(args: argparse.Namespace) -> Callable[[nn.Module], Tensor]:
    """Return what takes the loss of a network with 10 outputs on one batch of random images, in the precision asked."""
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (args.batch_size,), device=args.device)

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            return nn.functional.cross_entropy(net(x), y)

    return loss
