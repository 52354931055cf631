"""Real deaths between and during removals, and every way in which a smaller network comes back."""

import multiprocessing
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from pruning_cases import WIDTH, Images, convolutions, equal, loader, samples, tensors, trainer, widths
from torch.nn import functional as F
from torch.optim import Adam

from ds_lightning.callbacks import (
    DurableCheckpoint,
    DynamicLayerLR,
    ElasticWeightConsolidation,
    ExactResume,
    FiniteGuard,
    Preemption,
    ProgressivePruning,
    load_pruned,
)
from ds_lightning.checkpoints import newest_checkpoint
from ds_lightning.errors import ConfigError
from ds_lightning.modules._network_module import NetworkModule
from ds_lightning.networks import apply_plan, plan_of
from ds_lightning.networks.pruning_plan import CHECKPOINT_KEY, plan_in

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|num_workers|litlogger|no step of this fit|multipliers|val_dataloader|fork|Found keys).*"
)

# Three removals in twelve steps.
REMOVALS = (4, 7, 9)
OPTIONS = {"target": 0.3, "start": 1, "end": 9, "every": 3, "round_to": 1, "min_channels": 1, "importance": "taylor"}


def every_step(root):
    return ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)


def fitted(root, *callbacks, resume=None, module=None, seed=1, **options):
    pl.seed_everything(seed, verbose=False)
    module = module or Images(Adam, 0.02)
    pruning = ProgressivePruning(**{**OPTIONS, **options})
    run = trainer(*callbacks, pruning, ExactResume(), every_step(root), epochs=3)
    run.fit(module, loader(shuffle=True), ckpt_path=resume, weights_only=True if resume else None)
    return module, run


def end_of(module, run):
    return {"weights": tensors(module), "optimizer": run.optimizers[0].state_dict()["state"], "widths": widths(module)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A fit that was never interrupted, with the checkpoint of each step."""
    root = tmp_path_factory.mktemp("whole")
    return root, *fitted(root)


def test_three_removals_were_made(whole):
    root, *_ = whole
    sizes = [
        tuple(torch.load(root / f"step={step}.ckpt", weights_only=True)["state_dict"]["net.3.weight"].shape[:2])
        for step in range(1, 13)
    ]
    changes = [step + 1 for step in range(1, 12) if sizes[step] != sizes[step - 1]]
    assert sizes[0] == (WIDTH, WIDTH)
    assert changes == list(REMOVALS)


@pytest.mark.parametrize("step", [2, 4, 5, 8, 9, 11])
def test_resumed_from_any_step_it_ends_bit_equal(step, whole, tmp_path):
    root, *end = whole
    again = fitted(tmp_path, resume=root / f"step={step}.ckpt", seed=9)
    assert equal(end_of(*again), end_of(*end))
    ours, theirs = (torch.load(folder / "step=12.ckpt", weights_only=True) for folder in (tmp_path, root))
    assert ours[CHECKPOINT_KEY] == theirs[CHECKPOINT_KEY]


class Dies(pl.Callback):
    """Waits to be killed in front of a step, or while channels are on their way out."""

    def __init__(self, root, at, during):
        self.root, self.at, self.during = root, at, during

    def wait(self):
        (self.root / "waiting").touch()
        time.sleep(600)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at and not self.during:
            self.wait()

    def on_channels_removed(self, trainer, pl_module, plan):
        if trainer.global_step == self.at and self.during:
            self.wait()


def main(root, at, during, resume):
    others = (DynamicLayerLR("variance", every=2, warmup=4), FiniteGuard(), Preemption(), Dies(root, at, during))
    pl.seed_everything(9 if resume else 1, verbose=False)
    module = Images(Adam, 0.02)
    saves = DurableCheckpoint(dirpath=root, every_n_train_steps=1)
    run = trainer(ProgressivePruning(**OPTIONS), *others, ExactResume(), saves, epochs=3)
    run.fit(module, loader(shuffle=True), ckpt_path=newest_checkpoint(root) if resume else None, weights_only=True)
    torch.save(end_of(module, run), root / "end.pt")


@pytest.mark.parametrize(("at", "during"), [(6, False), (7, True)])
def test_killed_it_ends_bit_equal(at, during, tmp_path):
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    context = multiprocessing.get_context("fork")  # needs no new import of Lightning
    processes = {}
    for root, stop in ((uninterrupted, -1), (killed, at)):
        root.mkdir()
        processes[root] = context.Process(target=main, args=(root, stop, during, False))
        processes[root].start()
    while not (killed / "waiting").exists():
        assert processes[killed].is_alive()
        time.sleep(0.05)
    processes[killed].kill()
    for process in processes.values():
        process.join(200)
    assert [process.exitcode for process in processes.values()] == [0, -signal.SIGKILL]
    again = context.Process(target=main, args=(killed, -1, during, True))
    again.start()
    again.join(200)
    assert again.exitcode == 0
    ours, theirs = (torch.load(root / "end.pt", weights_only=True) for root in (killed, uninterrupted))
    assert equal(ours, theirs)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluation_with_a_checkpoint_prunes_first(entry, whole):
    root, module, _ = whole
    fresh, x = Images(seed=5), samples()[0]
    run = trainer(ProgressivePruning(**OPTIONS))
    getattr(run, entry)(fresh, loader(), ckpt_path=root / "step=12.ckpt", weights_only=True, **quiet(entry))
    assert equal(tensors(fresh), tensors(module))
    assert equal(fresh.eval()(x), module.eval()(x))
    assert not fresh._load_state_dict_pre_hooks


def quiet(entry):
    return {} if entry == "predict" else {"verbose": False}


class BuiltLate(Images):
    """Its network is there only after configure_model."""

    def __init__(self, width=WIDTH):
        super().__init__(Adam, 0.02)
        self.save_hyperparameters()
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = convolutions(self.hparams.width, self.hparams.width)


def test_a_network_built_in_configure_model(tmp_path):
    end = fitted(tmp_path / "a", module=BuiltLate())
    again = fitted(tmp_path / "b", module=BuiltLate(), resume=tmp_path / "a" / "step=8.ckpt", seed=9)
    assert equal(end_of(*again), end_of(*end))
    loaded = load_pruned(BuiltLate, tmp_path / "a" / "step=12.ckpt")
    assert equal(tensors(loaded), tensors(end[0]))


class BuiltWide(Images):
    def __init__(self, first=8, second=8):
        super().__init__(Adam, 0.02)
        self.save_hyperparameters()
        self.net = convolutions(first, second)


def test_load_pruned_makes_a_strangers_module(tmp_path):
    module, _ = fitted(tmp_path, module=BuiltWide(12, 14))
    x = samples()[0]
    loaded = load_pruned(BuiltWide, tmp_path / "step=12.ckpt")
    assert type(loaded) is BuiltWide
    assert dict(loaded.hparams) == {"first": 12, "second": 14}
    assert equal(loaded.eval()(x), module.eval()(x))
    assert plan_of(loaded) == plan_of(module)
    early = load_pruned(BuiltWide, tmp_path / "step=2.ckpt")
    assert widths(early) == (12, 14)
    with pytest.raises(ConfigError, match=r"net\."):
        load_pruned(BuiltWide, tmp_path / "step=12.ckpt", first=13)


class LoadsItself(BuiltWide):
    """What the docstring of load_pruned says."""

    def on_load_checkpoint(self, checkpoint):
        if plan := plan_in(checkpoint):
            apply_plan(self, plan)


class Ours(NetworkModule):
    """A module of the package's own base."""

    def __init__(self, first=8, second=8):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = convolutions(first, second)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx): ...

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.02)


