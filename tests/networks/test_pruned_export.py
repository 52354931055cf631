"""A pruned network exports as any other, and its program computes what it computes."""

import io

import pytest
import torch
import torchvision
from torch import nn

from ds_lightning.networks import apply_plan, prune_channels, resnet
from ds_lightning.networks.channel_costs import count_macs

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def torchvision_resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def torchvision_vit():
    vit = torchvision.models.vision_transformer.VisionTransformer
    network = vit(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=5)
    nn.init.normal_(network.heads.head.weight)
    return network


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5)


NETWORKS = {
    "ResNet of torchvision": torchvision_resnet,
    "our ResNet": lambda: resnet(8, num_classes=5),
    "ViT of torchvision": torchvision_vit,
    "ViT of timm": timm_vit,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exported_program_is_the_pruned_network(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    before = count_macs(network, IMAGES)
    apply_plan(network, prune_channels(network, IMAGES, 0.6))
    network.eval()
    with torch.no_grad():
        expected = network(IMAGES)
    assert expected.abs().max() > 0.01
    assert count_macs(network, IMAGES) < 0.61 * before
    file = io.BytesIO()
    torch.export.save(torch.export.export(network, (IMAGES,)), file)
    file.seek(0)
    program = torch.export.load(file)
    torch.testing.assert_close(program.module()(IMAGES), expected, atol=1e-6, rtol=1e-5)
    # No tensor of the unpruned size came along.
    sizes = {key: tuple(value.shape) for key, value in program.state_dict.items()}
    assert sizes == {key: tuple(value.shape) for key, value in network.state_dict().items()}
