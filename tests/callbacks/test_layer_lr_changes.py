from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from layer_lr_cases import LAYERS, RULE, Recorder, User, images, trainer_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import DynamicLayerLR

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*"
)


class TwoOptimizers(User):
    """Manual optimization: the convolution and the rest step in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.extra = nn.Linear(3, 3)

    def loss(self, batch):
        return cross_entropy(self.extra(self.net(batch[0])), batch[1])

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        body = [*self.net[0].parameters(), *self.net[4].parameters()]
        head = [*self.net[7].parameters(), *self.extra.parameters()]
        return SGD(body, lr=0.05), Adam(head, lr=0.01)


def test_manual_optimization_scales_each_optimizer_by_itself():
    callback, recorder = DynamicLayerLR(**RULE), Recorder()
    trainer_of(callback, recorder).fit(TwoOptimizers(), images())
    state = callback.state_dict()["optimizers"]
    assert [part["steps"] for part in state] == [30, 30]
    assert [part["layers"]["names"] for part in state] == [["net.0", "net.4"], ["net.7", "extra"]]
    for part in state:  # two layers within bounds lie symmetric about their mean
        a, b = part["layers"]["multipliers"]
        assert abs(a - 1) > 0.01
        assert a * b == pytest.approx(1.0) or {a, b} & {0.4, 2.3}
    assert set(recorder.multipliers[0]) == {"net.0", "net.4", "net.7", "extra"}


class Thaw(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.net[4].requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[4].requires_grad_(not 12 <= trainer.global_step < 24 and trainer.global_step >= 6)


def test_a_layer_without_gradients_keeps_its_multiplier_and_its_count():
    callback, recorder = DynamicLayerLR(**RULE), Recorder()
    trainer_of(callback, recorder, Thaw(), epochs=6).fit(User(), images())
    traces = [m["net.4"] for m in recorder.multipliers]
    assert traces[:12] == [1.0] * 12  # first gradient at step 6, read at 8, used at 12
    assert traces[12] != 1.0
    # read at 12, 16 and 20 without a gradient: nothing changes before the reading of step 24 is used at 28
    assert traces[12:28] == [traces[12]] * 16
    assert traces[28] != traces[12]
    names = callback.state_dict()["optimizers"][0]["layers"]
    assert names["seen"][names["names"].index("net.4")] == 36 - 6 - 12
    assert names["seen"][names["names"].index("net.0")] == 36


class Grow(pl.Callback):
    """At step 14 one layer's parameters are replaced by smaller ones, and at step 16 a layer is added."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        if trainer.global_step == 14:
            old = pl_module.net[7]
            pl_module.net[7] = nn.Linear(8, 3)
            new = dict(zip(old.parameters(), pl_module.net[7].parameters(), strict=True))
            for group in optimizer.param_groups:
                group["params"] = [new.get(p, p) for p in group["params"]]
        if trainer.global_step == 16:
            pl_module.net.append(nn.Linear(3, 3))
            optimizer.add_param_group({"params": pl_module.net[8].parameters()})


def test_replaced_and_added_parameters_are_found_again():
    module, recorder = User(partial(SGD, lr=0.05)), Recorder()
    trainer_of(DynamicLayerLR(**RULE), recorder, Grow()).fit(module, images())
    kept = recorder.multipliers[13]["net.7"]
    assert kept != 1.0
    assert recorder.multipliers[14]["net.7"] == kept
    assert [set(m) for m in recorder.multipliers[15:17]] == [set(LAYERS), {*LAYERS, "net.8"}]
    assert recorder.multipliers[16]["net.8"] == 1.0
    assert recorder.multipliers[-1]["net.8"] != 1.0

    # the replaced tensor is scaled from its first step on
    class Displacement(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before, self.grad = pl_module.net[7].weight.detach().clone(), pl_module.net[7].weight.grad

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 15:
                moved = self.before - pl_module.net[7].weight
                torch.testing.assert_close(moved, kept * 0.05 * self.grad, rtol=1e-3, atol=1e-6)
                trainer.should_stop = True

    check = trainer_of(DynamicLayerLR(**RULE), Grow(), Displacement())
    check.fit(User(partial(SGD, lr=0.05)), images())
    assert check.global_step == 15


class Words(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 4, sparse=True)
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.head(self.hidden(self.table(batch[0]).mean(1)).tanh()), batch[1])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.5)


def test_sparse_gradients_are_left_out_with_a_warning():
    x = torch.randint(10, (24, 5), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x[:, 0] % 3), batch_size=4)
    recorder = Recorder()
    with pytest.warns(UserWarning, match="leaves out table: sparse gradients"):
        trainer_of(DynamicLayerLR(**RULE), recorder).fit(Words(), loader)
    assert set(recorder.multipliers[-1]) == {"hidden", "head"}
    assert recorder.multipliers[-1]["head"] != 1.0
