"""Time of training steps, on the CPU and on a GPU."""

import time
from collections.abc import Callable

import torch


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
