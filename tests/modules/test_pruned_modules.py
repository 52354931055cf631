"""Every module of ours comes back from a checkpoint of fewer channels by itself."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from ds_lightning.modules import (
    MAML,
    Classifier,
    ContrastivePretraining,
    MultimodalFusion,
    PrototypicalNetwork,
    TransferLearning,
)
from ds_lightning.modules._network_module import NetworkModule
from ds_lightning.networks import apply_plan, count_macs, plan_of, prune_channels

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
