import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import ContinualMetrics
from ds_lightning.callbacks._continual_picture import accuracy_heat_map
from ds_lightning.datamodules import InMemoryImageData, TaskStream
from ds_lightning.errors import ConfigError, NoEffectWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*"
)


class Spots(InMemoryImageData):
    """Four classes, told apart by where the light is; 24 for training and 11 for testing each, not a whole batch."""

    class_names = tuple("abcd")
    source = "made up"

    def load(self):
        generator = torch.Generator().manual_seed(3)

        def draw(count):
            labels = torch.arange(4).repeat(count)
            images = torch.randint(0, 60, (len(labels), 1, 4, 4), generator=generator)
            images[torch.arange(len(labels)), 0, labels, labels] += 190
            return images.to(torch.uint8), labels

        return draw(24), draw(11)


class Net(pl.LightningModule):
    """A user's module with dropout, and a part that the user keeps in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Dropout(0.4), nn.ReLU(), nn.Linear(12, 4))
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        logits = self(batch["image"])
        if "allowed" in batch:
            logits = logits.masked_fill(~batch["allowed"], -math.inf)
        return nn.functional.cross_entropy(logits, batch["label"])

    def on_train_epoch_start(self):
        self.frozen.eval()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


class Pictures(Logger):
    name, version = "pictures", 0

    def __init__(self):
        super().__init__()
        self.metrics, self.figures = [], []

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_figure(self, figure, name):
        self.figures.append((figure, name))


def stream(**options):
    return TaskStream(
        Spots(batch_size=8, val_fraction=0.15),
        **{"kind": "split", "tasks": 2, "epochs_per_task": 2, "labels": "known", **options},
    )


def trainer(*callbacks, **options):
    return pl.Trainer(
        **{
            "max_epochs": 4,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(item, ModelCheckpoint) for item in callbacks),
            "callbacks": list(callbacks),
            **options,
        }
    )


def by_hand(module, data, split, task):
    """One sample after the other, the outputs of other tasks left out."""
    net, right, seen = module.net.eval(), 0, 0
    with torch.no_grad():
        for batch in data.task_dataloader(task, split):
            for i in range(len(batch["label"])):
                logits = net(batch["image"][i : i + 1])[0]
                outputs = range(4) if "allowed" not in batch else batch["allowed"][i].nonzero()[:, 0].tolist()
                right += int(max(outputs, key=lambda c: logits[c].item()) == int(batch["label"][i]))
                seen += 1
    return right / seen


class Copies(pl.Callback):
    """The module as it is at the start of training and at each epoch's end."""

    def __init__(self):
        self.kept = []

    def on_train_start(self, trainer, pl_module):
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        copy = Net()
        copy.load_state_dict(pl_module.state_dict())
        self.kept.append(copy)


@pytest.mark.parametrize("options", [{}, {"labels": "class"}, {"split": "val"}], ids=["known", "class", "val"])
def test_rows_are_the_accuracies_counted_by_hand(options):
    options = dict(options)
    split = options.pop("split", "test")
    data, callback, copies = stream(**options), ContinualMetrics(split=split), Copies()
    logger = Pictures()
    fit = trainer(callback, copies, logger=logger)
    fit.fit(Net(), data)
    expected = [[by_hand(copies.kept[epoch], data, split, task) for task in range(2)] for epoch in (0, 2, 4)]
    assert callback.untrained.tolist() == expected[0]
    matrix = callback.matrix
    assert matrix.tolist() == expected[1:]
    assert matrix.max() > 0.7  # something was learned

    ends = [(step, found) for step, found in logger.metrics if "continual/average_accuracy" in found]
    batches = len(data.train_dataloader())
    assert [step for step, _ in ends] == [2 * batches - 1, 4 * batches - 1]
    first, last = (found for _, found in ends)
    assert "continual/forgetting" not in first
    assert first["continual/average_accuracy"] == pytest.approx(matrix[0, 0].item())
    assert last["continual/accuracy/a-b"] == pytest.approx(matrix[1, 0].item())
    assert last["continual/accuracy/c-d"] == pytest.approx(matrix[1, 1].item())
    assert last["continual/average_accuracy"] == pytest.approx(matrix[1].mean().item())
    lost = (matrix[0, 0] - matrix[1, 0]).item()
    assert last["continual/forgetting"] == pytest.approx(lost)
    assert last["continual/backward_transfer"] == pytest.approx(-lost)
    assert last["continual/forward_transfer"] == pytest.approx((matrix[0, 1] - callback.untrained[1]).item())
    assert last["continual/largest_drop"] == pytest.approx(max(lost, 0.0))
    assert fit.callback_metrics["continual/forgetting"].item() == pytest.approx(lost)
    assert [name for _, name in logger.figures] == ["continual_accuracy"] * 2
    assert all(isinstance(figure, Figure) for figure, _ in logger.figures)


