"""Time and memory of NT-Xent, forward and backward: ours, lightly's NTXentLoss, and the full matrix in plain torch.

Times are medians of interleaved runs in one process; the peak memory beyond the inputs comes from a fresh process for
each. Errors are relative to the full matrix in float64. lightly is optional: `pip install --no-deps lightly
lightly-utils`.

Prints JSON. Run: `OMP_NUM_THREADS=1 python benchmarks/contrastive_loss.py`, or on a GPU
`python benchmarks/contrastive_loss.py --device cuda --dtype bfloat16 --sizes 1024 8192`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lightning.functional.contrastive import nt_xent

Loss = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.1


def full_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2002.05709, as it is written everywhere."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(first)))


def ours(first: Tensor, second: Tensor) -> Tensor:
    return nt_xent(first, second, TEMPERATURE)


def losses(names: list[str]) -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": ours, "full_matrix": full_matrix}
    if "lightly" in names:
        from lightly.loss import NTXentLoss

        found["lightly"] = NTXentLoss(temperature=TEMPERATURE)
    return {name: found[name] for name in names}


def inputs(size: int, options: argparse.Namespace, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(size, options.width, generator=generator)
    # Views that are alike, as after some training.
    second = first + torch.randn(size, options.width, generator=generator)
    dtype = dtype or getattr(torch, options.dtype)
    # Rounded to the type first, so that all see the same numbers.
    rounded = (x.to(getattr(torch, options.dtype)).to(options.device, dtype) for x in (first, second))
    first, second = (x.requires_grad_() for x in rounded)
    return first, second


def both_ways(loss: Loss, first: Tensor, second: Tensor) -> Tensor:
    first.grad = second.grad = None
    value = loss(first, second)
    value.backward()
    return value


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(name: str, size: int, options: argparse.Namespace) -> float:
    """Return the most memory beyond what there was before; in this process, which should be a fresh one."""
    (loss,) = losses([name]).values()
    # What the first call of each kernel loads and sets up is no part of the loss.
    both_ways(loss, *inputs(8, options))
    first, second = inputs(size, options)
    if options.device == "cuda":
        wait("cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_ways(loss, first, second)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident_kib("VmRSS")
    # Or the peak of the imports would count.
    Path("/proc/self/clear_refs").write_text("5")
    both_ways(loss, first, second)
    return (resident_kib("VmHWM") - before) / 2**10


def resident_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def seconds(found: dict[str, Loss], first: Tensor, second: Tensor, options: argparse.Namespace) -> dict[str, float]:
    runs: dict[str, list[float]] = {name: [] for name in found}
    for loss in found.values():
        both_ways(loss, first, second)
    start = time.perf_counter()
    while len(runs["ours"]) < options.most_runs and (
        len(runs["ours"]) < options.least_runs or time.perf_counter() - start < options.seconds
    ):
        for name, loss in found.items():
            wait(options.device)
            begin = time.perf_counter()
            both_ways(loss, first, second)
            wait(options.device)
            runs[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in runs.items()}


def errors(loss: Loss, size: int, options: argparse.Namespace) -> dict[str, float]:
    exact_inputs = inputs(size, options, torch.float64)
    exact = both_ways(full_matrix, *exact_inputs)
    given = inputs(size, options)
    value = both_ways(loss, *given)
    truth, found = (torch.cat([x.grad for x in pair]).double() for pair in (exact_inputs, given))
    return {
        "loss_error": float(f"{abs(value.double() / exact - 1).item():.2g}"),
        "gradient_error": float(f"{((found - truth).norm() / truth.norm()).item():.2g}"),
    }


def measured(size: int, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    found = losses(names)
    times = seconds(found, *inputs(size, options), options)
    rows: dict[str, Any] = {}
    for name, loss in found.items():
        words = [sys.executable, __file__, "--peak-of", name, "--sizes", str(size), "--width", str(options.width)]
        words += ["--device", options.device, "--dtype", options.dtype]
        peak = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        rows[name] = {"ms": round(1e3 * times[name], 3), "peak_mib": round(peak, 1)}
        # The exact one needs several times 32 n^2 bytes.
        if size <= 1024 or options.device == "cuda":
            rows[name] |= errors(loss, size, options)
    for name in names[1:]:
        rows[f"ours_against_{name}"] = {
            "times_as_fast": round(times[name] / times["ours"], 2),
            "memory_divided_by": round(rows[name]["peak_mib"] / max(rows["ours"]["peak_mib"], 0.1), 1),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="samples: two views of each")
    parser.add_argument("--width", type=int, default=128, help="of the embeddings")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--seconds", type=float, default=10.0, help="a size, of all losses together")
    parser.add_argument("--least-runs", type=int, default=5)
    parser.add_argument("--most-runs", type=int, default=200)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(peak_mib(options.peak_of, options.sizes[0], options))
        return
    names = ["ours", "full_matrix"]
    if importlib.util.find_spec("lightly") is not None:
        names.append("lightly")
    else:
        print("lightly is left out: `pip install --no-deps lightly lightly-utils`", file=sys.stderr)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "lightly": importlib.metadata.version("lightly") if "lightly" in names else None,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread",
        "dtype": options.dtype,
        "width": options.width,
    }
    for size in options.sizes:
        result[f"n={size}"] = measured(size, names, options)
        print(f"n={size}: {json.dumps(result[f'n={size}'])}", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
