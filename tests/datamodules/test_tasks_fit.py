from collections import Counter

import exact_resume_cases as cases
import lightning.pytorch as pl
import pytest
import torch
from task_cases import PER_CLASS, Ramps, Writes, as_bytes, ready, trainer, whole

from ds_lightning.callbacks import ExactResume
from ds_lightning.datamodules import TaskStream
from ds_lightning.datamodules.rehearsal import reservoir
from ds_lightning.errors import ConfigError
from ds_lightning.modules import Classifier
from ds_lightning.training import TrainingCLI

BATCH = 8


def split(memory=0, data=None, **options):
    data = data or Ramps(batch_size=BATCH)
    return TaskStream(data, kind="split", tasks=3, epochs_per_task=2, memory_size=memory, **options)


def fit(root, stream, *callbacks, resume=None, seed=1, **options):
    pl.seed_everything(seed, verbose=False)
    model = Writes()
    made = trainer(root, *callbacks, **options)
    made.fit(model, stream, ckpt_path=resume, weights_only=True if resume else None)
    return model


@pytest.mark.parametrize(("every", "memory"), [(1, 0), (2, 12)])
def test_each_task_has_its_epochs_with_all_of_its_batches(tmp_path, every, memory):
    stream = split(memory)
    model = fit(tmp_path, stream, check_val_every_n_epoch=every)
    sizes = [len(ready(split()).task_dataloader(task, "train").dataset) for task in range(3)]
    assert len(set(sizes)) == 3
    assert sum(sizes) == sum(PER_CLASS) - 11
    for epoch in range(6):
        task = epoch // 2
        steps = [step for step in model.steps if step[0] == epoch]
        assert [step[1] for step in steps] == list(range(-(-sizes[task] // BATCH)))
        tasks = [number for step in steps for number in step[4]]
        assert tasks.count(task) == sizes[task]
        extra = BATCH if memory and task else 0
        for step in steps[:-1]:
            assert len(step[4]) == BATCH + extra
            assert step[4].count(task) == BATCH
        assert len(tasks) == sizes[task] + extra * len(steps)
        own = [number for step in steps for number, of in zip(step[2], step[4], strict=True) if of == task]
        assert len(set(own)) == len(own)
        assert all(number < task for number in tasks if number != task)
    assert [epoch for epoch, _ in model.validations] == list(range(every - 1, 6, every))
    assert all(set(tasks) == {epoch // 2} for epoch, tasks in model.validations)


def test_the_memory_is_the_reservoir_of_the_earlier_tasks(tmp_path):
    stream = split(memory=12, memory_batch_size=5)
    model = fit(tmp_path, stream)
    sums = [whole(stream.task_dataloader(task, "train"))["image"].flatten(1).sum(1).tolist() for task in range(3)]
    for task in (1, 2):
        seen = [value for earlier in sums[:task] for value in earlier]
        held = {round(seen[number], 2) for number in reservoir([len(part) for part in sums[:task]], 12, 0).tolist()}
        steps = [step for step in model.steps if step[0] // 2 == task]
        drawn = Counter(
            round(value, 2) for step in steps for value, of in zip(step[2], step[4], strict=True) if of < task
        )
        assert set(drawn) == held
        assert sum(drawn.values()) == 5 * len(steps)


@pytest.mark.parametrize(
    ("epochs", "problem"), [(4, "end in task 1 of 0 to 2"), (7, "trained for longer"), (-1, "longer")]
)
def test_a_fit_of_another_length_is_refused(tmp_path, epochs, problem):
    with pytest.raises(ConfigError, match=rf"{problem}; expected 3 tasks \* 2 epochs_per_task = 6"):
        fit(tmp_path, split(), max_epochs=epochs, max_steps=100)


def test_a_fit_of_another_length_when_that_is_meant(tmp_path):
    model = fit(tmp_path, split(allow_other_length=True), max_epochs=7)
    assert {step[0]: set(step[4]) for step in model.steps} == {epoch: {min(epoch // 2, 2)} for epoch in range(7)}
    assert len(fit(tmp_path, split(), fast_dev_run=True).steps) == 1


def test_the_trainer_is_left_as_it_was(tmp_path):
    made = trainer(tmp_path, reload_dataloaders_every_n_epochs=3)
    stream = split()
    made.fit(Writes(), stream)
    assert made.reload_dataloaders_every_n_epochs == 3
    assert stream.current_task == 2
    assert len(made.test_dataloaders or ()) == 0


def augmented(workers):
    data = Ramps(batch_size=BATCH, num_workers=workers, crop_padding=1, horizontal_flip=True, mixup_alpha=0.4)
    return split(memory=12, data=data)


@pytest.mark.parametrize(("workers", "steps"), [(0, (16, 17, 20, 22, 23, 24, 26)), (2, (23,))])
def test_a_resume_inside_a_task_ends_bit_equal(tmp_path, workers, steps):
    uninterrupted = fit(tmp_path, augmented(workers), ExactResume(), cases.every_step(tmp_path))
    # 57, 23 and 19 samples in batches of 8, two epochs each: the third task begins after step 22.
    total = 2 * (8 + 3 + 3)
    assert len(uninterrupted.steps) == total
    for step in steps:
        resumed = fit(tmp_path, augmented(0), ExactResume(), resume=tmp_path / f"step={step}.ckpt", seed=77)
        assert resumed.steps == uninterrupted.steps[step:], step
        assert torch.equal(cases.weights(resumed), cases.weights(uninterrupted)), step


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resume_at_an_epochs_end_needs_no_callback(tmp_path, epoch, workers):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    uninterrupted = fit(tmp_path, split(memory=12), saver)
    data = split(memory=12, data=Ramps(batch_size=BATCH, num_workers=workers))
    resumed = fit(tmp_path, data, resume=tmp_path / f"epoch={epoch}.ckpt", seed=1)
    assert resumed.steps == [step for step in uninterrupted.steps if step[0] > epoch]
    assert resumed.validations == [entry for entry in uninterrupted.validations if entry[0] > epoch]


def test_two_processes_share_each_epoch(monkeypatch, tmp_path):
    shares = []
    for rank in range(2):
        monkeypatch.setattr(Ramps, "_replicas", lambda self, rank=rank: {"num_replicas": 2, "rank": rank})
        stream = ready(split(memory=40))
        stream.trainer = trainer(tmp_path)
        stream.trainer.fit_loop.epoch_progress.current.processed = 2  # two epochs a task: the second one is next
        loader = stream.train_dataloader()
        shares.append(whole(loader))
        assert len(loader) == 2
    monkeypatch.undo()
    everything = whole(ready(split()).task_dataloader(1, "train"))["image"]
    own = torch.cat([share["image"][share["task"] == 1] for share in shares])[:, 0, 0, 0].tolist()
    # One sample twice: 23 samples do not halve.
    assert len(own) == 24
    assert set(own) == set(as_bytes(everything)[:, 0, 0, 0].tolist())
    drawn = torch.cat([share["image"][share["task"] == 0] for share in shares])[:, 0, 0, 0].tolist()
    assert len(drawn) == len(set(drawn)) == 2 * 2 * BATCH


@pytest.mark.parametrize("labels", ["class", "domain", "known"])
def test_our_classifier_learns_a_stream(tmp_path, labels):
    pl.seed_everything(0, verbose=False)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(30, 2 if labels == "domain" else 6))
    model = Classifier(net, label_smoothing=0.1, optimizer=lambda params: torch.optim.Adam(params, lr=0.05))
    made = trainer(tmp_path)
    stream = split(memory=40, labels=labels)
    made.fit(model, stream)
    assert torch.isfinite(made.callback_metrics["train/loss"])
    (tested,) = made.test(model, stream, verbose=False)
    # The same through the loaders of single tasks, which need no hook of a Trainer.
    hits = []
    for task in range(3):
        batch = whole(stream.task_dataloader(task, "test"))
        with torch.no_grad():
            logits = model.eval()(batch["image"])
        if "allowed" in batch:
            logits[~batch["allowed"]] = -torch.inf
        hits += (logits.argmax(1) == batch["label"]).tolist()
    assert tested["test/accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_batches_follow_the_precision_of_the_run(tmp_path):
    class Half(Writes):
        def training_step(self, batch, batch_idx):
            assert batch["image"].dtype == torch.bfloat16
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, precision="bf16-true").fit(Half(), split())


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "TaskStream", "--data.data", "MNIST5k", "--data.data.batch_size", "32", "--data.memory_size", "100"],
        ["--config", "datamodules/task_stream.yaml", "--data.data.batch_size", "32", "--data.memory_size", "100"],
        ["--data", "TaskStream", "--data.data", "[{class_path: MNIST5k, init_args: {batch_size: 32}}, photos/ulm]"],
    ],
    ids=["words", "preset", "list"],
)
def test_the_command_line_builds_a_stream(words):
    quiet = ["--model", "Classifier", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    stream = TrainingCLI([*quiet, *words], run=False).datamodule
    assert type(stream) is TaskStream
    assert stream.data[0].batch_size == 32
    assert type(stream.data[0]).__name__ == "MNIST5k"
    if len(stream.data) == 1:
        assert (stream.kind, stream.num_tasks, stream.memory_size) == ("permuted", 5, 100)
    else:
        assert (stream.kind, stream.data[1].data_dir) == ("list", "photos/ulm")
