import random
import warnings
from types import SimpleNamespace

import exact_resume_cases as cases
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ds_lightning.callbacks import DynamicLayerLR, ExactResume
from ds_lightning.callbacks._resumable_loader import _batch_seeds
from ds_lightning.datamodules import InMemoryImageData
from ds_lightning.errors import ConfigError
from ds_lightning.functional.seeds import derived_seed


def fit(root, kind="shuffle", workers=0, resume=None, seed=1, model=None, data=None, more=(), callback=None, **options):
    pl.seed_everything(seed, verbose=False)
    model = model or cases.Records()
    saver = () if resume else (cases.every_step(root),)
    trainer = cases.trainer(root, callback or ExactResume(), *more, *saver, **options)
    if "datamodule" not in (data or {}):
        data = {"train_dataloaders": cases.loader(kind, workers), **(data or {})}
    trainer.fit(model, **data, ckpt_path=resume, weights_only=True if resume else None)
    model.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return model


def check_every_resume(root, steps, whole=None, make=lambda: None, **options):
    """Resume from each checkpoint under another seed, and compare everything with the uninterrupted fit."""
    whole = whole or fit(root, model=make(), **options)
    for step in steps:
        resumed = fit(root, resume=root / f"step={step}.ckpt", seed=77, model=make(), **options)
        assert torch.equal(cases.weights(resumed), cases.weights(whole)), step
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], step
        assert resumed.reported == whole.reported[len(whole.reported) - len(resumed.reported) :], step
        assert resumed.metrics == whole.metrics, step
    return whole


