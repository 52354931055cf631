"""Two processes share a manifest: each sample once, also after a resume and while the folder fills."""

import math
import multiprocessing
import os
import socket
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from multimodal_cases import CLASSES, SCHEMA, SumsOfInputs, trainer, write_csv, write_rows

from ds_lightning.callbacks import ExactResume
from ds_lightning.datamodules import MultimodalManifest
from ds_lightning.datamodules.manifest_values import Decoder
from ds_lightning.datamodules.manifest_watch import FolderWatch
from ds_lightning.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*(fork|num_workers|sampler|val_dataloader|litlogger|resum).*")
BATCH = 5


class Keeps(SumsOfInputs):
    """The numbers of the rows of each batch: `age` is the row's number, and here it is read back."""

    def __init__(self, folder, rows):
        super().__init__()
        self.folder, self.rows = folder, rows
        self.train_rows, self.shares, self.val_rows = [], [], []

    def numbers(self, batch):
        # Of 0 to rows - 1, which all are in the training manifest.
        std = math.sqrt((self.rows**2 - 1) / 12)
        return (batch["table"][:, 0] * std + (self.rows - 1) / 2).round().long().tolist()

    def training_step(self, batch, batch_idx):
        self.train_rows.append((self.current_epoch, batch_idx, self.numbers(batch)))
        self.shares.append(batch["mix"].tolist() if "mix" in batch else [])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.val_rows += self.numbers(batch)

    def on_fit_end(self):
        kept = {"train": self.train_rows, "shares": self.shares, "val": self.val_rows}
        kept["skipped"] = [line for line, _ in self.trainer.datamodule.skipped]
        torch.save(kept, self.folder / f"{self.trainer.global_rank}.pt")


