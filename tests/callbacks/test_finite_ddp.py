import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from finite_cases import User, batches, loader, same, trainer_of
from torch.optim import AdamW
from torch.utils.data import DistributedSampler

from ds_lightning.callbacks import FiniteGuard

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU available|LeafSpec|num_workers|litlogger|sampler).*")

MAKE = partial(AdamW, lr=0.1)


class LossOfRankOne(User):
    """Only rank 1 sees NaN, and only in the loss: the gradients are finite everywhere."""

    def training_step(self, batch, batch_idx):
        bad = batch_idx == 1 and self.global_rank == 1
        return super().training_step(batch, batch_idx) + (math.nan if bad else 0.0)


class Keep(pl.Callback):
    """Both ranks' results, for the parent."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        (guard,) = (c for c in trainer.callbacks if isinstance(c, FiniteGuard))
        state = {
            "weights": pl_module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "guard": guard.state_dict(),
        }
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def test_all_ranks_leave_the_step_out_together(tmp_path, monkeypatch):
    # Lightning's sampler takes its seed from here, where any earlier seed_everything leaves one.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    trainer_of(FiniteGuard(), Keep(tmp_path), strategy="ddp_fork", devices=2).fit(
        LossOfRankOne(MAKE), loader(batches())
    )
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(a["weights"], b["weights"])
    assert same(a["optimizer"], b["optimizer"])
    assert a["optimizer"]["state"][0]["step"] == 3
    assert a["guard"]["skipped"] == b["guard"]["skipped"] == 1
    assert a["guard"]["events"][0]["loss_on_ranks"] == [1]
    assert a["guard"]["events"][0]["batches"] == [1]

    # One process over the same samples, in the order that Lightning's sampler gives them to the two ranks.
    order = [list(DistributedSampler(range(16), 2, rank)) for rank in (0, 1)]
    samples = [torch.cat(column) for column in zip(*batches(), strict=True)]
    model = User(MAKE).net
    optimizer = MAKE(model.parameters())
    for k in (0, 2, 3):
        optimizer.zero_grad()
        both = [i for part in order for i in part[2 * k : 2 * k + 2]]
        x, y = samples[0][both], samples[1][both]
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(a["weights"][f"net.{name}"], value)
