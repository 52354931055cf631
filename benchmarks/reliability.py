"""What survives: figures about failures, each measured on real processes that are really killed.

Run: OMP_NUM_THREADS=1 python benchmarks/reliability.py outage [--kills 20] [--steps 6000] [--seed 0]
     python benchmarks/reliability.py corpus [--only images/] [--seed 0]

Prints JSON. `corpus` is described in docs/errors.md.

`outage` kills (SIGKILL) and restarts the tracking server during a fit that logs five metrics at every step. The server
keeps a row as often as it is sent, so a repeated row would be seen; MLflow's own databases would
hide it. The same fit without outages gives the step times to compare with.

How times are taken. Starting 20 Python servers takes CPU that a real server would take on another machine, and other
jobs may be on this one too. So the servers run at the lowest priority, and each time is given twice: as the clock
says (`step_ms`), and without the time in which the training thread could run and the kernel ran something else on
its CPU (`own_step_ms`; run delay, the second number in /proc/thread-self/schedstat, so Linux only). Whatever training
itself waits for is in both: locks, the GIL, pipes, fsync and other I/O are sleep, not run delay. `waits_ms` is that
sleep alone (own time less CPU time): most in a step, and in all. `slowest_log_metrics_ms` is the longest call of the
logger in the training thread. `loop_seconds` is the sum of the steps; `end_seconds` is what comes after the last one,
where the logger waits until the server has everything.
"""

import argparse
import json
import logging
import os
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.tracking import MLflowTracker, replay

METRICS = 5
Times = tuple[float, float, float]
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


class Clock:
    """Time of this thread in ms: by the clock, without what the kernel gave to others, and asleep."""

    def __init__(self) -> None:
        self._schedule = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def now(self) -> Times:
        delay = int(os.pread(self._schedule, 100, 0).split()[1])
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        return wall / 1e6, (wall - delay) / 1e6, (wall - delay - cpu) / 1e6


class StepTimes(Callback):
    """Time from the end of a step to the end of the next, and of each call of the logger."""

    def __init__(self) -> None:
        self.steps: list[Times] = []
        self.logged: list[Times] = []
        self.ended = 0.0
        self._last: Times | None = None

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._clock, logger = Clock(), trainer.logger
        assert logger is not None
        log_metrics = logger.log_metrics

        def timed(*arguments: Any, **named: Any) -> None:
            before = self._clock.now()
            log_metrics(*arguments, **named)
            self.logged.append(difference(before, self._clock.now()))

        logger.log_metrics = timed  # type: ignore[method-assign]

    def on_train_batch_end(self, *_: Any) -> None:
        now = self._clock.now()
        if self._last is not None:
            self.steps.append(difference(self._last, now))
        self._last, self.ended = now, time.perf_counter()


def difference(before: Times, after: Times) -> Times:
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


def spread(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    median = statistics.median(ordered)
    found = {"median": median, "p99": ordered[int(len(ordered) * 0.99)], "p99.9": ordered[int(len(ordered) * 0.999)]}
    return {name: round(x, 3) for name, x in {**found, "slowest": ordered[-1], "ratio": ordered[-1] / median}.items()}


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
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
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
        # After the last step the server stays: how long the rest takes is compared, too.
        callbacks=[watch, LambdaCallback(on_train_end=lambda *_: stop.set())],
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
    ended = time.perf_counter()
    stop.set()
    killer.join()
    left = [result for result in replay(server.uri) if not result.complete]
    arrived, sent = server.rows(), Counter(module.logged)
    server.kill()
    # The first steps warm up the allocator, open the run and hash the data.
    walls, owns, waits = zip(*watch.steps[20:], strict=True)
    calls, own_calls, _ = zip(*watch.logged[20:], strict=True)
    return {
        "kills": done,
        "steps": steps,
        "fit_seconds": round(ended - started, 1),
        "loop_seconds": round(sum(walls) / 1e3, 1),
        "own_loop_seconds": round(sum(owns) / 1e3, 1),
        "end_seconds": round(ended - watch.ended, 1),
        "points_logged": sent.total(),
        "points_arrived": arrived.total(),
        "points_missing": (sent - arrived).total(),
        "points_doubled": (arrived - sent).total(),
        "runs_left_in_spool": len(left),
        "step_ms": spread(walls),
        "own_step_ms": spread(owns),
        "waits_ms": {"most": round(max(waits), 3), "all": round(sum(waits), 1)},
        "slowest_log_metrics_ms": round(max(calls), 3),
        "slowest_own_log_metrics_ms": round(max(own_calls), 3),
    }


def outage(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare a fit with outages to one without."""
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


def bad_inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Try every input of the corpus; see benchmarks/bad_inputs."""
    from bad_inputs import Place, corpus

    warnings.simplefilter("ignore")
    cases = [case for case in corpus(arguments.seed) if case.name.startswith(arguments.only)]
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        outcomes = [(case, place.run(case)) for case in cases]
    doors: dict[str, dict[str, Any]] = {}
    for case, outcome in outcomes:
        door = doors.setdefault(case.door, {"bad_inputs": 0, "unusual_inputs": 0, "wrong": 0, "slowest_seconds": 0.0})
        door["unusual_inputs" if case.fine else "bad_inputs"] += 1
        door["wrong"] += bool(outcome.wrong)
        door["slowest_seconds"] = max(door["slowest_seconds"], outcome.seconds)
    wrong = {outcome.name: [*outcome.wrong, outcome.message] for _, outcome in outcomes if outcome.wrong}
    return {"inputs": len(outcomes), "doors": doors, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    of_outage = commands.add_parser("outage", help="kill and restart the tracking server during a fit")
    of_outage.add_argument("--kills", type=int, default=20)
    of_outage.add_argument("--steps", type=int, default=6000)
    of_outage.add_argument("--seed", type=int, default=0)
    of_outage.set_defaults(run=outage)
    of_corpus = commands.add_parser("corpus", help="give bad inputs to every command")
    of_corpus.add_argument("--only", default="", help="names that start so, such as images/")
    of_corpus.add_argument("--seed", type=int, default=0)
    of_corpus.set_defaults(run=bad_inputs)
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments), indent=2))


if __name__ == "__main__":
    main()