def on_ranks(job, *args):
    """Run a job on two processes that are there already when Lightning comes, as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # needs no new import of Lightning
    processes = [context.Process(target=_as_rank, args=(job, rank, port, args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def _as_rank(job, rank, port, args):
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    job(*args)


def trainer_of_two(**options):
    return trainer(strategy=DDPStrategy(process_group_backend="gloo"), devices=2, **options)


def kept(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def fit(manifest, rows, folder, options, ckpt_path=None, save=None):
    torch.manual_seed(0)
    data = MultimodalManifest(
        str(manifest), **{"schema": SCHEMA, "val_path": str(manifest), "batch_size": BATCH, "seed": 1, **options}
    )
    callbacks = [ExactResume(seed=0)]
    if save is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=save, save_top_k=-1))
    folder.mkdir(exist_ok=True)
    run = trainer_of_two(max_epochs=2, callbacks=callbacks, enable_checkpointing=save is not None)
    run.fit(Keeps(folder, rows), data, ckpt_path=ckpt_path, weights_only=True)


def each(job, cases):
    for case in cases:
        job(*case)


def test_each_epoch_the_ranks_share_all_rows(tmp_path):
    cases = [(rows, bucket) for rows in (24, 23) for bucket in (True, False)]
    manifests = {rows: write_rows(tmp_path / f"rows{rows}", rows) for rows in (24, 23)}
    on_ranks(each, fit, [(manifests[rows], rows, tmp_path / f"{rows}{on}", {"bucket": on}) for rows, on in cases])
    for rows, bucket in cases:
        ranks = kept(tmp_path / f"{rows}{bucket}")
        orders = []
        for epoch in range(2):
            steps = [[batch for e, _, batch in rank["train"] if e == epoch] for rank in ranks]
            assert [len(batch) for batch in steps[0]] == [len(batch) for batch in steps[1]]
            assert sorted(map(len, steps[0])) == [2, 5, 5]
            together = [row for of_rank in steps for batch in of_rank for row in batch]
            assert set(together) == set(range(rows))
            # Where they don't divide by two, one comes twice, and no more.
            assert len(together) == 24
            orders.append(together)
        assert orders[0] != orders[1]
        # The validation is shared in the same way, by Lightning.
        assert {row for rank in ranks for row in rank["val"]} == set(range(rows))
        assert [len(rank["val"]) for rank in ranks] == [12 * 2] * 2


def twice(manifest, folder, options):
    fit(manifest, 24, folder / "whole", options, save=2)
    torch.distributed.barrier()
    fit(manifest, 24, folder / "resumed", options, ckpt_path=folder / "whole" / "step=2.ckpt")


def test_a_fit_that_is_cut_in_an_epoch_goes_on_with_the_same_batches(tmp_path):
    manifest = write_rows(tmp_path / "rows", 24)
    cases = [(True, 0), (False, 0), (True, 1)]
    for case in cases:
        (tmp_path / str(case)).mkdir()
    options = [{"bucket": bucket, "num_workers": workers, "mix": "mixup"} for bucket, workers in cases]
    on_ranks(each, twice, [(manifest, tmp_path / str(case), of) for case, of in zip(cases, options, strict=True)])
    for case in cases:
        whole, resumed = (kept(tmp_path / str(case) / name) for name in ("whole", "resumed"))
        for one, other in zip(whole, resumed, strict=True):
            # The checkpoint is of step 2, and an epoch has 3.
            assert [place[:2] for place in other["train"]] == [(0, 2), (1, 0), (1, 1), (1, 2)]
            assert other["train"] == one["train"][2:]
            assert other["shares"] == one["shares"][2:]
        assert whole[0]["shares"] != whole[1]["shares"], "each mixes by its own numbers"


AGES = {"columns": {"age": "table"}, "label": "y"}


def add(folder, first, count):
    path = folder / f"part{first}.csv"
    write_csv(path, [{"age": n, "y": CLASSES[n % 2]} for n in range(first, first + count)])
    then = time.time() - 60
    os.utime(path, (then, then))


class Late(MultimodalManifest):
    """The second process comes to look when more has arrived since the first one looked."""

    def __init__(self, *args, folder, **options):
        super().__init__(*args, **options)
        self.marks = folder
        self.looks = 0
        self.known = []

    def _look(self, data, watcher):
        self.looks += 1
        mark = self.marks / f"looked{self.looks}"
        if self.trainer.global_rank == 1:
            until = time.monotonic() + 30
            while not mark.exists() and time.monotonic() < until:
                time.sleep(0.01)
        return super()._look(data, watcher)

    def train_dataloader(self):
        loader = super().train_dataloader()
        splits = {name: split.rows for name, split in self._splits.items()}
        self.known.append({n: sorted(int(self.data.store.row(i)["age"]) for i in splits[n].tolist()) for n in splits})
        return loader


class Raw(SumsOfInputs):
    def __init__(self):
        super().__init__()
        self.train_rows = []

    def training_step(self, batch, batch_idx):
        mean, std = (value.view(-1)[0] for value in self.trainer.datamodule._statistics.values["table"])
        ages = (batch["table"][:, 0] * std + mean).round().long().tolist()
        self.train_rows += [(self.current_epoch, age) for age in ages]
        return self.layer(torch.nn.functional.pad(batch["table"], (0, 3))).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


def watch(folder, marks):
    looked = FolderWatch.look
    looks = []

    def look_and_let_more_come(self):
        found = looked(self)
        looks.append(len(looks) + 1)
        add(folder, 100 * looks[-1], 16)
        (marks / f"looked{looks[-1]}").touch()
        return found

    FolderWatch.look = look_and_let_more_come
    data = Late(str(folder), AGES, watch=True, val_fraction=0.3, batch_size=4, folder=marks)
    model = Raw()
    trainer_of_two(max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(model, data)
    rank = torch.distributed.get_rank()
    torch.save({"known": data.known, "train": model.train_rows}, marks / f"{rank}.pt")


def test_the_ranks_see_the_same_rows_while_a_folder_fills(tmp_path):
    folder, marks = tmp_path / "rows", tmp_path / "marks"
    folder.mkdir()
    marks.mkdir()
    add(folder, 0, 16)
    on_ranks(watch, folder, marks)
    ranks = kept(marks)
    assert ranks[0]["known"] == ranks[1]["known"]
    # Each hundred came after a look: at the setup, and at each epoch's loader.
    hundreds = [{age // 100 for ages in known.values() for age in ages} for known in ranks[0]["known"]]
    assert hundreds == [{0, 1}, {0, 1, 2}]
    for epoch, known in enumerate(ranks[0]["known"]):
        shares = [[age for e, age in rank["train"] if e == epoch] for rank in ranks]
        assert set(shares[0]) | set(shares[1]) == set(known["train"])
        assert len(shares[0]) == len(shares[1]) == math.ceil(len(known["train"]) / 2)


def fit_with_a_late_file(manifest, folder):
    read = MultimodalManifest.setup

    def setup(data, stage=None):
        # The clip is there for the first process only.
        if data.trainer.global_rank == 1:
            path_of = Decoder._file
            Decoder._file = lambda self, value: path_of(self, "nowhere.wav" if value == "4.wav" else value)
        read(data, stage)

    MultimodalManifest.setup = setup
    fit(manifest, 24, folder, {"on_error": "skip", "val_path": None, "val_fraction": 0.25, "bucket": False})


def test_a_file_that_one_rank_lacks_is_left_out_by_both(tmp_path):
    manifest = write_rows(tmp_path / "rows", 24)
    on_ranks(fit_with_a_late_file, manifest, tmp_path / "out")
    ranks = kept(tmp_path / "out")
    assert len(ranks[0]["train"]) == len(ranks[1]["train"]) == 2 * 2
    assert ranks[0]["skipped"] == ranks[1]["skipped"] == [6]


def test_ranks_that_read_manifests_of_different_lengths_say_so(tmp_path, monkeypatch):
    data = MultimodalManifest(str(write_rows(tmp_path / "rows", 24)), SCHEMA)
    data.setup()

    def gather(found, mine):
        found[:] = [mine, [(mine[0][0] + 1, {})]]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(DataError, match="different lengths; expected the same files for all of them"):
        data.data.agree()
