import gc

import albumentations
import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from squares import Squares, ready
from torch.utils.data import DataLoader, DistributedSampler

from ds_lightning.datamodules import BatchMixer, ImageData
from ds_lightning.errors import NoEffectWarning


@pytest.fixture
def tidy():
    """Ends workers here, one after another, rather than in the middle of a later test."""
    yield
    gc.collect()


class Probe(L.LightningModule):
    """Keeps what it saw, and a weight that depends on all of it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(36, 3)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, index):
        self.seen["train"].append(batch)
        mix = batch.get("mix", torch.ones(len(batch["label"])))
        return (self.layer(batch["image"].flatten(1)).square().sum(1) * mix).mean()

    def validation_step(self, batch, index):
        self.seen["val"].append(batch)

    def test_step(self, batch, index):
        self.seen["test"].append(batch)

    def predict_step(self, batch, index):
        self.seen["predict"].append(batch)
        return batch["label"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder, epochs, **arguments):
    arguments = {"logger": False, "enable_checkpointing": False} | arguments
    return L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_mixed_in_training_only_and_normalised_everywhere(tmp_path):
    model, data = Probe(), Squares(batch_size=20, mixup_alpha=1.0, cutmix_alpha=1.0, seed=1)
    run = trainer(tmp_path, 1)
    run.fit(model, data)
    run.test(model, data)
    run.predict(model, data)
    assert [len(model.seen[stage]) for stage in ("train", "val", "test", "predict")] == [3, 2, 2, 2]  # + sanity
    for stage, batches in model.seen.items():
        for batch in batches:
            assert set(batch) == {"image", "label"} | ({"label_mixed", "mix"} if stage == "train" else set())
            assert batch["image"].dtype == torch.float32
    tested = torch.cat([batch["image"] for batch in model.seen["test"]])
    torch.testing.assert_close(tested[:, 0, 0, 0], (torch.arange(60, 90) / 255 - 0.5) / 0.5)
    assert torch.equal(torch.cat([batch["image"] for batch in model.seen["predict"]]), tested)


def test_the_mixer_gets_the_normalised_images_of_the_batch(tmp_path):
    plain, mixed = Probe(), Probe()
    trainer(tmp_path, 1).fit(plain, Squares(batch_size=18, seed=4))
    trainer(tmp_path, 1).fit(mixed, Squares(batch_size=18, seed=4, cutmix_alpha=1.0))
    mixer = BatchMixer(cutmix_alpha=1.0, seed=4)
    for before, after in zip(plain.seen["train"], mixed.seen["train"], strict=True):
        expected = mixer(before)
        assert all(torch.equal(expected[key], after[key]) for key in expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, workers, tidy):
    def data():
        return Squares(
            batch_size=20,
            seed=5,
            num_workers=workers,
            mixup_alpha=0.4,
            cutmix_alpha=1.0,
            crop_padding=1,
            horizontal_flip=True,
            transform=albumentations.Compose([albumentations.PixelDropout(dropout_prob=0.3, p=0.7)]),
        )

    def model():
        torch.manual_seed(0)
        return Probe()

    whole = model()
    trainer(tmp_path, 3).fit(whole, data())
    first, second = model(), model()
    run = trainer(tmp_path, 2)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert saved["Squares"] == {"mixer": {"batches": 6}, "augment": {"batches": 6}}
    trainer(tmp_path, 3).fit(second, data(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)

    assert len(second.seen["train"]) == 3
    for expected, got in zip(whole.seen["train"], first.seen["train"] + second.seen["train"], strict=True):
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert torch.equal(whole.layer.weight, second.layer.weight)
    # The epochs differ from each other, or the test would prove nothing.
    assert not torch.equal(whole.seen["train"][0]["label"], whole.seen["train"][3]["label"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_from_an_epochs_end_goes_on_with_the_next_epochs_order(tmp_path, workers, tidy):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = Probe(), Probe()
    trainer(tmp_path, 3, callbacks=[saver], enable_checkpointing=True).fit(whole, Squares(batch_size=20, seed=5))
    data = Squares(batch_size=20, seed=5, num_workers=workers)
    trainer(tmp_path, 3).fit(resumed, data, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    expected = [batch["image"] for batch in whole.seen["train"][6:]]
    assert len(expected) == 3
    assert all(torch.equal(*pair) for pair in zip(expected, (b["image"] for b in resumed.seen["train"]), strict=True))


def epoch_of(data):
    return torch.cat([batch["image"] for batch in data.train_dataloader()])


def test_one_seed_one_order_and_the_number_of_workers_does_not_matter(tidy):
    drop = albumentations.PixelDropout(dropout_prob=0.5, p=1.0)
    for transform in (None, drop):
        first = epoch_of(ready(Squares(seed=1, batch_size=7, transform=transform)))
        assert torch.equal(first, epoch_of(ready(Squares(seed=1, batch_size=7, transform=transform))))
        assert torch.equal(first, epoch_of(ready(Squares(seed=1, batch_size=7, transform=transform, num_workers=2))))
        assert not torch.equal(first, epoch_of(ready(Squares(seed=2, batch_size=7, transform=transform))))


def test_workers_that_live_on_see_each_epoch():
    drop = albumentations.PixelDropout(dropout_prob=0.5, p=1.0)
    loaders = [
        ready(Squares(batch_size=54, num_workers=workers, transform=drop)).train_dataloader() for workers in (0, 1)
    ]
    assert loaders[1].persistent_workers
    epochs = [[batch["image"] for _ in range(2) for batch in loader] for loader in loaders]
    loaders[1]._iterator._shutdown_workers()  # now; the garbage collector would take 5 s to
    for here, there in zip(*epochs, strict=True):
        assert torch.equal(here, there)


def test_loading_leaves_the_global_generator_alone():
    data = ready(Squares(batch_size=8, crop_padding=1, mixup_alpha=1.0))
    state = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_lightnings_sampler_injection_works_with_whole_batches():
    data = ready(Squares(batch_size=9))
    seen = []
    for rank in range(2):
        # What Lightning does for a loader without a distributed sampler: the same arguments, another sampler.
        loader = data.val_dataloader()
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank, shuffle=False)
        replaced = DataLoader(loader.dataset, batch_size=9, sampler=sampler, collate_fn=loader.collate_fn)
        seen += torch.cat([batch["image"][:, 0, 0, 0] for batch in replaced]).tolist()
    everything = torch.cat([batch["image"][:, 0, 0, 0] for batch in data.val_dataloader()]).tolist()
    assert sorted(seen) == sorted(everything)


class Replica:
    """What a DataModule asks of the Trainer of a distributed run."""

    def __init__(self, rank):
        self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}
        self.training = True
        self.fit_loop = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit_loop


def test_ranks_train_on_different_images_and_mix_differently():
    seen, mixes = [], []
    for rank in range(2):
        data = Squares(batch_size=9, mixup_alpha=1.0, crop_padding=1)
        data.trainer = Replica(rank)
        data.setup("fit")
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, DistributedSampler)  # so Lightning does not put another in its place
        seen += torch.cat([batch["image"][:, 0, 0, 0] for batch in loader]).tolist()
        assert (data.mixer.rank, data.augment.rank) == (rank, rank)
        mixes.append(data.mixer({"image": torch.rand(4, 1, 2, 2), "label": torch.zeros(4)})["mix"])
    assert len(seen) == len(set(seen)) == 54
    assert not torch.equal(*mixes)


def test_true_double_precision_reaches_the_model(tmp_path):
    model = Probe()
    trainer(tmp_path, 1, precision="64-true").fit(model, Squares(batch_size=30, mixup_alpha=1.0))
    assert model.seen["train"][0]["image"].dtype == torch.float64


def test_the_last_batch_of_one_warns_and_drop_last_leaves_it_out(tmp_path):
    with pytest.warns(NoEffectWarning):
        trainer(tmp_path, 1).fit(Probe(), Squares(batch_size=53, mixup_alpha=1.0))
    model = Probe()
    trainer(tmp_path, 1).fit(model, Squares(batch_size=53, mixup_alpha=1.0, drop_last=True))
    assert [len(batch["label"]) for batch in model.seen["train"]] == [53]


def test_a_base_without_its_parts_can_not_be_built():
    with pytest.raises(TypeError, match="abstract"):
        ImageData()
