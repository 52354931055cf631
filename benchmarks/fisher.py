"""The diagonal Fisher information: samples a second and memory of each way to compute it.

The limit is the squared gradient of the whole batch, one ordinary backward pass, which is not the Fisher information.
Memory is what a call adds at its peak to network and data, beside one SGD step on the same batch. Prints JSON.

    python benchmarks/fisher.py
    python benchmarks/fisher.py --device cuda
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.functional.fisher import fisher_sums
from ds_lightning.networks import resnet

SAMPLES = {"mlp": 2048, "resnet18": 64}
WAYS = ("loop", "vmap", "layers", "limit", "training_step")
Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--networks", nargs="+", choices=sorted(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--rounds", type=int, default=3, help="turns of all ways; the loop and vmap take part in one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"), help="print the extra memory of one call, bytes")
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be >= 1")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # its rounding alone is 1e-2 of a sum of squares
    if args.one:
        print(peak_memory(*args.one, args.device))
        return
    report = {name: measure(name, args) for name in args.networks}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(json.dumps({"benchmark": "fisher", "device": device, "torch": torch.__version__,
                      "threads": args.threads, "networks": report}, indent=2))  # fmt: skip


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Time every way in turns, compare their numbers, and read each one's memory in a process of its own."""
    calls = {way: call(name, way, args.device) for way in WAYS}
    calls["layers"](), calls["limit"]()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(args.rounds):
        for way in WAYS:
            if index == 0 or way not in ("loop", "vmap"):
                seconds[way].append(run(calls[way], args.device))
    net, batch = build(name, args.device)  # in float64, where a ReLU at zero does not flip by rounding
    net, batch = net.double(), (batch[0][:16].double(), batch[1][:16])
    exact = fisher_sums(net, [batch], loss, method="vmap").sums
    layers = fisher_sums(net, [batch], loss, method="layers").sums
    error = max(float((layers[k] - exact[k]).norm() / exact[k].norm()) for k in exact)
    del exact, layers
    time_of = {way: statistics.median(values) for way, values in seconds.items()}
    memory = {way: int(subprocess.run(
        [sys.executable, __file__, "--device", args.device, "--threads", str(args.threads), "--one", name, way],
        check=True, capture_output=True, text=True).stdout) for way in WAYS}  # fmt: skip
    return {
        "samples": SAMPLES[name],
        "seconds": {way: round(t, 4) for way, t in time_of.items()},
        "samples_per_second": {way: round(SAMPLES[name] / t) for way, t in time_of.items()},
        "speed_over_loop": {way: round(time_of["loop"] / t, 2) for way, t in time_of.items()},
        "memory_mib": {way: round(value / 2**20, 1) for way, value in memory.items()},
        "memory_over_training_step": {way: round(m / memory["training_step"], 2) for way, m in memory.items()},
        "largest_relative_error_of_layers": error,
    }


def build(name: str, device: str) -> tuple[nn.Module, Batch]:
    """Make a network in eval mode and one batch."""
    torch.manual_seed(0)
    if name == "mlp":
        layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        net: nn.Module = nn.Sequential(*layers)
        x = torch.randn(SAMPLES[name], 784)
    else:
        net = resnet(18, small_input=False, num_classes=10)
        x = torch.randn(SAMPLES[name], 3, 64, 64)
    return net.eval().to(device), (x.to(device), torch.randint(10, (len(x),)).to(device))


def loss(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def call(name: str, way: str, device: str, samples: int | None = None) -> Callable[[], object]:
    """Return one call of one way."""
    net, batch = build(name, device)
    batch = (batch[0][:samples], batch[1][:samples])
    if way in ("loop", "vmap", "layers"):
        return functools.partial(fisher_sums, net, [batch], loss, method=way)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        loss(net, batch).mean().backward()
        if way == "limit":
            for p in net.parameters():
                p.grad.square_()
        else:
            optimizer.step()

    return step


def run(function: Callable[[], object], device: str) -> float:
    """Seconds of one call: of the wall, with the device's work; on the CPU of this process alone."""
    if device == "cpu":
        begin = time.process_time()  # other work on the machine does not count
        function()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory(name: str, way: str, device: str) -> int:
    """Bytes that one call adds at its peak, the libraries' own first-use storage left out."""
    call(name, way, device, samples=2)()
    function = call(name, way, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Read one of the kernel's figures on this process's memory, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
