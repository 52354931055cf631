import copy
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ds_lightning.errors import ConfigError
from ds_lightning.modules import MAML

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 4, 8


class Blobs(Dataset[Any]):
    """Tasks of WAYS clusters in a plane, the same for the same seed."""

    def __init__(self, dtype: torch.dtype = torch.float32, tasks: int = TASKS) -> None:
        self.dtype, self.tasks = dtype, tasks

    def __len__(self) -> int:
        return self.tasks

    def __getitem__(self, task: int) -> dict[str, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(task)
        centres = 3 * torch.randn(WAYS, 1, 2, generator=generator, dtype=self.dtype)
        x = centres + 0.1 * torch.randn(WAYS, SHOTS + QUERIES, 2, generator=generator, dtype=self.dtype)
        label = torch.arange(WAYS)[:, None].expand(WAYS, SHOTS + QUERIES)
        parts = {"support": slice(0, SHOTS), "query": slice(SHOTS, None)}
        return {
            name: {"table": x[:, part].flatten(0, 1), "label": label[:, part].flatten()} for name, part in parts.items()
        }


class Waves(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, task: int) -> dict[str, dict[str, Tensor]]:
        x = torch.linspace(-1, 1, 10)[:, None]
        return {name: {"table": x, "target": torch.sin(x + task)} for name in ("support", "query")}


def loader(batch_size: int = 4, data: Dataset[Any] | None = None) -> DataLoader[Any]:
    return DataLoader(data or Blobs(), batch_size=batch_size)


def network(ways: int = WAYS, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.Tanh())
    net = nn.Sequential()
    net.add_module("body", body)
    net.add_module("head", nn.Linear(width, ways))
    return net


def fast(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.02)


def steepest(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def maml(net: nn.Module | None = None, **kwargs: Any) -> MAML:
    return MAML(net or network(), WAYS, **{"inner_lr": 0.3, "inner_steps": 2, "optimizer": fast, **kwargs})


def trainer(tmp_path: Any, **kwargs: Any) -> L.Trainer:
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    return L.Trainer(**{"max_epochs": 1, "default_root_dir": tmp_path, "accelerator": "cpu", **quiet, **kwargs})


def batch(tasks: int = 4) -> Any:
    return next(iter(loader(tasks)))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_the_loss_of_an_episode_is_that_of_the_definition() -> None:
    model, data = maml(order=2), batch()
    names = list(dict(model.network.named_parameters()))
    total = torch.tensor(0.0)
    for task in range(4):
        now = tuple(model.network.parameters())
        for _ in range(2):
            outputs = functional_call(model.network, dict(zip(names, now, strict=True)), data["support"]["table"][task])
            loss = F.cross_entropy(outputs, data["support"]["label"][task])
            slopes = torch.autograd.grad(loss, now, create_graph=True)
            now = tuple(value - 0.3 * slope for value, slope in zip(now, slopes, strict=True))
        outputs = functional_call(model.network, dict(zip(names, now, strict=True)), data["query"]["table"][task])
        total = total + F.cross_entropy(outputs, data["query"]["label"][task]) / 4
    loss, outputs = model.episode_loss(data)
    assert outputs.shape == (4, WAYS * QUERIES, WAYS)
    torch.testing.assert_close(loss, total)
    found = torch.autograd.grad(loss, list(model.network.parameters()))
    torch.testing.assert_close(
        found, torch.autograd.grad(total, list(model.network.parameters())), rtol=1e-4, atol=1e-6
    )


def test_it_learns_to_learn_and_validation_and_test_adapt(tmp_path: Any) -> None:
    model = maml(inner_lr=0.1)
    run = trainer(tmp_path, max_epochs=8)
    seen, unseen = (torch.utils.data.Subset(Blobs(tasks=140), range(*ends)) for ends in ((0, 80), (80, 140)))
    (before,) = run.validate(model, loader(20, unseen), verbose=False)
    run.fit(model, loader(8, seen), loader(20, unseen))
    (after,) = run.validate(model, loader(20, unseen), verbose=False)
    (tested,) = run.test(model, loader(20, unseen), verbose=False)
    assert after["val/accuracy"] > before["val/accuracy"] + 0.1
    # Before it adapts, the network can't know which class of a new task has which number.
    assert after["val/accuracy"] > after["val/accuracy_after_0"] + 0.3
    assert tested["test/accuracy"] == pytest.approx(after["val/accuracy"])


def test_regression_learns_by_squared_error(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), inner_lr=0.1, inner_steps=3)
    data = next(iter(loader(4, Waves())))
    loss, outputs = model.episode_loss(data)
    assert loss.item() == pytest.approx(F.mse_loss(outputs, data["query"]["target"]).item())
    (found,) = trainer(tmp_path).test(model, loader(4, Waves()), verbose=False)
    assert found["test/mse"] < found["test/mse_after_0"]


def test_predictions_are_those_after_every_step() -> None:
    model = maml(test_steps=3).eval()
    found = model.predictions(batch())
    assert found.shape == (4, 4, WAYS * QUERIES, WAYS)
    assert not found.requires_grad
    query = batch()["query"]["table"]
    torch.testing.assert_close(found[0], model.network(query).detach())
    one = {name: value[1] for name, value in batch()["support"].items()}
    torch.testing.assert_close(found[3, 1], model.adapt(one)(query[1]), rtol=1e-5, atol=1e-6)


def test_an_adapted_network_is_a_plain_one_of_its_own() -> None:
    model = maml()
    before = weights(model)
    support = {name: value[0] for name, value in batch()["support"].items()}
    with torch.inference_mode():
        adapted = model.adapt({name: value.clone() for name, value in support.items()})
    assert type(adapted) is nn.Sequential
    assert not adapted.training
    assert not any(value.requires_grad or value.is_inference() for value in adapted.parameters())
    assert not torch.equal(adapted.head.weight, model.network.head.weight)  # type: ignore[union-attr, arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    again = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(again(support["table"]), adapted(support["table"]))
    with pytest.raises(ValueError, match="label has values from 0 to 3; expected 0 to 2"):
        model.adapt({**support, "label": support["label"] + (support["label"] == 2)})


def test_only_the_head_adapts_but_the_body_is_trained(tmp_path: Any) -> None:
    for adapt in ("head", ["head.*"]):
        model = maml(adapt=adapt)
        support = {name: value[0] for name, value in batch()["support"].items()}
        adapted, own = model.adapt(support), weights(model.network)
        assert [name for name, value in adapted.named_parameters() if not torch.equal(value, own[name])] == [
            "head.weight",
            "head.bias",
        ]
    trainer(tmp_path).fit(model, loader())
    assert all(not torch.equal(value, own[name]) for name, value in model.network.named_parameters())


@pytest.mark.parametrize(("kind", "shape"), [(True, (WAYS, 16)), ("per_step", (2, 1, 1))])
def test_learned_rates_move_and_are_in_the_checkpoint(kind: Any, shape: tuple[int, ...], tmp_path: Any) -> None:
    model = maml(learn_inner_lr=kind)
    run = trainer(tmp_path)
    run.fit(model, loader())
    rate = model.inner_rates["head/weight"]
    assert rate.shape == shape
    assert (rate != 0.3).all()
    run.save_checkpoint(tmp_path / "m.ckpt")
    again = MAML.load_from_checkpoint(tmp_path / "m.ckpt", network=network(), optimizer=fast)
    assert torch.equal(again.inner_rates["head/weight"], rate)
    assert again.hparams["learn_inner_lr"] == kind
    data = batch()
    assert torch.equal(again.predictions(data), model.predictions(data))


def test_losses_of_earlier_steps_fade_over_the_epochs(tmp_path: Any) -> None:
    seen: list[list[float]] = []

    class Watched(MAML):
        def on_train_epoch_start(self) -> None:
            seen.append(self._step_weights())

    for kind, epochs in ((True, 4), (2, 3)):
        seen.clear()
        model = Watched(network(), WAYS, inner_steps=2, multi_step_loss=kind)
        trainer(tmp_path, max_epochs=epochs, limit_train_batches=1).fit(model, loader())
        fading = [0.5, 0.375, 0.25, 0.125] if kind is True else [0.5, 0.25, 0.015]
        for found, early in zip(seen, fading, strict=True):
            assert found == pytest.approx([early, 1 - early])
    endless = Watched(network(), WAYS, inner_steps=2, multi_step_loss=True)
    with pytest.raises(ConfigError, match="max_epochs -1; give the number of epochs"):
        trainer(tmp_path, max_epochs=-1, max_steps=3).fit(endless, loader())


def test_the_multi_step_loss_is_the_weighted_mean_of_the_steps() -> None:
    model, data = maml(multi_step_loss=2), batch()
    model._trainer = None
    per_step = [F.cross_entropy(out.flatten(0, 1), data["query"]["label"].flatten()) for out in model.predictions(data)]
    torch.testing.assert_close(model.episode_loss(data)[0].detach(), (per_step[1] + per_step[2]) / 2)


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path: Any) -> None:
    options: Any = {"learn_inner_lr": "per_step", "multi_step_loss": 4, "net": None}

    def made() -> MAML:
        return maml(**{**options, "net": nn.Sequential(*network().children(), nn.Dropout(0.2))})

    whole, first = made(), made()
    torch.manual_seed(7)
    trainer(tmp_path, max_epochs=2).fit(whole, loader())
    torch.manual_seed(7)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.get_rng_state()
    torch.manual_seed(99)
    rest = made()
    torch.set_rng_state(state)
    trainer(tmp_path, max_epochs=2).fit(rest, loader(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    for (name, value), other in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(value, other), name
    assert any(
        not torch.equal(value, other) for value, other in zip(first.parameters(), rest.parameters(), strict=True)
    )


@pytest.mark.parametrize("checkpoint_steps", [False, True])
def test_it_trains_with_bf16_as_with_32_bits_but_for_rounding(tmp_path: Any, checkpoint_steps: bool) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        model = maml(checkpoint_steps=checkpoint_steps, optimizer=steepest)
        trainer(tmp_path, precision=precision).fit(model, loader(), loader())
        found.append(weights(model))
    start = weights(maml())
    for name, value in found[0].items():
        assert found[1][name].dtype == torch.float32
        moved = (value - start[name]).norm()
        assert (found[1][name] - value).norm() < 0.2 * moved, name


class Shared(L.LightningDataModule):
    """Gives each process its share of every step's TASKS / 2 tasks."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        mine = torch.utils.data.Subset(Blobs(torch.float64), range(rank, TASKS, processes))
        return DataLoader(mine, batch_size=TASKS // 2 // processes)


class LeaveTheGroup(L.Callback):
    """Ends gloo's threads before the process ends, which now and then aborts otherwise."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def test_two_processes_with_half_of_the_tasks_are_one_with_all(tmp_path: Any) -> None:
    start = network().double()
    found = []
    for options in ({"strategy": "ddp_fork", "devices": 2}, {"devices": 1}):
        model = maml(copy.deepcopy(start), learn_inner_lr="per_step", optimizer=steepest)
        options = {
            "use_distributed_sampler": False,
            "enable_checkpointing": False,
            "callbacks": LeaveTheGroup(),
            **options,
        }
        trainer(tmp_path, precision="64-true", **options).fit(model, Shared())
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-10, atol=1e-12)
    assert not torch.equal(found[0]["network.head.weight"], start.head.weight)  # type: ignore[union-attr, arg-type]


def test_batch_norm_keeps_nothing_of_the_tasks(tmp_path: Any) -> None:
    norm = nn.BatchNorm1d(16)
    model = maml(nn.Sequential(nn.Linear(2, 16), norm, nn.Tanh(), nn.Linear(16, WAYS)))
    trainer(tmp_path).fit(model, loader(), loader())
    assert norm.running_mean is None
    x = batch()["query"]["table"][0]
    model.eval()
    assert not torch.allclose(model.network(x)[:5], model.network(x[:5]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inner_lr": 0.0}, "inner_lr is 0.0; expected a rate above 0"),
        ({"inner_steps": 0}, "inner_steps is 0; expected at least 1"),
        ({"order": 3}, "order is 3"),
        ({"adapt": "body"}, "adapt is 'body'; expected 'all', 'head' or a list"),
        ({"adapt": []}, r"adapt is \[\]"),
        ({"adapt": ["fc.*"]}, r"adapt is \['fc.\*'\], and no trained parameter .* named 'fc.\*'; .* head.weight"),
        ({"net": nn.Linear(2, 3), "adapt": "head"}, r"adapt is 'head', and no trained parameter .* 'head.\*'"),
        ({"learn_inner_lr": "each"}, "learn_inner_lr is 'each'"),
        ({"multi_step_loss": 0}, "multi_step_loss is 0"),
        ({"test_steps": -1}, "test_steps is -1"),
        ({"tasks": "map"}, "tasks is 'map'"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        maml(**given)