@pytest.mark.parametrize("kind", ["shuffle", "weighted", "generator"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_at_any_step_it_ends_bit_equal(tmp_path, kind, workers):
    whole = check_every_resume(tmp_path, range(1, 15) if workers == 0 else (3, 5, 8), kind=kind, workers=workers)
    assert len(whole.seen) == 3 * cases.STEPS
    assert len(whole.reported) == 3


def test_a_resumed_epoch_sees_every_sample_once(tmp_path):
    whole = fit(tmp_path)
    resumed = fit(tmp_path, resume=tmp_path / "step=7.ckpt")
    assert [entry[1] for entry in resumed.seen[:3]] == [2, 3, 4]
    epoch = [i for entry in whole.seen[5:7] + resumed.seen[:3] for i in entry[2]]
    assert sorted(epoch) == list(range(cases.SAMPLES))
    orders = [[i for entry in whole.seen[k : k + 5] for i in entry[2]] for k in (0, 5, 10)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    assert fit(tmp_path / "a", workers=0).seen == fit(tmp_path / "b", workers=2).seen


class Plateau(cases.Records):
    """Its rate depends on the validation."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "monitor": "val", "strict": False}}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"val_check_interval": 2}, range(1, 15)),
        ({"accumulate_grad_batches": 2}, range(1, 9)),
        ({"limit_train_batches": 3}, range(1, 9)),
        ({"max_steps": 13, "max_epochs": -1}, range(1, 13)),
        ({"reload_dataloaders_every_n_epochs": 1}, range(1, 15)),
        ({"limit_train_batches": 3, "use_distributed_sampler": False, "check_val_every_n_epoch": 2}, (1, 3, 4, 6, 8)),
    ],
    ids=str,
)
def test_it_holds_with_lightnings_options(tmp_path, options, steps):
    data = {"val_dataloaders": DataLoader(cases.Noisy(), batch_size=10)}
    check_every_resume(tmp_path, steps, make=Plateau, data=data, **options)


@pytest.mark.parametrize(
    "options",
    [{"val_check_interval": 3, "accumulate_grad_batches": 2}, {}, {"max_steps": 13, "max_epochs": -1}],
    ids=str,
)
def test_checkpoints_of_validation_and_of_the_epochs_end_resume_exactly(tmp_path, options):
    data = {"val_dataloaders": DataLoader(cases.Noisy(), batch_size=10)}
    saver = ModelCheckpoint(tmp_path, filename="val-{step}", monitor="val", save_top_k=-1)
    ends = ModelCheckpoint(tmp_path, filename="end-{step}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = fit(tmp_path, model=Plateau(), data=data, more=(saver, ends), **options)
    found = sorted(tmp_path.glob("val-*.ckpt")) + sorted(tmp_path.glob("end-*.ckpt"))
    assert len(found) >= 4
    for path in found:
        resumed = fit(tmp_path, model=Plateau(), data=data, resume=path, seed=77, **options)
        assert torch.equal(cases.weights(resumed), cases.weights(whole)), path.name
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], path.name
        assert resumed.reported == whole.reported[len(whole.reported) - len(resumed.reported) :], path.name


class Numbers(IterableDataset):
    def __init__(self, sized):
        if sized:
            self.__class__ = SizedNumbers

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        part, parts = (info.id, info.num_workers) if info else (0, 1)
        for i in range(part, cases.SAMPLES, parts):
            noise = random.random() + np.random.rand() + torch.rand(3)
            yield torch.full((3,), float(i)) / cases.SAMPLES + noise, torch.tensor(i)


class SizedNumbers(Numbers):
    def __len__(self):
        return cases.SAMPLES


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_sized", [False, True])
@pytest.mark.filterwarnings("ignore:ExactResume. the train loader is a DataLoader that can't jump")
def test_an_iterable_dataset_is_drawn_again(tmp_path, workers, is_sized):
    def data():
        return {"train_dataloaders": DataLoader(Numbers(is_sized), batch_size=cases.BATCH, num_workers=workers)}

    whole = fit(tmp_path, data=data())
    for step in (2, 5, 7) if workers else (1, 2, 5, 7, 10, 14):
        resumed = fit(tmp_path, data=data(), resume=tmp_path / f"step={step}.ckpt", seed=77)
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(cases.weights(resumed), cases.weights(whole)), step


def test_drawing_again_is_said(tmp_path):
    data = {"train_dataloaders": DataLoader(Numbers(True), batch_size=cases.BATCH)}
    fit(tmp_path, data=data)
    with pytest.warns(UserWarning, match="2 batches are loaded and dropped"):
        fit(tmp_path, data=data, resume=tmp_path / "step=7.ckpt")


class Lazy:
    """A batch sampler that draws from Python's global generator all along, and has no len()."""

    def __iter__(self):
        for _ in range(cases.STEPS):
            yield [random.randrange(cases.SAMPLES) for _ in range(cases.BATCH)]


def random_collate(samples):
    x, index = torch.utils.data.default_collate(samples)
    return x * torch.rand(1), index


class Shifted(DataLoader):
    def __init__(self, *args, by, **kwargs):
        super().__init__(*args, **kwargs)
        self.by = by

    def __iter__(self):
        for x, index in super().__iter__():
            yield x + self.by, index


def open_noise(worker):
    torch.utils.data.get_worker_info().dataset.opened = True


class Opened(cases.Noisy):
    opened = False

    def __getitem__(self, index):
        assert self.opened or torch.utils.data.get_worker_info() is None
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["lazy", "collate", "subclass", "unbatched", "dataset-attribute"])
def test_unusual_loaders(tmp_path, kind, workers):
    def loader():
        options = {"num_workers": workers, "batch_size": cases.BATCH, "shuffle": True}
        if kind == "lazy":
            return DataLoader(cases.Noisy(), batch_sampler=Lazy(), num_workers=workers)
        if kind == "collate":
            return DataLoader(cases.Noisy(), collate_fn=random_collate, **options)
        if kind == "subclass":
            return Shifted(cases.Noisy(), by=2.0, **options)
        if kind == "unbatched":
            return DataLoader(cases.Noisy(), **{**options, "batch_size": None})
        return DataLoader(Opened(), worker_init_fn=open_noise, **options)

    class Any1(cases.Records):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1].reshape(-1)), batch_idx)

    if kind == "unbatched":
        options, steps = {"limit_train_batches": 6}, (2, 6, 9)
    else:
        options, steps = {}, (2, 5, 8)
    whole = fit(tmp_path, model=Any1(), data={"train_dataloaders": loader()}, **options)
    if kind == "subclass":
        assert all(entry[3] > 2 * cases.BATCH * 3 for entry in whole.seen)
    for step in steps:
        path = tmp_path / f"step={step}.ckpt"
        resumed = fit(tmp_path, model=Any1(), data={"train_dataloaders": loader()}, resume=path, seed=9, **options)
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(cases.weights(resumed), cases.weights(whole)), step


