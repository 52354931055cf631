"""What is logged of removals is right, and measuring it changes nothing."""

import copy
import json
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from pruning_cases import (
    BATCH,
    CLASSES,
    WIDTH,
    FixedPlans,
    Images,
    equal,
    loader,
    macs_of,
    plan_keeping,
    samples,
)
from pruning_cases import tensors as weights_of
from pruning_cases import trainer as make_trainer
from test_pruning_ddp import on_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ds_lightning.callbacks import ExactResume, ProgressivePruning
from ds_lightning.callbacks._pruning_picture import channel_bars, kept_channels
from ds_lightning.errors import ConfigError
from ds_lightning.networks import PruningPlan, apply_plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|num_workers|litlogger|log_every_n_steps|fork|shuffling|no `val_dataloader`|dirpath).*"
)

A, B = (0, 2, 3, 5, 8, 9, 11, 12, 13, 15), (1, 2, 4, 6, 7, 10, 12, 14)
A2, B2 = (0, 1, 3, 4, 6, 9), (0, 2, 5, 7)
TWICE = {"target": 0.05, "network": "net", "schedule": "linear", "start": 0, "end": 6, "every": 3}
HELD_OUT = 30


def two_removals(monkeypatch):
    later = plan_keeping(A2, B2, before=(len(A), len(B)), prefix=None)
    FixedPlans(plan_keeping(A, B, prefix=None), later).into(monkeypatch)


class Pictures(Logger):
    def __init__(self):
        super().__init__()
        self.rows, self.figures = [], {}

    name = version = property(lambda self: "pictures")

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_figure(self, figure, name):
        assert name not in self.figures
        self.figures[name] = figure

    def accuracies(self):
        """Step -> the accuracies that were logged with it."""
        found = {}
        for step, row in self.rows:
            short = {k.removeprefix("pruning/accuracy_"): v for k, v in row.items() if "pruning/accuracy" in k}
            if short:
                found.setdefault(step, {}).update(short)
        return found


def held_out(count=HELD_OUT):
    """Sorted by class, and so noisy that the network is not always right."""
    x, y = samples(count)
    order = y.argsort(stable=True)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    return TensorDataset((x + noise)[order], y[order])


class Copies(pl.Callback):
    """The module as it is at the end of each batch."""

    def __init__(self, into):
        self.into = into

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.into.append(copy.deepcopy(pl_module.net))


def accuracy_of(network, data):
    with torch.no_grad():
        x, y = data.tensors
        return float((network.eval()(x).argmax(1) == y).double().mean())


def test_accuracies_are_those_of_a_plain_loop(monkeypatch):
    two_removals(monkeypatch)
    before, after, logs, data = [], [], Pictures(), held_out()
    pruning = ProgressivePruning(**TWICE)
    run = make_trainer(Copies(before), pruning, Copies(after), logger=logs, log_every_n_steps=1)
    run.fit(Images(torch.optim.Adam, 0.005), loader(), DataLoader(data, 7))
    truth = [accuracy_of(network, data) for network in (before[2], after[2], before[5], after[5], after[7])]
    assert len(set(truth)) >= 4
    first, second, end = truth[:2], truth[2:4], truth[4]
    expected = {
        2: {"before": first[0], "after": first[1]},
        5: {"before": second[0], "after": second[1], "recovered": second[0]},
        7: {"recovered": end},
    }
    logged = logs.accuracies()
    assert logged.keys() == expected.keys()
    for step, row in expected.items():
        assert logged[step] == pytest.approx(row)


def test_so_many_batches_are_measured_spread_over_the_data(monkeypatch):
    two_removals(monkeypatch)
    seen = []

    class Watched(Images):
        def forward(self, x):
            if not self.training and not self.trainer.sanity_checking and len(x) == 5:
                seen.append(x)
            return super().forward(x)

        def validation_step(self, batch, batch_idx): ...

    data = held_out()
    once = ProgressivePruning(network="net", schedule="one-shot", start=3, report_batches=2)
    make_trainer(once, logger=Pictures(), epochs=1).fit(Watched(), loader(), DataLoader(data, 5))
    assert len(seen) == 3 * 2  # before, after, and at the end
    for pair in (seen[:2], seen[2:4], seen[4:]):
        assert torch.equal(torch.cat(pair), data.tensors[0][::3])