def test_it_changes_neither_training_nor_modes_nor_generators():
    class Modes(pl.Callback):
        runs_after = ("ContinualMetrics",)

        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            modes = [part.training for part in pl_module.modules()]
            self.seen.append((modes, torch.random.get_rng_state(), random.random(), np.random.random()))

    def run(*callbacks):
        pl.seed_everything(5, verbose=False)
        module, modes = Net(), Modes()
        trainer(modes, *callbacks).fit(module, stream())
        return module, modes.seen

    def noisy(module, batch):
        random.random(), np.random.random(), torch.rand(3)
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        return torch.ones(len(batch["label"]))

    plain, seen_plain = run()
    measured, seen = run(ContinualMetrics(score_fn=noisy))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), measured.parameters(), strict=True))
    for (modes_a, state_a, *draws_a), (modes_b, state_b, *draws_b) in zip(seen_plain, seen, strict=True):
        assert modes_a == modes_b
        assert True in modes_a
        assert False in modes_a
        assert torch.equal(state_a, state_b)
        assert draws_a == draws_b


def test_it_sees_the_weights_after_consolidation():
    class ElasticWeightConsolidation(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.zero_()
                pl_module.net[4].bias[0] = 1.0  # now everything is class a

    callback = ContinualMetrics()
    fit = trainer(callback, ElasticWeightConsolidation())
    fit.fit(Net(), stream(labels="class"))
    assert callback.matrix.tolist() == [[0.5, 0.0], [0.5, 0.0]]
    assert [type(item).__name__ for item in fit.callbacks[:2]] == ["ElasticWeightConsolidation", "ContinualMetrics"]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_fit_ends_with_the_same_matrix(epoch, tmp_path):
    options = {"labels": "class", "tasks": 2}

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                raise RuntimeError("stop")

    def deterministic():
        module = Net()
        module.net[2].p = 0.0
        return module

    whole, cut, resumed = ContinualMetrics(), ContinualMetrics(), ContinualMetrics()
    trainer(whole).fit(deterministic(), stream(**options))
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(cut, saver, Stop()).fit(deterministic(), stream(**options))
    path = tmp_path / f"epoch={epoch - 1}.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["ContinualMetrics"]
    assert state["tasks"] == ["a-b", "c-d"]
    assert state["matrix"].isnan().all(dim=1).tolist() == [epoch < 2, True]
    trainer(resumed).fit(deterministic(), stream(**options), ckpt_path=path)
    assert torch.equal(resumed.matrix, whole.matrix)
    assert torch.equal(resumed.untrained, whole.untrained)
    trainer().fit(deterministic(), stream(**options), ckpt_path=path)  # loads without the callback


def test_a_checkpoint_of_other_tasks_is_refused_and_one_without_state_warns(tmp_path):
    fit = trainer(ContinualMetrics(), max_epochs=2)
    fit.fit(Net(), stream(allow_other_length=True))
    fit.save_checkpoint(tmp_path / "with.ckpt")
    with pytest.raises(ConfigError, match="tasks are a-b, c-d, the stream's a, b, c, d; resume with the stream"):
        trainer(ContinualMetrics(), max_epochs=8).fit(
            Net(), stream(tasks=4, labels="class"), ckpt_path=tmp_path / "with.ckpt"
        )
    plain = trainer(max_epochs=2)
    plain.fit(Net(), stream(allow_other_length=True))
    plain.save_checkpoint(tmp_path / "without.ckpt")
    callback, logger = ContinualMetrics(), Pictures()
    with pytest.warns(UserWarning, match="without its state: the earlier tasks' rows are missing"):
        trainer(callback, logger=logger).fit(Net(), stream(), ckpt_path=tmp_path / "without.ckpt")
    assert callback.matrix.isnan().tolist() == [[True, True], [False, False]]
    names = {name for _, found in logger.metrics for name in found if name.startswith("continual/")}
    assert names == {"continual/accuracy/a-b", "continual/accuracy/c-d"}


def test_a_second_fit_starts_afresh_and_the_matrix_stays_after_fit():
    callback = ContinualMetrics()
    assert callback.matrix.shape == (0, 0)
    assert callback.state_dict() == {}
    trainer(callback).fit(Net(), stream())
    assert callback.matrix.shape == (2, 2)
    trainer(callback, max_epochs=6).fit(Net(), stream(kind="permuted", tasks=3, labels="class"))
    assert callback.matrix.shape == (3, 3)
    assert not callback.matrix.isnan().any()


def test_what_cannot_be_measured_is_refused_at_the_start():
    loader = DataLoader(TensorDataset(torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(ConfigError, match=r"expected a stream such as TaskStream.*TaskStream\(\[first, second"):
        trainer(ContinualMetrics()).fit(Net(), loader)
    data = stream()
    data.setup()
    data._made.rows["test"][1] = torch.empty(0, dtype=torch.int64)
    with pytest.raises(
        ConfigError, match="task 1 has no test samples for ContinualMetrics; add some, or set its split='val'"
    ):
        trainer(ContinualMetrics()).fit(Net(), data)
    with pytest.raises(ConfigError, match="split is 'train'; expected test or val"):
        ContinualMetrics(split="train")


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda module, batch: 1.0, "score_fn gave float; expected a tensor"),
        (lambda module, batch: torch.ones(2, 2), r"score_fn gave \(2, 2\); expected a tensor \(B,\)"),
        (None, r"Net gave \(8,\), and the batch has label of shape \(8,\); expected outputs .* score_fn"),
    ],
)
def test_a_module_that_gives_something_else_needs_a_score(score, message):
    module = Net()
    if score is None:
        module.forward = lambda x: module.net(x)[:, 0]
    with pytest.raises(ConfigError, match=message):
        trainer(ContinualMetrics(score_fn=score)).fit(module, stream())


