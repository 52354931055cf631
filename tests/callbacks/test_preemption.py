import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from ds_lightning.callbacks.preemption import Preemption
from ds_lightning.errors import Preempted

ROOT = Path(__file__).parents[2]


class Counting(LightningModule):
    """Each batch's content depends on how many there were: a batch left out or done twice changes the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def setup(self, stage: str) -> None:
        with torch.no_grad():
            self.layer.weight.fill_(0.5)
            self.layer.bias.zero_()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen += 1
        x = torch.stack([self.seen.sin(), self.seen.cos()])
        loss = (self.layer(x) - 1).square().sum()
        self.log("train/loss", loss)
        self.log("train/seen", self.seen.float())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/weight", self.layer.weight.sum())
        self.log("val/batches", 1.0, reduce_fx="sum")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.05)


class Rows(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int | None, float]] = []
        self.status = ""

    name = version = "rows"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(name, step, value) for name, value in metrics.items() if name != "epoch"]

    def finalize(self, status: str) -> None:
        self.status = status


class Kill(Callback):
    """Send this process a signal at one place."""

    def __init__(self, hook: str, at: int, number: int = signal.SIGTERM) -> None:
        self.hook, self.at, self.number, self.calls = hook, at, number, 0

    def _count(self, hook: str) -> None:
        if hook == self.hook:
            if self.calls == self.at:
                os.kill(os.getpid(), self.number)
            self.calls += 1

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._count("optimizer")

    def on_train_batch_start(self, *args: Any) -> None:
        self._count("train")

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._count("validation")


def fit(
    folder: Path, options: dict[str, Any], *callbacks: Callback, resume: bool = False
) -> tuple[Counting, Rows, Trainer]:
    model, rows = Counting(), Rows()
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=rows,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    data = DataLoader(torch.zeros(4))
    try:
        trainer.fit(model, data, DataLoader(torch.zeros(3)), ckpt_path=folder / "preempted.ckpt" if resume else None)
    except Preempted as stop:
        rows.code = stop.code  # type: ignore[attr-defined]
    return model, rows, trainer


PLACES = [("train", n) for n in (0, 1, 3, 4, 6, 11)] + [("optimizer", 2)] + [("validation", n) for n in (0, 2, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 2},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 2},
        {"max_steps": 10},
    ],
    ids=str,
)
def test_a_signal_anywhere_costs_no_step_no_metric_and_no_validation(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, expected, _ = fit(tmp_path, options)
    before = signal.getsignal(signal.SIGTERM)
    for hook, at in PLACES:
        kill = Kill(hook, at)
        _, first, _ = fit(tmp_path, options, kill, Preemption(str(tmp_path)))
        if kill.calls <= at:
            assert first.rows == expected.rows, "no such place: nothing was sent"
            continue
        assert first.code == 143, (hook, at)  # type: ignore[attr-defined]
        assert first.status == "failed"
        assert signal.getsignal(signal.SIGTERM) is before
        assert torch.load(tmp_path / "preempted.ckpt", weights_only=True)["global_step"] > 0
        assert not list(tmp_path.glob("*.part"))
        again, second, trainer = fit(tmp_path, options, Preemption(str(tmp_path)), resume=True)
        assert first.rows + second.rows == expected.rows, (hook, at)
        assert trainer.state.finished
        assert torch.equal(again.layer.weight, whole.layer.weight), (hook, at)


def test_ctrl_c_ends_with_130_and_the_second_one_stops_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    _, rows, _ = fit(tmp_path, {}, Kill("train", 2, signal.SIGINT), Preemption(str(tmp_path)))
    assert rows.code == 130  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is before
    (tmp_path / "preempted.ckpt").unlink()
    twice = [Kill("train", 2, signal.SIGINT), Kill("train", 2, signal.SIGINT)]
    try:
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path, {}, *twice, Preemption(str(tmp_path)))
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert stop.value.code == 1, "Lightning's way of passing on KeyboardInterrupt"
    assert not (tmp_path / "preempted.ckpt").exists()


def test_slurms_signal_keeps_its_handler(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(signal.getsignal(signal.SIGUSR1))

    def mine(*args: Any) -> None: ...

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        fit(tmp_path, {}, Look(), Preemption(str(tmp_path)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert set(seen) == {mine}


def test_outside_the_main_thread_it_says_so_and_trains(tmp_path: Path) -> None:
    ends: list[Any] = []

    def work() -> None:
        with pytest.warns(RuntimeWarning, match="acts on no signal here: Python lets only the main thread"):
            ends.append(fit(tmp_path, {}, Preemption(str(tmp_path)))[2].global_step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ends == [12]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "TERM", "15"])
def test_a_signal_that_nobody_can_handle_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"signals has '{name}'; expected names of signals such as SIGTERM"):
        Preemption(signals=[name])


SCRIPT = """
import os, signal, sys, time
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from ds_lightning.callbacks import Preemption

class Kill(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 3 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, module, error):
        if trainer.world_size > 1 and trainer.global_rank == 0:
            time.sleep(6)  # as a slow logger would; Lightning looks every 5 s for ranks that have ended
        open(f"rank{trainer.global_rank}", "w").write(f"{type(error).__name__} {trainer.global_step}")

trainer = L.Trainer(
    max_epochs=2, accelerator="cpu", devices=int(sys.argv[1]), strategy=sys.argv[2], logger=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[Kill(), Preemption()],
)
trainer.fit(BoringModel())
print("never reached")
"""


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (2, "ddp")])
def test_a_plain_script_ends_with_143_and_one_ranks_signal_stops_all(tmp_path: Path, ranks: int, strategy: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", str(ranks), strategy],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 143, done.stderr
    assert "never reached" not in done.stdout
    assert "Traceback" not in done.stderr
    assert [(tmp_path / f"rank{n}").read_text() for n in range(ranks)] == ["Preempted 4"] * ranks
    assert torch.load(tmp_path / "checkpoints" / "preempted.ckpt", weights_only=True)["global_step"] == 4