class Drawing(Dataset):
    """Augments from every global generator."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + 0.1 * (torch.randn(1) + np.random.rand() + random.random()), y


class Dropping(Images):
    def __init__(self):
        super().__init__(torch.optim.Adam, 0.02)
        self.net.insert(8, nn.Dropout(0.3))


class States(pl.Callback):
    """All that training depends on, after each batch."""

    def __init__(self, generator):
        self.generator, self.seen = generator, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        drawn = torch.get_rng_state(), self.generator.get_state(), random.getstate(), str(np.random.get_state())
        modes = [part.training for part in pl_module.modules()], str(trainer.state.stage)
        self.seen.append((weights_of(pl_module), drawn, modes))


@pytest.mark.parametrize("persistent", [False, True])
def test_training_is_bit_equal_with_and_without(persistent):
    seen = {}
    options = {"num_workers": 1, "persistent_workers": True} if persistent else {}
    for batches in (0, 8):
        pl.seed_everything(3, verbose=False)
        generator, module, logs = torch.Generator().manual_seed(4), Dropping(), Pictures()
        data = Drawing(held_out())
        pruning = ProgressivePruning(0.4, start=0, end=6, every=3, round_to=1, min_channels=1, report_batches=batches)
        states = States(generator)
        run = make_trainer(pruning, states, logger=logs, epochs=3 - persistent, val_check_interval=2)
        held = DataLoader(data, 7, shuffle=True, generator=generator, **options)
        run.fit(module, DataLoader(Drawing(TensorDataset(*samples())), BATCH, shuffle=True), held)
        optimizer = run.optimizers[0].state_dict()["state"]
        validated = [row["val"] for _, row in logs.rows if "val" in row]
        seen[batches] = states.seen, optimizer, validated, weights_of(module)
        assert bool(logs.accuracies()) is (batches > 0)
    assert equal(seen[0], seen[8])


class Regression(Images):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    def validation_step(self, batch, batch_idx): ...


class Pieces(Images):
    """Outputs that are no logits."""

    def forward(self, x):
        return {"logits": super().forward(x)} if len(x) == 5 else super().forward(x)

    def validation_step(self, batch, batch_idx): ...


class Raises(Images):
    """Fails where a stage and modes have been changed."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.state.stage == "validate" and self.trainer.global_step:
            torch.rand(1)
            raise KeyError("a column that is missing")
        return batch


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in zip(*held_out().tensors, strict=True)])


def soft():
    x, y = held_out().tensors
    return TensorDataset(x, F.one_hot(y, CLASSES).float())


@pytest.mark.parametrize(
    ("module", "data", "reason"),
    [
        (Images, None, "no validation loader"),
        (Images, Stream(), "Stream, which can't be read"),
        (Regression, soft(), "label has the shape"),
        (Pieces, held_out(), "gives dict and not logits"),
        (Images, TensorDataset(held_out().tensors[0]), "expected `label`"),
        (Raises, held_out(), "a column that is missing"),
    ],
)
def test_what_is_no_classifier_is_left_out_once_and_trains_on(module, data, reason, monkeypatch, caplog):
    monkeypatch.setattr(Images, "validation_step", lambda *_: None)
    ends, logs = {}, Pictures()
    for batches in (0, 8):
        two_removals(monkeypatch)
        pl.seed_everything(3, verbose=False)
        made, held = module(), None if data is None else DataLoader(data, 5)
        logs, stages = Pictures(), States(torch.Generator())
        options = {"logger": logs, "check_val_every_n_epoch": 5}
        with caplog.at_level("INFO"):
            make_trainer(ProgressivePruning(**TWICE, report_batches=batches), stages, **options).fit(
                made, loader(), held
            )
        ends[batches] = weights_of(made), stages.seen
    assert equal(ends[0], ends[8])
    assert logs.accuracies() == {}
    assert sum("pruning/macs" in row for _, row in logs.rows) == 2
    assert set(logs.figures) == {"pruning/channels_1", "pruning/channels_2"}
    told = [record.message for record in caplog.records if "no accuracy" in record.message]
    assert len(told) == 1
    assert reason in told[0]


