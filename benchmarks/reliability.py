"""What survives: figures about failures, each measured on real processes that are really killed.

Run: OMP_NUM_THREADS=1 python benchmarks/reliability.py outage [--kills 20] [--steps 6000] [--seed 0]

Prints JSON. `outage` kills (SIGKILL) and restarts the tracking server during a fit that logs five metrics at every
step. The server keeps a row as often as it is sent, so a repeated row would be seen; MLflow's own databases would
hide it. The same fit without outages gives the step times to compare with.
"""

import argparse
import json
import logging
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.tracking import MLflowTracker, replay

METRICS = 5
_SERVER = Path(__file__).resolve().parents[1] / "tests" / "tracking" / "stub_server.py"


class Logs(LightningModule):
    """Log five metrics at every step, and keep an independent list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        self.logged: list[tuple[str, float, int]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        for number in range(METRICS):
            value = loss.detach() * number
            self.log(f"train/metric{number}", value)
            self.logged.append((f"train/metric{number}", value.item(), self.global_step))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StepTimes(Callback):
    """Time from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last:
            self.times.append((now - self._last) * 1e3)
        self._last = now


class Server:
    """A tracking server in a process of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.file, self.uri = folder / "rows.jsonl", f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(_SERVER), str(self.port), str(self.file)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def rows(self) -> Counter[tuple[str, float, int]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        rows = [row for line in lines for row in json.loads(line) if row["key"].startswith("train/metric")]
        return Counter((row["key"], float(row["value"]), int(row["step"])) for row in rows)


def fit(folder: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Train once while the server is killed so often; report points and step times."""
    folder.mkdir()
    server = Server(folder)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4096, 256), torch.randint(0, 10, (4096,)))
    module, watch, chance = Logs(), StepTimes(), random.Random(seed)
    stop = threading.Event()
    done = 0

    def outages() -> None:
        nonlocal done
        while done < kills:
            if stop.wait(chance.uniform(0.3, 1.5)):
                return
            server.kill()
            stop.wait(chance.choice([0.1, 0.5, 3.0]))
            server.start()
            done += 1

    tracker = MLflowTracker("x", store=server.uri, system_metrics=False, flush_timeout=20.0)
    killer = threading.Thread(target=outages)
    trainer = Trainer(
        logger=tracker,
        callbacks=[watch],
        max_steps=steps,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert tracker.run_id  # opened while the server is there
    killer.start()
    started = time.perf_counter()
    trainer.fit(module, DataLoader(data, batch_size=128, shuffle=True))
    took = time.perf_counter() - started
    stop.set()
    killer.join()
    left = [result for result in replay(server.uri) if not result.complete]
    arrived, sent = server.rows(), Counter(module.logged)
    server.kill()
    # The first steps warm up the allocator, open the run and hash the data.
    times = sorted(watch.times[20:])
    return {
        "kills": done,
        "steps": steps,
        "fit_seconds": round(took, 1),
        "points_logged": sent.total(),
        "points_arrived": arrived.total(),
        "points_missing": (sent - arrived).total(),
        "points_doubled": (arrived - sent).total(),
        "runs_left_in_spool": len(left),
        "step_ms_median": round(statistics.median(times), 3),
        "step_ms_p99": round(times[int(len(times) * 0.99)], 3),
        "step_ms_p99.9": round(times[int(len(times) * 0.999)], 3),
        "step_ms_slowest": round(times[-1], 3),
    }


def outage(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare a fit with outages to one without."""
    import os

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # the spool of a server's client is in ./mlruns
        result = {
            "without_outages": fit(Path(name, "calm"), 0, arguments.steps, arguments.seed),
            "with_outages": fit(Path(name, "stormy"), arguments.kills, arguments.steps, arguments.seed),
        }
        os.chdir("/")
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    of_outage = commands.add_parser("outage", help="kill and restart the tracking server during a fit")
    of_outage.add_argument("--kills", type=int, default=20)
    of_outage.add_argument("--steps", type=int, default=6000)
    of_outage.add_argument("--seed", type=int, default=0)
    of_outage.set_defaults(run=outage)
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments), indent=2))


if __name__ == "__main__":
    main()