def test_two_loaders_of_which_one_starts_over(tmp_path):
    class Both(cases.Records):
        def training_step(self, batch, batch_idx):
            joined = [torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True)]
            return super().training_step(joined, batch_idx)

    def data():
        short = torch.utils.data.Subset(cases.Noisy(), range(8))
        b = DataLoader(short, batch_size=4, shuffle=True)
        return {"train_dataloaders": {"a": cases.loader("shuffle", 0), "b": b}}

    whole = fit(tmp_path, model=Both(), data=data())
    assert whole.seen[0][2][4:] + whole.seen[1][2][4:] != whole.seen[2][2][4:] + whole.seen[3][2][4:]
    for step in range(1, 15):
        resumed = fit(tmp_path, model=Both(), data=data(), resume=tmp_path / f"step={step}.ckpt", seed=5)
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(cases.weights(resumed), cases.weights(whole)), step


class Dots(InMemoryImageData):
    class_names = ("dark", "light")

    def load(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(2).repeat(15)
        images = torch.randint(0, 128, (30, 1, 4, 4), generator=generator) + 100 * labels.view(-1, 1, 1, 1)
        return (images.to(torch.uint8), labels), (images[:4].to(torch.uint8), labels[:4])


class Mixed(cases.Records):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1)
        )

    def training_step(self, batch, batch_idx) -> Tensor:
        target = batch["mix"] * batch["label"] + (1 - batch["mix"]) * batch["label_mixed"]
        return (super().training_step((batch["image"], batch["label"]), batch_idx) - target.mean()).square()

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch["image"],), batch_idx)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixing_datamodule_beside_layer_rates(tmp_path, workers):
    def parts():
        arguments = {"batch_size": 6, "val_fraction": 0.2, "mixup_alpha": 0.4, "cutmix_alpha": 1.0}
        data = Dots(num_workers=workers, crop_padding=1, horizontal_flip=True, seed=3, **arguments)
        return {
            "model": Mixed(),
            "data": {"datamodule": data},
            "more": (DynamicLayerLR("variance", every=2, warmup=3),),
        }

    whole = fit(tmp_path, **parts())
    for step in (2, 4, 7) if workers else range(1, 12):
        resumed = fit(tmp_path, resume=tmp_path / f"step={step}.ckpt", seed=9, **parts())
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(cases.weights(resumed), cases.weights(whole)), step


def test_it_leaves_the_users_loader_and_lightnings_loops_as_they_were(tmp_path):
    pl.seed_everything(1, verbose=False)
    mine, trainer = cases.loader("shuffle", 0), cases.trainer(tmp_path, ExactResume())
    before = dict(mine.__dict__)
    trainer.fit(cases.Records(), mine)
    assert mine.__dict__ == before
    assert type(trainer.train_dataloader).__mro__[1] is DataLoader
    assert len(trainer.train_dataloader.dataset) == cases.SAMPLES
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop)
    assert not any({"setup_data", "run", "on_run_start"} & set(vars(loop)) for loop in loops)