def test_without_a_logger_nothing_is_measured(monkeypatch):
    two_removals(monkeypatch)
    pruning = ProgressivePruning(**TWICE)
    make_trainer(pruning).fit(Images(torch.optim.Adam, 0.005), loader(), DataLoader(held_out(), 7))
    assert [sorted(point) for point in pruning.state_dict()["points"]] == [["share", "share_before"]] * 2


def test_a_resumed_fit_draws_the_removals_from_before_too(monkeypatch, tmp_path):
    points, drawn = {}, {}
    every = {"every_n_train_steps": 1, "save_top_k": -1}
    for name, resume in (("whole", None), ("resumed", tmp_path / "whole" / "step=4.ckpt")):
        two_removals(monkeypatch)
        if resume:
            FixedPlans(plan_keeping(A2, B2, before=(len(A), len(B)), prefix=None)).into(monkeypatch)
        pruning, logs = ProgressivePruning(**TWICE), Pictures()
        saves = ModelCheckpoint(tmp_path / name, "{step}", **every)
        pl.seed_everything(1, verbose=False)
        run = make_trainer(pruning, ExactResume(), saves, logger=logs)
        run.fit(
            Images(torch.optim.Adam, 0.005),
            loader(),
            DataLoader(held_out(), 7),
            ckpt_path=resume,
            weights_only=True if resume else None,
        )
        points[name] = pruning.state_dict()["points"]
        drawn[name] = [tuple(map(tuple, line.get_xydata())) for line in logs.figures["pruning/pareto"].axes[0].lines]
    assert points["resumed"] == points["whole"]
    assert drawn["resumed"] == drawn["whole"]
    assert json.loads(json.dumps(points["whole"])) == points["whole"]


def test_pictures_show_what_was_removed(monkeypatch):
    two_removals(monkeypatch)
    logs, pruning = Pictures(), ProgressivePruning(**TWICE)
    make_trainer(pruning, logger=logs).fit(Images(torch.optim.Adam, 0.005), loader(), DataLoader(held_out(), 7))
    assert list(logs.figures) == ["pruning/channels_1", "pruning/channels_2", "pruning/pareto"]
    for number, kept in ((1, (len(A), len(B))), (2, (len(A2), len(B2)))):
        axes = logs.figures[f"pruning/channels_{number}"].axes[0]
        full, now = ([bar.get_width() for bar in bars] for bars in axes.containers)
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "3", "8"]
        assert full == [WIDTH, WIDTH, CLASSES]
        assert now == [*kept, CLASSES]
    shares = [100 * macs_of(*kept) / macs_of(WIDTH, WIDTH) for kept in ((len(A), len(B)), (len(A2), len(B2)))]
    lines = {line.get_label(): line.get_xydata() for line in logs.figures["pruning/pareto"].axes[0].lines}
    rows = logs.accuracies()
    for label, x, y in (
        ("before a removal", [100, shares[0]], [rows[2]["before"], rows[5]["before"]]),
        ("right after it", shares, [rows[2]["after"], rows[5]["after"]]),
        ("recovered, before the next or at the end", shares, [rows[5]["recovered"], rows[7]["recovered"]]),
    ):
        np.testing.assert_allclose(lines[label], np.stack([x, y], 1))


