import itertools

import exact_resume_cases as cases
import lightning.pytorch as pl
import pytest
import torch
from episode_cases import Marks, episodes
from task_cases import trainer
from torch import nn

from ds_lightning.callbacks import ExactResume
from ds_lightning.datamodules.episode_stream import EpisodeSampler
from ds_lightning.errors import ConfigError
from ds_lightning.training import TrainingCLI


class Notes(pl.LightningModule):
    """A small network with dropout that notes which images each step has."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
        self.steps, self.validations, self.tests = [], [], []

    def training_step(self, batch, batch_idx):
        query = batch["query"]
        self.steps.append((self.current_epoch, batch_idx, key(batch), float(query["image"].sum())))
        return nn.functional.cross_entropy(self.net(query["image"].flatten(0, 1)), query["label"].flatten())

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validations.append((self.current_epoch, key(batch)))

    def test_step(self, batch, batch_idx):
        self.tests.append(key(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def key(batch):
    return [
        batch["classes"].tolist(),
        *(batch[part]["image"][..., 0, 1].flatten().tolist() for part in ("support", "query")),
    ]


def singles(batch):
    """Take a batch apart into batches of one task."""
    for task in range(len(batch["classes"])):
        one = slice(task, task + 1)
        parts = {part: {"image": batch[part]["image"][one]} for part in ("support", "query")}
        yield {**parts, "classes": batch["classes"][one]}


def fit(root, data, *callbacks, resume=None, seed=1, **options):
    pl.seed_everything(seed, verbose=False)
    model = Notes()
    made = trainer(root, *callbacks, **{"max_epochs": 2, **options})
    made.fit(model, data, ckpt_path=resume, weights_only=True if resume else None)
    return model


def test_training_episodes_are_new_and_evaluation_is_always_the_same(tmp_path):
    model = fit(tmp_path, episodes(), max_epochs=3)
    assert [step[:2] for step in model.steps] == [(epoch, batch) for epoch in range(3) for batch in range(6)]
    assert len({str(step[2]) for step in model.steps}) == 18
    per_epoch = 3  # batches of 10 validation episodes
    first = [entry for _, entry in model.validations[:per_epoch]]
    assert [entry for _, entry in model.validations] == first * 3
    again = fit(tmp_path, episodes(num_workers=2), max_epochs=3, seed=5)
    assert again.validations == model.validations
    assert [step[:3] for step in again.steps] == [step[:3] for step in model.steps]
    # The numbers go on over the epochs.
    data = episodes()
    batch = data.batch("train", list(range(24, 28)))
    assert key(batch) == model.steps[6][2]
    trainer(tmp_path).test(again, data, verbose=False)
    assert again.tests[0] == key(data.batch("test", [0, 1, 2, 3]))


@pytest.mark.parametrize("options", [{}, {"train_tasks": 5}], ids=["new", "pool"])
def test_a_resume_inside_an_epoch_ends_bit_equal(tmp_path, options):
    def data(workers=0):
        marks = Marks(crop_padding=1, horizontal_flip=True)
        return episodes(marks, augment=True, rotations=True, num_workers=workers, **options)

    whole = fit(tmp_path, data(2 if not options else 0), ExactResume(), cases.every_step(tmp_path))
    assert len(whole.steps) == 12
    for step in (2, 6, 7):
        resumed = fit(tmp_path, data(), ExactResume(), resume=tmp_path / f"step={step}.ckpt", seed=77)
        assert resumed.steps == whole.steps[step:], step
        assert torch.equal(cases.weights(resumed), cases.weights(whole)), step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_at_an_epochs_end_needs_no_callback(tmp_path, workers):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(tmp_path, episodes(), saver, max_epochs=3)
    resumed = fit(tmp_path, episodes(num_workers=workers), resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert [step[:3] for step in resumed.steps] == [step[:3] for step in whole.steps[12:]]


def test_a_checkpoint_refuses_to_be_tested_on_what_it_was_trained_on(tmp_path):
    fit(tmp_path, episodes(), cases.every_step(tmp_path), max_epochs=1)
    with pytest.raises(ConfigError, match=r"class '..' is for (val|test) here, and the checkpoint was trained on it"):
        fit(tmp_path, episodes(seed=1), resume=tmp_path / "step=6.ckpt")


@pytest.mark.parametrize(("episode_count", "ranks"), [(24, 2), (23, 2), (25, 3)])
def test_processes_have_different_episodes(episode_count, ranks):
    numbers = []
    for rank in range(ranks):
        sampler = EpisodeSampler(episode_count, seed=0, num_replicas=ranks, rank=rank)
        share = [list(sampler) for _ in range(3)]
        assert {len(epoch) for epoch in share} == {len(sampler)} == {-(-episode_count // ranks)}
        sampler.set_epoch(1)
        assert list(sampler) == share[1]
        numbers += itertools.chain.from_iterable(share)
    assert sorted(numbers) == list(range(3 * ranks * -(-episode_count // ranks)))


def test_a_pool_of_tasks_is_gone_through_in_shuffled_passes():
    shares = [EpisodeSampler(30, seed=0, pool=10, num_replicas=2, rank=rank) for rank in range(2)]
    order = [number for _ in range(2) for pair in zip(*shares, strict=True) for number in pair]
    passes = [order[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(part) == list(range(10)) for part in passes)
    assert len({tuple(part) for part in passes}) == 6
    made = episodes(train_tasks=5)
    seen = {str(key(one)) for batch in made.train_dataloader() for one in singles(batch)}
    expected = {str(key(made.batch("train", [number]))) for number in range(5)}
    assert len(seen) == len(expected) == 5


def test_two_processes_share_the_loader(monkeypatch):
    batches = []
    for rank in range(2):
        made = episodes()
        made.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        monkeypatch.setattr(type(made.trainer), "distributed_sampler_kwargs", {"num_replicas": 2, "rank": rank})
        loader = made.train_dataloader()
        assert len(loader) == 3
        batches.append(list(loader))
    monkeypatch.undo()
    made = episodes(tasks_per_batch=24)
    (everything,) = made.train_dataloader()
    for rank in range(2):
        own = torch.cat([batch["query"]["image"] for batch in batches[rank]])
        assert torch.equal(own, everything["query"]["image"][rank::2])


def test_batches_follow_the_precision_of_the_run(tmp_path):
    class Half(Notes):
        def training_step(self, batch, batch_idx):
            assert batch["support"]["image"].dtype == batch["query"]["image"].dtype == torch.bfloat16
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, precision="bf16-true", max_epochs=1).fit(Half(), episodes())


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "Episodes", "--data.data", "MNIST5k", "--data.ways", "2", "--data.splits", "[0.6, 0.2, 0.2]"],
        ["--config", "datamodules/episodes.yaml", "--data.data.batch_size", "32"],
    ],
    ids=["words", "preset"],
)
def test_the_command_line_builds_episodes(words):
    quiet = ["--model", "Classifier", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    made = TrainingCLI([*quiet, *words, "--data.train_classes", "[3, '5', 7]"], run=False).datamodule
    made.setup()
    assert type(made.data).__name__ == "MNIST5k"
    assert made.classes_of("train") == ["3", "5", "7"]
    assert len(made.source.labels) == 5000
    assert made.batch("test", [0])["query"]["image"].shape == (1, 30, 1, 28, 28)
