"""What a durable checkpoint costs beside Lightning's own: time to save and load, and memory while saving.

Run: OMP_NUM_THREADS=1 python benchmarks/checkpoints.py [--folder FOLDER] [--mebibytes 1 100] [--rounds 7]

The writers take turns; medians. The folder should be on the disk that checkpoints go to. Prints JSON.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ds_lightning.checkpoints import DurableCheckpointIO

WRITERS = {"lightning": TorchCheckpointIO(), "durable": DurableCheckpointIO(keep_previous=True)}


def checkpoint(mebibytes: int) -> dict[str, Any]:
    return {"global_step": 1, "state_dict": {f"w{i}": torch.randn(mebibytes * 2**20 // 40) for i in range(10)}}


def seconds(mebibytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    state = checkpoint(mebibytes)
    saves: dict[str, list[float]] = {name: [] for name in WRITERS}
    loads: dict[str, list[float]] = {name: [] for name in WRITERS}
    for _ in range(rounds):
        for name, writer in WRITERS.items():
            start = time.perf_counter()
            writer.save_checkpoint(state, folder / f"{name}.ckpt")
            saved = time.perf_counter()
            writer.load_checkpoint(folder / f"{name}.ckpt")
            saves[name].append(saved - start)
            loads[name].append(time.perf_counter() - saved)
    return {
        "save_ms": {name: round(1e3 * statistics.median(times), 1) for name, times in saves.items()},
        "load_ms": {name: round(1e3 * statistics.median(times), 1) for name, times in loads.items()},
    }


def extra_mebibytes(writer: CheckpointIO, mebibytes: int, folder: Path) -> float:
    """Return how much the resident memory of a new process grows at most while it saves."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        state = checkpoint(mebibytes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        writer.save_checkpoint(state, folder / "memory.ckpt")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(tell, str(grown / 1024).encode())
        os._exit(0)
    os.close(tell)
    os.waitpid(child, 0)
    with os.fdopen(told) as said:
        return round(float(said.read()), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=".", help="where to write (default: here)")
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        memory = {
            f"{size} MiB": {name: extra_mebibytes(writer, size, folder) for name, writer in WRITERS.items()}
            for size in args.mebibytes
        }
        times = {f"{size} MiB": seconds(size, args.rounds, folder) for size in args.mebibytes}
    print(json.dumps({"extra_memory_mib": memory, "times": times}))


if __name__ == "__main__":
    main()
