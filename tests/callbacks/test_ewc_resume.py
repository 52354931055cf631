"""A real death in the third task, and two ranks that equal one."""

import multiprocessing
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from ewc_cases import Stranger, Stream, loader, params, task, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import ElasticWeightConsolidation, ExactResume

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|num_workers|litlogger|no step of this fit|val|fork|rank).*"
)


class Dies(pl.Callback):
    """Waits to be killed inside the third task, when its second step is saved."""

    def __init__(self, root, at):
        self.root, self.at = root, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            (self.root / "waiting").touch()
            time.sleep(600)


def main(root, at, resume):
    ewc = ElasticWeightConsolidation()
    saves = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
    pl.seed_everything(9 if resume else 1, verbose=False)
    model = Stranger(make=torch.optim.Adam, rate=0.01)
    run = trainer(ewc, ExactResume(), saves, Dies(root, at), epochs=6, reload_dataloaders_every_n_epochs=1)
    run.fit(model, Stream(), ckpt_path=resume, weights_only=True if resume else None)
    torch.save({"weights": params(model), "ewc": ewc.state_dict()}, root / "end.pt")


def test_killed_in_the_third_task_it_ends_bit_equal(tmp_path):
    at = 29  # steps 24 to 35 are the third task's
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    context = multiprocessing.get_context("fork")  # needs no new import of Lightning
    processes = {}
    for root, stop in ((whole, -1), (killed, at)):
        root.mkdir()
        processes[root] = context.Process(target=main, args=(root, stop, None))
        processes[root].start()
    while not (killed / "waiting").exists():
        assert processes[killed].is_alive()
        time.sleep(0.05)
    processes[killed].kill()
    for process in processes.values():
        process.join(200)
    assert [process.exitcode for process in processes.values()] == [0, -signal.SIGKILL]
    assert not (killed / "end.pt").exists()
    again = context.Process(target=main, args=(killed, -1, killed / f"step={at}.ckpt"))
    again.start()
    again.join(200)
    assert again.exitcode == 0
    ours, theirs = (torch.load(root / "end.pt", weights_only=True) for root in (killed, whole))
    assert ours["ewc"]["tasks"] == theirs["ewc"]["tasks"] == 3
    assert cases_equal(ours, theirs)


def cases_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(cases_equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Keeps(pl.Callback):
    """What each rank ends with."""

    def __init__(self, root, ewc):
        self.root, self.ewc, self.logged = root, ewc, {}

    def on_fit_end(self, trainer, pl_module):
        state = {"weights": params(pl_module), "ewc": self.ewc.state_dict()}
        torch.save(state, self.root / f"{trainer.world_size}-{trainer.global_rank}.pt")


class Still(Stranger):
    """Moves by a fixed amount, so that ranks and one process have the same path."""

    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx) + self.head.weight.sum() + self.body[0].weight.sum()


def test_two_ranks_equal_one(tmp_path):
    for ranks in (1, 2):
        ewc, model = ElasticWeightConsolidation(), Still(rate=0.001)
        options = {"strategy": "ddp_fork", "devices": 2} if ranks == 2 else {}
        # The same number of steps: 3 of 16, or 3 of 8 on each of two.
        stream = Sized(47, 16 // ranks)
        pl.seed_everything(1, verbose=False)
        trainer(ewc, Keeps(tmp_path, ewc), epochs=2, max_steps=6, **options).fit(model, stream)
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert one["ewc"]["tasks"] == two[0]["ewc"]["tasks"] == 2
    assert cases_equal(*two)
    for group in ("importance", "anchor", "start"):
        for name, value in one["ewc"][group].items():
            torch.testing.assert_close(two[0]["ewc"][group][name], value, rtol=1e-4, atol=1e-6)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], value)


class Sized(Stream):
    """Two tasks of an odd number of samples."""

    def __init__(self, samples, batch_size):
        super().__init__(tasks=2, epochs_per_task=1, batch_size=batch_size)
        self.samples = samples

    def task_dataloader(self, number, split):
        return DataLoader(TensorDataset(*task(number, samples=self.samples)), batch_size=16)

    def train_dataloader(self):
        return loader(0, self.batch_size)
