"""When a task ends: in a stream, in several fits, in fits that stop early or can't train at all."""

import ewc_cases as cases
import lightning.pytorch as pl
import pytest
import torch
from ewc_cases import Stranger, Stream, loader, params, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from ds_lightning.callbacks import ElasticWeightConsolidation, ExactResume
from ds_lightning.callbacks._tasks import current_task, ends_task, stream_of, task_batches
from ds_lightning.datamodules import InMemoryImageData, TaskStream
from ds_lightning.errors import ConfigError, NoEffectWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU available|num_workers|litlogger|no step of this fit|val).*")


class Probe(pl.Callback):
    """Asks the questions of `_tasks` at each epoch's end."""

    def __init__(self):
        self.answers = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.answers.append((current_task(trainer), ends_task(trainer)))


def test_a_stream_ends_its_tasks_at_their_last_epochs_before_checkpoints(tmp_path):
    probe, ewc = Probe(), ElasticWeightConsolidation()
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    model, stream = cases.stream_fit(ewc, None, None, probe, saves)
    assert probe.answers == [(0, False), (0, True), (1, False), (1, True), (2, False), (2, True)]
    assert ewc.tasks == 3
    assert {(number, split) for number, split, _ in stream.asked} == {(0, "train"), (1, "train"), (2, "train")}
    counts = [
        torch.load(tmp_path / f"epoch={k}.ckpt", weights_only=True)["callbacks"]["ElasticWeightConsolidation"]["tasks"]
        for k in range(6)
    ]
    assert counts == [0, 1, 1, 2, 2, 3]
    last = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    for name, p in params(model).items():
        assert torch.equal(last["state_dict"][name], p)


@pytest.mark.parametrize("resumed_from", [1, 3, 5])
def test_a_resume_at_a_tasks_end_does_not_end_it_twice(tmp_path, resumed_from):
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    model, _ = cases.stream_fit(ElasticWeightConsolidation(), None, None, saves, ExactResume())
    again, other, stream = ElasticWeightConsolidation(), Stranger(seed=5), Stream()
    run = trainer(again, ExactResume(), epochs=6, reload_dataloaders_every_n_epochs=1)
    run.fit(other, stream, ckpt_path=tmp_path / f"epoch={resumed_from}.ckpt", weights_only=True)
    assert again.tasks == 3
    for name, p in params(model).items():
        assert torch.equal(params(other)[name], p)


def test_a_stream_with_a_memory_of_samples_moves_nothing():
    def weights(merge, memory_size):
        stream = Stream()
        stream.memory_size = memory_size
        return params(cases.stream_fit(ElasticWeightConsolidation(merge=merge), None, stream)[0])

    unmoved = weights(None, 0)
    assert all(torch.equal(p, unmoved[name]) for name, p in weights(1e-3, 5).items())
    assert not all(torch.equal(p, unmoved[name]) for name, p in weights(1e-3, 0).items())


def test_an_epoch_that_is_broken_off_ends_no_task():
    probe, ewc = Probe(), ElasticWeightConsolidation()
    with pytest.warns(NoEffectWarning, match="no step of this fit: there was no earlier task. 0 consolidated"):
        cases.stream_fit(ewc, None, None, probe, max_steps=9)  # of 12 in the first task
    assert probe.answers == [(0, False), (0, False)]
    assert ewc.tasks == 0


def test_each_fit_with_a_new_trainer_is_a_task_and_a_second_one_on_the_same_is_refused():
    ewc, model = ElasticWeightConsolidation(), Stranger()
    for number in range(3):
        run = trainer(ewc, epochs=1)
        run.fit(model, loader(number))
        assert stream_of(run) is None
        assert ewc.tasks == number + 1
    with pytest.raises(ConfigError, match=r"trained 1 of max_epochs=1 .*new Trainer.*fit_loop.max_epochs"):
        run.fit(model, loader(3))
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(3))
    assert ewc.tasks == 4


def test_early_stopping_ends_a_task_and_an_exception_does_not():
    class Logs(Stranger):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", 1.0)
            if self.fails and self.trainer.global_step == 2:
                raise RuntimeError("broken")
            return loss

    ewc, model = ElasticWeightConsolidation(), Logs()
    model.fails = False
    stops = EarlyStopping("loss", patience=1, check_on_train_epoch_end=True)
    run = trainer(ewc, stops, epochs=9)
    run.fit(model, loader(0))
    assert run.current_epoch < 8
    assert ewc.tasks == 1
    model.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        trainer(ewc).fit(model, loader(1))
    assert ewc.tasks == 1


def test_a_task_stream_is_read_without_augmentation_or_mixing():
    class Digits(InMemoryImageData):
        class_names = ("a", "b")
        mean, std = (0.5,), (0.5,)

        def load(self):
            images = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
            return (images, torch.arange(40) % 2), (images[:8], torch.arange(8) % 2)

    seen = {}

    class Reads(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            stage = trainer.state.stage
            seen[trainer.current_epoch] = list(task_batches(trainer, pl_module, current_task(trainer), "test", limit=5))
            assert trainer.state.stage is stage

    class Flat(Stranger):
        def __init__(self):
            super().__init__()
            self.body[0] = torch.nn.Linear(16, 8)

        def forward(self, x):
            return super().forward(x.flatten(1))

        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    stream = TaskStream(Digits(batch_size=4, mixup_alpha=1.0), kind="permuted", tasks=2)
    ewc = ElasticWeightConsolidation(samples=10)
    trainer(ewc, Reads()).fit(Flat(), stream)
    assert ewc.tasks == 2
    assert [len(batch["label"]) for batch in seen[0]] == [4, 1]
    assert set(seen[0][0]) == {"image", "label", "task"}
    assert seen[1][0]["task"].unique().item() == 1
    expected = next(iter(stream.task_dataloader(0, "test")))["image"]
    # 5 of 8, spread evenly.
    torch.testing.assert_close(seen[0][0]["image"][:2], expected[[0, 1]])


@pytest.mark.parametrize("safeguard", [(), (ExactResume(),)])
def test_foreign_data_are_read_again_in_order_and_whole(safeguard):
    seen = []

    class Reads(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.extend(task_batches(trainer, pl_module, None, "train"))
            with pytest.raises(ConfigError, match="split is 'val' and the data are no stream"):
                next(task_batches(trainer, pl_module, None, "val"))

    trainer(*safeguard, Reads()).fit(Stranger(), loader(0))
    x, y = cases.task(0)
    assert torch.equal(torch.cat([batch[0] for batch in seen]), x)
    assert torch.equal(torch.cat([batch[1] for batch in seen]), y)


def test_data_that_can_not_be_read_again_say_so():
    def loss(module, batch):
        return torch.nn.functional.cross_entropy(module(batch["a"][0]), batch["a"][1], reduction="none")

    run = trainer(ElasticWeightConsolidation(loss_fn=loss, fisher="empirical", merge=None), epochs=1)
    with pytest.raises(ConfigError, match=r"come from a dict; expected one torch DataLoader"):
        run.fit(Pairs(), {"a": loader(0), "b": loader(1)})

    class Flow(IterableDataset):
        def __iter__(self):
            return iter(zip(*cases.task(0), strict=True))

    ewc = ElasticWeightConsolidation(samples=20)
    trainer(ewc, epochs=1).fit(Stranger(), DataLoader(Flow(), batch_size=8))
    assert ewc.tasks == 1


class Pairs(Stranger):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)
