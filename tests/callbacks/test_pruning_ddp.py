"""Two ranks decide as one, and end as one process does."""

import multiprocessing
import os
import socket

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from pruning_cases import SAMPLES, Images, equal, samples, tensors, trainer, widths
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import ProgressivePruning
from ds_lightning.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU available|num_workers|litlogger|sampler|fork|val_dataloader).*")

OPTIONS = {"target": 0.4, "start": 1, "end": 9, "every": 4, "round_to": 1, "min_channels": 1}


class WithoutNorm(Images):
    """Batch norm in eval mode: its statistics of half a batch would not be those of a whole one."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[1].eval()
        self.net[4].eval()

    def train_dataloader(self):
        # Both ranks' samples of a step are those of the one process.
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        mine = range(rank, SAMPLES, ranks)
        return DataLoader(TensorDataset(*samples()), batch_size=8 // ranks, sampler=mine)


class Keeps(pl.Callback):
    """What each rank ends with, and how it was wrapped."""

    def __init__(self, root):
        self.root, self.wrapped = root, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        wrapper = trainer.strategy.model
        if wrapper is not pl_module:
            self.wrapped.append((wrapper.find_unused_parameters, wrapper.module is pl_module))

    def on_fit_end(self, trainer, pl_module):
        name = f"{trainer.world_size}-{trainer.global_rank}.pt"
        state = trainer.optimizers[0].state_dict()["state"]
        out = {"weights": tensors(pl_module), "optimizer": state, "widths": widths(pl_module), "wrapped": self.wrapped}
        torch.save(out, self.root / name)


def on_ranks(job, *args):
    """Run a job on processes that are there already when Lightning comes, as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = 2
    context = multiprocessing.get_context("fork")  # needs no new import of Lightning
    processes = [context.Process(target=_as_rank, args=(job, rank, ranks, port, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    return [process.exitcode for process in processes]


def _as_rank(job, rank, ranks, port, args):
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    options = {"find_unused_parameters": True, "process_group_backend": "gloo"}
    job(*args, **{"strategy": DDPStrategy(**options), "devices": ranks, "use_distributed_sampler": False})


def fit_and_keep(importance, root, **options):
    pruning = ProgressivePruning(**OPTIONS, importance=importance, sparsity=0.01)
    pl.seed_everything(1, verbose=False)
    trainer(pruning, Keeps(root), epochs=3, **options).fit(WithoutNorm(Adam, 0.01))


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_two_ranks_end_as_one(importance, tmp_path):
    fit_and_keep(importance, tmp_path)
    assert on_ranks(fit_and_keep, importance, tmp_path) == [0, 0]
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert equal(two[0], two[1])
    assert two[0]["wrapped"] == [(True, True)] * (3 * SAMPLES // 8)
    assert one["widths"] == two[0]["widths"] != (16, 16)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], value, rtol=1e-4, atol=1e-6)
    for i, state in one["optimizer"].items():
        for key, value in state.items():
            torch.testing.assert_close(two[0]["optimizer"][i][key], value, rtol=1e-3, atol=1e-6)


class SavesPlan(pl.Callback):
    def __init__(self, root):
        self.root = root

    def on_channels_removed(self, trainer, pl_module, plan):
        torch.save(plan.kept["net.0.weight"][0], self.root / f"{trainer.global_rank}.pt")


def fit_with_opinions(root, **options):
    pruning = ProgressivePruning(0.5, schedule="one-shot", start=2, scope="layer", round_to=1, min_channels=1)
    trainer(pruning, SavesPlan(root), **options).fit(WithoutNorm())


def test_rank_zero_decides_by_the_mean_of_the_scores(tmp_path, monkeypatch):
    def scores(graph, network, *args, **kwargs):
        rank = torch.distributed.get_rank()
        mine = torch.tensor([[0.0] * 8 + [9.0] * 4 + [6.0] * 4, [9.0] * 4 + [1.0] * 8 + [0.0] * 4][rank])
        return [mine.clone() for _ in graph.groups]

    monkeypatch.setattr("ds_lightning.networks.channel_graph.ChannelGraph.scores", scores)
    assert on_ranks(fit_with_opinions, tmp_path) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    # Means: 4.5 for 0 to 3, 0.5 for 4 to 7, 5.0 for 8 to 11, 3.0 for 12 to 15.
    ranked = [8, 9, 10, 11, 0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7]
    assert set(first) == set(ranked[: len(first)])


def fit_and_fail(root, **options):
    try:
        fit_with_opinions(root, **options)
    except ConfigError as error:
        (root / os.environ["LOCAL_RANK"]).write_text(str(error))


def test_a_failure_on_rank_zero_ends_all_ranks(tmp_path, monkeypatch):
    def fails(graph, choice):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr("ds_lightning.networks.channel_graph.ChannelGraph.plan", fails)
    monkeypatch.setattr("ds_lightning.networks.channel_graph.ChannelGraph.choose", lambda *_, **__: None)
    assert on_ranks(fit_and_fail, tmp_path) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["no such luck"] * 2


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_processes_whose_network_would_not_come_back_are_refused(strategy):
    run = trainer(ProgressivePruning(), strategy=strategy, devices=2)
    with pytest.raises(ConfigError, match="would not get back; expected strategy='ddp'"):
        ProgressivePruning().on_fit_start(run, WithoutNorm())