def test_the_seed_argument_rules_the_data_alone(tmp_path):
    a = fit(tmp_path / "a", callback=ExactResume(seed=5), seed=1)
    b = fit(tmp_path / "b", callback=ExactResume(seed=5), seed=2)
    assert a.seen == b.seen
    assert not torch.equal(cases.weights(a), cases.weights(b))
    with pytest.warns(UserWarning, match="seed is 6, and the checkpoint's is 5, which is used"):
        c = fit(tmp_path, callback=ExactResume(seed=6), resume=tmp_path / "a" / "step=7.ckpt", seed=3)
    assert torch.equal(cases.weights(a), cases.weights(c))


def test_a_checkpoint_without_it_and_one_with_it_alone(tmp_path):
    pl.seed_everything(1, verbose=False)
    cases.trainer(tmp_path, cases.every_step(tmp_path)).fit(cases.Records(), cases.loader("shuffle", 0))
    with pytest.warns(UserWarning, match="saved without ExactResume"):
        fit(tmp_path, resume=tmp_path / "step=7.ckpt")
    fit(tmp_path / "with")
    plain = cases.trainer(tmp_path)
    plain.fit(cases.Records(), cases.loader("shuffle", 0), ckpt_path=tmp_path / "with" / "step=7.ckpt")
    assert plain.global_step >= 15


def test_other_data_is_refused_inside_an_epoch(tmp_path):
    fit(tmp_path)
    other = {"train_dataloaders": DataLoader(cases.Noisy(), batch_size=2)}
    with pytest.raises(ConfigError, match=r"have \[10\] batches an epoch, and had \[5\].*put them back"):
        fit(tmp_path, data=other, resume=tmp_path / "step=7.ckpt")


def test_another_number_of_processes_is_refused_inside_an_epoch(tmp_path):
    fit(tmp_path)
    for step, error in ((7, True), (5, False)):
        path = tmp_path / f"step={step}.ckpt"
        content = torch.load(path, weights_only=True)
        content["callbacks"]["ExactResume"]["world_size"] = 4
        content["callbacks"]["ExactResume"]["ranks"] *= 4
        torch.save(content, path)
        if error:
            with pytest.raises(ConfigError, match="saved by 4 processes and this fit has 1, in the middle"):
                fit(tmp_path, resume=path)
        else:
            with pytest.warns(UserWarning, match="saved by 4 processes and this fit has 1"):
                fit(tmp_path, resume=path)


def test_a_hook_that_the_checkpoint_misses_is_named(tmp_path):
    class Averages(cases.Records):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    with pytest.warns(UserWarning, match="on_train_batch_end of Averages"):
        fit(tmp_path, model=Averages(), epochs=1)


def test_early_stopping_stops_at_the_same_step(tmp_path):
    whole = fit(tmp_path, more=(EarlyStopping("loss", patience=1, min_delta=5.0),), epochs=6)
    resumed = fit(
        tmp_path,
        more=(EarlyStopping("loss", patience=1, min_delta=5.0),),
        epochs=6,
        resume=tmp_path / "step=3.ckpt",
        seed=4,
    )
    assert resumed.seen == whole.seen[3:]
    assert len(whole.seen) < 6 * cases.STEPS


def test_it_says_nothing_of_lightnings_and_leaves_the_filters_of_warnings(tmp_path):
    class Fails(cases.Records):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("as meant")

    fit(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        fit(tmp_path, resume=tmp_path / "step=7.ckpt")
        with pytest.raises(RuntimeError, match="as meant"):
            fit(tmp_path, model=Fails(), resume=tmp_path / "step=7.ckpt")
        assert warnings.filters == before
    assert not any("You're resuming" in str(entry.message) for entry in said)


@pytest.mark.parametrize("first", [0, 1, 63, 64, 100])
def test_a_batchs_seed_does_not_depend_on_where_the_epoch_is_entered(first):
    seeds = _batch_seeds(SimpleNamespace(seed=3, rank=1), (0, 5, 2), first)
    for number in range(first, first + 150):
        assert next(seeds) == derived_seed(3, "data", 1, 0, 5, 2, number)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed is -1; expected an integer >= 0"):
        ExactResume(seed=-1)