@pytest.mark.parametrize("kind", [LoadsItself, Ours])
def test_modules_that_load_by_themselves(kind, tmp_path):
    module, _ = fitted(tmp_path, module=kind(12, 14))
    loaded = kind.load_from_checkpoint(tmp_path / "step=12.ckpt", weights_only=True)
    assert equal(tensors(loaded), tensors(module))
    fresh = kind(12, 14)
    trainer().test(fresh, loader(), ckpt_path=tmp_path / "step=12.ckpt", verbose=False, weights_only=True)
    assert equal(tensors(fresh), tensors(module))
    assert equal(tensors(load_pruned(kind, tmp_path / "step=12.ckpt")), tensors(module))


def test_our_modules_save_the_plan_without_the_callback(tmp_path):
    module, _ = fitted(tmp_path, module=Ours(12, 14))
    run = trainer(epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = Ours.load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert equal(tensors(loaded), tensors(module))


@pytest.mark.parametrize("step", [2, 8])
def test_a_checkpoint_of_a_larger_network_is_refused_in_one_line(step, whole, tmp_path):
    root, _, _ = whole
    module = load_pruned(Images, root / "step=12.ckpt")
    before = tensors(module)
    message = "checkpoint .* does not have the channels of this module: .*expected a new module"
    with pytest.raises(ConfigError, match=message) as caught:
        trainer(ProgressivePruning(**OPTIONS)).test(module, loader(), ckpt_path=root / f"step={step}.ckpt")
    assert "\n" not in str(caught.value)
    assert equal(tensors(module), before)


@pytest.mark.parametrize("average_first", [True, False])
def test_the_average_of_the_weights_resumes(average_first, tmp_path):
    ends = []
    for resume in (None, tmp_path / "step=8.ckpt"):
        average = EMAWeightAveraging(decay=0.7)
        pl.seed_everything(1 if resume is None else 9, verbose=False)
        module, pruning = Images(Adam, 0.02), ProgressivePruning(**OPTIONS)
        pair = (average, pruning) if average_first else (pruning, average)
        saver = every_step(tmp_path if resume is None else tmp_path / "again")
        trainer(*pair, ExactResume(), saver, epochs=3).fit(
            module, loader(shuffle=True), ckpt_path=resume, weights_only=True if resume else None
        )
        ends.append((tensors(module), tensors(average._average_model)))
    assert equal(*ends)


def test_elastic_weight_consolidation_resumes(tmp_path):
    first = ElasticWeightConsolidation(merge=None)
    trainer(first, epochs=1).fit(Images(), loader())
    memory, ends = first.state_dict(), []
    for resume in (None, tmp_path / "step=8.ckpt"):
        ewc = ElasticWeightConsolidation(merge=None)
        ewc.load_state_dict(memory)
        root = tmp_path if resume is None else tmp_path / "again"
        module, run = fitted(root, ewc, resume=resume, seed=1 if resume is None else 9)
        ends.append((end_of(module, run), ewc.state_dict()["importance"], ewc.tasks))
    assert ends[0][2] == 2
    assert equal(*ends)


def test_a_second_fit_goes_on_from_the_smaller_network(tmp_path):
    module, _ = fitted(tmp_path / "a")
    first = widths(module)
    fitted(tmp_path / "b", module=module)
    assert all(now < then for now, then in zip(widths(module), first, strict=True))
    loaded = load_pruned(Images, tmp_path / "b" / "step=12.ckpt")
    assert equal(tensors(loaded), tensors(module))
