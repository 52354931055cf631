"""Each architecture: half of the multiply-accumulates go, it trains on, and its plan rebuilds it."""

import time

import psutil
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from ds_lightning.errors import ConfigError
from ds_lightning.networks import TextEncoder, resnet
from ds_lightning.networks.channel_costs import count_macs
from ds_lightning.networks.channel_removal import prune_channels
from ds_lightning.networks.pruning_plan import PruningPlan, apply_plan

IDS = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))
IDS[1, 8:] = 0
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class EncodedText(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 256, batch_first=True), 2)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x), src_key_padding_mask=x == 0).mean(1))


def torchvision_vit():
    vit = torchvision.models.vision_transformer.VisionTransformer
    network = vit(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=5)
    # It starts at zero, and then nothing before it would learn in the first step.
    nn.init.normal_(network.heads.head.weight)
    return network


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5)


def resnext():
    bottleneck = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(bottleneck, [1, 2, 1, 1], num_classes=5, groups=32, width_per_group=4)


def convnext():
    stages = [(32, 64, 2), (64, 128, 2), (128, None, 2)]
    settings = [torchvision.models.convnext.CNBlockConfig(*stage) for stage in stages]
    # Its usual scale of 1e-6 would keep a step's change below what float32 can hold.
    return torchvision.models.ConvNeXt(settings, layer_scale=1.0, num_classes=5)


def vgg16():
    network = torchvision.models.vgg16(num_classes=5, init_weights=False)
    network.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 5))
    return network


def by_torchvision(name):
    return lambda: getattr(torchvision.models, name)(num_classes=5)


NETWORKS = {
    **{
        name: (by_torchvision(name), IMAGES)
        for name in (
            "resnet18",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "efficientnet_b0",
            "regnet_y_400mf",
        )
    },
    "resnext": (resnext, IMAGES),
    "densenet": (lambda: torchvision.models.DenseNet(16, (3, 4, 3), 32, num_classes=5), IMAGES),
    "convnext": (convnext, IMAGES),
    "vgg16": (vgg16, IMAGES[..., :32, :32]),
    "torchvision vit": (torchvision_vit, IMAGES[..., :32, :32]),
    "timm vit": (timm_vit, IMAGES[..., :32, :32]),
    "TransformerEncoder": (EncodedText, IDS),
    "TextEncoder": (lambda: TextEncoder(50, width=64, num_classes=3), IDS),
    "resnet20": (lambda: resnet(20, width=32), IMAGES[..., :32, :32]),
    "resnet8 group": (lambda: resnet(8, width=32, norm="group"), IMAGES[..., :32, :32]),
}
# Few channels, in blocks: the next larger choice is above the target.
COARSE = {"TransformerEncoder": 0.48, "TextEncoder": 0.48, "resnet8 group": 0.46, "torchvision vit": 0.48}


@pytest.mark.parametrize("name", NETWORKS)
def test_half_goes_and_what_is_left_trains_and_is_rebuilt_from_its_plan(name):
    torch.manual_seed(0)
    build, x = NETWORKS[name]
    network = build()
    before, shape = count_macs(network, x), network.eval()(x).shape
    plan = prune_channels(network, x, 0.5)
    apply_plan(network, plan)
    assert COARSE.get(name, 0.495) <= count_macs(network, x) / before <= 0.5 * 1.005
    assert network(x).shape == shape

    network.train()
    old = {key: p.detach().clone() for key, p in network.named_parameters()}
    # Dropout, stochastic depth and dead ReLUs may leave single layers without a gradient in one step.
    for module in network.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    F.cross_entropy(network(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())
    optimizer.step()
    assert [key for key, p in network.named_parameters() if torch.equal(old[key], p)] == []

    again = build()
    apply_plan(again, PruningPlan.from_json(plan.to_json()))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(x), network.eval()(x))


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (torchvision.models.shufflenet_v2_x0_5, IMAGES),
        (lambda: nn.LSTM(8, 16), torch.randn(5, 2, 8)),
        (torchvision.models.swin_t, IMAGES),
    ],
    ids=["shufflenet_v2", "lstm", "swin_t"],
)
def test_what_can_not_be_halved_is_refused_in_bounded_time_and_memory(build, x):
    network = build()
    start, memory = time.monotonic(), psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match=r"can't trace|can't go below|no channels|took more than"):
        prune_channels(network, x, 0.5)
    assert time.monotonic() - start < 60
    assert psutil.Process().memory_info().rss - memory < 1e9