def test_a_fit_in_which_no_task_ends_says_so():
    with pytest.warns(NoEffectWarning, match="no task ended"):
        trainer(ContinualMetrics(), max_epochs=1).fit(Net(), stream(allow_other_length=True))


def score_and_note(module, batch):
    module.scored = getattr(module, "scored", 0) + len(batch["label"])
    return module(batch["image"]).argmax(1) == batch["label"]


class TwoRanks(pl.Callback):
    """Checks on each rank, because the processes are gone after the fit."""

    runs_after = ("ContinualMetrics",)

    def on_train_epoch_end(self, trainer, pl_module):
        metrics = next(item for item in trainer.callbacks if isinstance(item, ContinualMetrics))
        if metrics.matrix[1].isnan().any():
            return
        data = trainer.datamodule
        modes = [part.training for part in pl_module.modules()]
        row = [by_hand(pl_module, data, "test", task) for task in range(2)]
        for part, training in zip(pl_module.modules(), modes, strict=True):
            part.training = training
        assert metrics.matrix[1].tolist() == row
        # 22 samples a task in batches of 8, 8, 6: rank 0 has the first and third, three times over.
        assert pl_module.scored == 3 * 2 * (14, 8)[trainer.global_rank]


def test_two_ranks_share_the_samples_and_count_each_once():
    fit = trainer(
        TwoRanks(), ContinualMetrics(score_fn=score_and_note), accelerator="cpu", devices=2, strategy="ddp_fork"
    )
    fit.fit(Net(), stream(labels="class"))
    assert fit.callback_metrics["continual/average_accuracy"] > 0.3


def test_the_picture_has_a_number_for_each_accuracy():
    matrix = torch.tensor([[0.91, 0.125], [math.nan, math.nan]])
    figure = accuracy_heat_map(matrix, ["clear", "a very long name of a task"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.91", "0.12"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clear", "a very long n…"]
