"""The code of docs/pruning.md runs as it stands, and does what the page says."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from ds_lightning.networks import count_macs

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Less of the same, for its time.
    monkeypatch.setattr("ds_lightning.callbacks._pruning_schedule._REMOVALS", 2)
    monkeypatch.setattr(torchvision.models, "resnet18", lambda **options: ResNet(BasicBlock, [1, 1, 1, 1], **options))
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
    names = {"my_loader": DataLoader(data, batch_size=4)}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(code, names)
    images = names["images"]
    whole = count_macs(names["Mine"]().net, images)
    # The last removal may overshoot by a chunk of eight channels, which is coarse in so small a network.
    for network in (names["module"].net, names["again"].net, names["network"]):
        assert count_macs(network, images) / whole == pytest.approx(0.49, abs=0.02)
    assert names["macs"] == count_macs(names["network"], images)
    assert count_macs(names["resnet50"], names["photo"]) == pytest.approx(names["half"], rel=0.01)
    weights = names["again"].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in names["module"].state_dict().items())
    torch.testing.assert_close(names["program"].module()(names["image"]), names["module"].net(names["image"]))
    assert torch.equal(names["copy"].eval()(images), names["network"].eval()(images))
    follower, *_ = names["trainer"].callbacks
    shapes = {name: p.shape for name, p in names["trainer"].lightning_module.named_parameters()}
    assert {name: mean.shape for name, mean in follower.mean.items()} == shapes
    assert shapes["net.conv1.weight"] != names["Mine"]().net.conv1.weight.shape
