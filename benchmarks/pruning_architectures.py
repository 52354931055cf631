"""What channel pruning to a share of the multiply-accumulates does to known architectures: one line of JSON each."""

import argparse
import json
import resource
import time
from typing import Any

import torch
import torchvision
from torch import nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks.channel_costs import count_macs
from ds_lightning.networks.channel_graph import ChannelGraph
from ds_lightning.networks.pruning_plan import apply_plan

TORCHVISION = (
    *("resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("efficientnet_b0", "densenet121", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "vgg16", "vit_b_16"),
    *("swin_t", "shufflenet_v2_x1_0"),
)
TIMM = ("vit_tiny_patch16_224",)


def measured(network: nn.Module, x: torch.Tensor, target: float) -> dict[str, Any]:
    before, shape = count_macs(network, x), network.eval()(x).shape
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        graph = ChannelGraph(network, (x,))
        built = time.perf_counter()
        plan = graph.plan(graph.choose(graph.scores(network), target))
    except ConfigError as error:
        return {"refused": str(error), "seconds": round(time.perf_counter() - start, 2)}
    chosen = time.perf_counter()
    apply_plan(network, plan)
    after = count_macs(network, x)
    return {
        "macs": before // len(x),
        "macs_after": after // len(x),
        "share": round(after / before, 4),
        "groups": len(graph.groups),
        "refused_layers": len(graph.refused) - 1,
        "output_kept": network(x).shape == shape,
        "graph_seconds": round(built - start, 2),
        "choice_seconds": round(chosen - built, 2),
        "memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024,
        "plan_kb": round(len(plan.to_json()) / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*TORCHVISION, *TIMM])
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    args = parser.parse_args()
    import torch_pruning  # noqa: F401  # its import is not what is measured

    for name in args.names:
        torch.manual_seed(0)
        if name in TIMM:
            import timm

            network = timm.create_model(name)
        else:
            network = getattr(torchvision.models, name)()
        x = torch.randn(2, 3, args.size, args.size)
        print(json.dumps({"network": name, **measured(network, x, args.target)}), flush=True)


if __name__ == "__main__":
    main()
