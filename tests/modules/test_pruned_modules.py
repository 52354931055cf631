"""Every module of ours comes back from a checkpoint of fewer channels by itself."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from ds_lightning.callbacks import ProgressivePruning
from ds_lightning.modules import (
    MAML,
    Classifier,
    ContrastivePretraining,
    MultimodalFusion,
    PrototypicalNetwork,
    TransferLearning,
)
from ds_lightning.modules._network_module import NetworkModule
from ds_lightning.networks import PruningPlan, apply_plan, count_macs, plan_of, prune_channels

IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
SHAPE = {"in_channels": 1, "image_size": 16}
RESNET = {"network": "resnet8", "network_options": {"width": 16}, **SHAPE}
MODULES: dict[type[Any], dict[str, Any]] = {
    Classifier: {"num_classes": 3, **RESNET},
    MAML: {"ways": 3, **RESNET},
    PrototypicalNetwork: {"embedding": 16, **RESNET},
    TransferLearning: {"embedding": 16, "num_train_classes": 4, **RESNET},
    ContrastivePretraining: {"encoder_options": {"width": 16}, **SHAPE},
    MultimodalFusion: {
        "encoders": {"image": None, "table": None},
        "num_classes": 3,
        "width": 32,
        "depth": 1,
        "encoder_options": {"image": {"width": 16, "in_channels": 1}, "table": {"columns": 4}},
    },
}


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_every_module_that_can_be_built_is_here() -> None:
    ours = {kind.__name__ for kind in subclasses(NetworkModule) if kind.__module__.startswith("ds_lightning.modules.")}
    assert ours - {"NetworkModule", "FewShotModule"} == {kind.__name__ for kind in MODULES}


def inputs_of(module: Any) -> Any:
    if isinstance(module, MultimodalFusion):
        return {"image": IMAGES, "table": IMAGES[:, 0, 0, :4]}
    return IMAGES


def prune(module: Any) -> None:
    if isinstance(module, MultimodalFusion):
        network = module
    else:
        network = module.encoder if isinstance(module, ContrastivePretraining) else module.network
    before = count_macs(network, inputs_of(module))
    apply_plan(network, prune_channels(network, inputs_of(module), 0.5))
    assert count_macs(network, inputs_of(module)) < 0.51 * before


def outputs(module: L.LightningModule) -> Tensor:
    module.eval()
    with torch.no_grad():
        found: Tensor = module(inputs_of(module))
    return found


def saved(module: L.LightningModule, path: Path) -> Path:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_a_pruned_module_comes_back_by_itself(kind: type[Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind(**MODULES[kind])
    prune(module)
    again = kind.load_from_checkpoint(saved(module, tmp_path / "pruned.ckpt"), map_location="cpu")
    assert plan_of(again) == plan_of(module)
    assert torch.equal(outputs(again), outputs(module))


def test_a_classifier_that_began_with_an_encoder_does_too(tmp_path: Path) -> None:
    pretrained = ContrastivePretraining(**MODULES[ContrastivePretraining])
    encoder = saved(pretrained, tmp_path / "encoder.ckpt")
    module = Classifier(num_classes=3, encoder=str(encoder), **SHAPE)
    module.configure_model()
    prune(module)
    path = saved(module, tmp_path / "pruned.ckpt")
    for options in ({}, {"encoder": str(encoder)}):
        again = Classifier.load_from_checkpoint(path, map_location="cpu", **options)
        assert torch.equal(outputs(again), outputs(module))


# ---------------------------------------------------------------- parameters that follow the network's


class Episodes(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        label = torch.arange(3).repeat(2)
        images = torch.randn(6, 1, 16, 16, generator=generator) + label.view(-1, 1, 1, 1)
        return {name: {"image": images, "label": label} for name in ("support", "query")}


class Pictures(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        first, second = torch.randn(2, 1, 16, 16, generator=generator)
        return {"first": {"image": first}, "second": {"image": second}}


class Shapes(L.Callback):
    """Sees how many weights there are at each step, and that rates and slow encoder fit them."""

    def __init__(self, follows: dict[str, str]) -> None:
        self.follows = follows
        self.weights: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        parameters = dict(pl_module.named_parameters())
        for mine, name in self.follows.items():
            assert parameters[mine].shape == parameters[name].shape, mine
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert all((id(p) in held) == p.requires_grad for p in parameters.values())
        self.weights.append(sum(p.numel() for p in parameters.values()))


def pruned_fit(module: Any, data: Any, batch_size: int, shapes: Shapes, path: Path, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    module.example_input_array = IMAGES
    run = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=6,
        callbacks=[shapes, ProgressivePruning(target=0.5, start=1, end=4, every=1, report_batches=0)],
    )
    run.fit(module, torch.utils.data.DataLoader(data, batch_size=batch_size), **options)
    run.save_checkpoint(path)
    return run


@pytest.mark.parametrize("rates", [True, "per_step"])
def test_learned_inner_rates_lose_what_their_weights_lose(rates: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {**MODULES[MAML], "network": "conv4", "network_options": {"width": 16}, "learn_inner_lr": rates}
    module = MAML(**options, inner_steps=2)
    start = {name: value.detach().clone() for name, value in module.inner_rates.items()}
    names = {f"inner_rates.{key}": f"network.{key.replace('/', '.')}" for key in start}
    shapes = Shapes(names if rates is True else {})
    pruned_fit(module, Episodes(), 2, shapes, tmp_path / "pruned.ckpt")
    assert shapes.weights[-1] < 0.8 * shapes.weights[0]
    # Each rate has moved, so it is the one that is used and trained.
    assert all(not torch.equal(value, torch.full_like(value, 0.1)) for value in module.inner_rates.values())
    again = MAML.load_from_checkpoint(tmp_path / "pruned.ckpt", map_location="cpu")
    assert torch.equal(outputs(again), outputs(module))
    for key, value in module.inner_rates.items():
        assert torch.equal(again.inner_rates[key], value)


def test_a_rate_goes_with_its_own_weight() -> None:
    module = MAML(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 3)), ways=3, learn_inner_lr=True)
    with torch.no_grad():
        for key, rate in module.inner_rates.items():
            rate.copy_(module.network.get_parameter(key.replace("/", ".")))
    cut = {"0.weight": {0: (1, 3)}, "0.bias": {0: (1, 3)}, "1.weight": {1: (1, 3)}}
    sizes = {"0.weight": (4, 2), "0.bias": (4,), "1.weight": (3, 4)}
    plan = PruningPlan(sizes, cut, {"0": {"out_features": 2}, "1": {"in_features": 2}}).under("network")
    apply_plan(module, module.extend_pruning_plan(plan))
    for key, rate in module.inner_rates.items():
        assert torch.equal(rate, module.network.get_parameter(key.replace("/", ".")))


def test_the_slow_encoder_loses_what_the_fast_one_loses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {**MODULES[ContrastivePretraining], "momentum_encoder": 0.9, "queue_size": 16, "projector": (8,)}
    module = ContrastivePretraining(**options)
    names = [name for name, _ in module.named_parameters() if name.startswith("towers.")]
    shapes = Shapes({f"slow_{name}": name for name in names})
    pruned_fit(module, Pictures(), 8, shapes, tmp_path / "pruned.ckpt")
    assert shapes.weights[-1] < 0.8 * shapes.weights[0]
    again = ContrastivePretraining.load_from_checkpoint(tmp_path / "pruned.ckpt", map_location="cpu")
    assert torch.equal(outputs(again), outputs(module))
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