def test_channels_of_every_kind_of_layer():
    network = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 12, 3, groups=2),
            "up": nn.ConvTranspose2d(12, 6, 3),
            "ids": nn.Embedding(9, 10),
            "attention": nn.MultiheadAttention(8, 2),
            "limited": spectral_norm(nn.Linear(6, 5)),
        }
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    shapes = {"conv.weight": (12, 2, 3, 3), "conv.bias": (12,), "up.weight": (12, 6, 3, 3), "up.bias": (6,)}
    kept = {
        **{"conv.weight": {0: tuple(range(6))}, "conv.bias": {0: tuple(range(6))}},
        **{"up.weight": {0: tuple(range(6)), 1: (0, 5)}, "up.bias": {0: (0, 5)}},
        "ids.weight": {1: (1, 2, 3)},
    }
    conv = {"in_channels": 2, "out_channels": 6, "groups": 1}
    attributes = {"conv": conv, "up": {"in_channels": 6, "out_channels": 2}, "ids": {"embedding_dim": 3}}
    apply_plan(network, PruningPlan({**shapes, "ids.weight": (9, 10)}, kept, attributes))
    assert kept_channels(network) == {
        **{"conv": (6, 12), "up": (2, 6), "ids": (3, 10), "attention.in_proj": (24, 24)},
        **{"attention.out_proj": (8, 8), "limited": (5, 5)},
    }
    left = {name: value for name, value in network.state_dict().items() if name.startswith(("limited", "attention"))}
    assert equal(left, {name: before[name] for name in left})  # also the vectors of the spectral norm


def test_of_too_many_layers_those_that_lost_most_are_shown():
    kept = {f"layer{i}": (100 - i % 100, 100) for i in range(200)}
    axes = channel_bars(kept, "all").axes[0]
    shown = [int(text.get_text().removeprefix("layer")) for text in axes.get_yticklabels()]
    assert shown == [i for i in range(200) if i % 100 >= 25]
    assert "150 layers that lost most" in axes.get_title()


def test_a_negative_number_of_batches_is_refused():
    with pytest.raises(ConfigError, match="report_batches is -1; expected a number of batches >= 0"):
        ProgressivePruning(report_batches=-1)


class Apart(Images):
    """Each rank trains on its own samples, and all validate on the same."""

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(
            TensorDataset(*samples()), batch_size=8 // ranks, sampler=range(rank, len(samples()[1]), ranks)
        )

    def val_dataloader(self):
        return DataLoader(held_out(), 4)


class Counts(pl.Callback):
    """How many samples of its batches, every second one, a rank has right in front of the removal and at the end."""

    def __init__(self):
        self.right = []

    def count(self, module, rank):
        network = copy.deepcopy(module.net).eval()
        mine = list(DataLoader(held_out(), 4))[rank::2]
        with torch.no_grad():
            self.right.append(sum(int((network(x).argmax(1) == y).sum()) for x, y in mine))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            self.count(pl_module, trainer.global_rank)

    def on_train_end(self, trainer, pl_module):
        self.count(pl_module, trainer.global_rank)


def on_one_rank(root, **options):
    pl.seed_everything(1, verbose=False)
    pruning, counts = ProgressivePruning(0.4, "params", "one-shot", 3, round_to=1, min_channels=1), Counts()
    logs = Pictures()
    run = make_trainer(counts, pruning, epochs=1, **options)
    run.loggers = [logs] if run.global_rank == 0 else []  # as of those who make a logger on rank 0 alone
    run.fit(Apart(torch.optim.Adam, 0.005))
    (point,) = pruning.state_dict()["points"]
    torch.save((point, counts.right, logs.accuracies()), root / f"{run.global_rank}.pt")


def test_two_ranks_share_the_batches(tmp_path):
    assert on_ranks(on_one_rank, tmp_path) == [0, 0]
    (point, mine, rows), (other, theirs, none) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    right = [a + b for a, b in zip(mine, theirs, strict=True)]
    assert [point["before"], point["recovered"]] == pytest.approx([count / HELD_OUT for count in right])
    assert other == point
    assert none == {}
    assert sorted(name for row in rows.values() for name in row) == ["after", "before", "recovered"]
