"""Can a layer whose weights' size changes nothing be told from its gradient, as DynamicLayerLR's rule `trust` does?

The truth: each weight is doubled, and the outputs for a batch in training mode, in float64, change by less than a
hundredth of their norm, or not. The sign: the mean of `radial_share` over readings ten steps apart, as the callback
takes it, while the network is trained with SGD on MNIST5k, in float32 and in bfloat16. `largest_free` and
`smallest_other` are the largest mean of a layer without influence and the smallest of one with it; `misjudged` counts
layers on the wrong side of the callback's threshold.

Prints JSON. Run: `OMP_NUM_THREADS=1 python benchmarks/scale_free_layers.py` (`--device cuda` on a GPU).
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from layer_lr_networks import Data, build, load, prepare
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.functional.gradient_statistics import SCALE_FREE, radial_share
from ds_lightning.networks import resnet

SIZE = 28


def networks(data: Data) -> dict[str, nn.Module]:
    return {
        "resnet20, BatchNorm": build("resnet20", data, SIZE),
        "resnet8, GroupNorm": resnet(8, in_channels=1, norm="group"),
        "resnet20 without norms": build("resnet20_nonorm", data, SIZE),
        "resnet8 without norms": build("resnet8_nonorm", data, SIZE),
    }


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in network.named_parameters() if weight.ndim > 1}


def without_influence(network: nn.Module, x: Tensor) -> set[str]:
    """Return the names of the weights whose doubling leaves the outputs as they are."""
    network = copy.deepcopy(network).double()
    found = set()
    with torch.no_grad():
        before = network(x.double())
        for name, weight in weights(network).items():
            weight.mul_(2)
            if (network(x.double()) - before).norm() < 0.01 * before.norm():
                found.add(name)
            weight.div_(2)
    return found


def shares(network: nn.Module, data: Data, options: argparse.Namespace, half: bool) -> dict[str, float]:
    """Train, and return the mean of each weight's radial shares."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    read: dict[str, list[Tensor]] = {name: [] for name in weights(network)}
    for step, draw in enumerate(data.draws(options.steps, options.batch_size, 0)):
        x, y = data.batch(draw, SIZE)
        optimizer.zero_grad()
        with torch.autocast(options.device, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        for name, weight in weights(network).items() if step % 10 == 0 else ():
            inner, size = (weight * weight.grad).sum(), torch.tensor(float(weight.numel()))
            share = radial_share(inner, weight.square().sum(), weight.grad.square().sum(), size)
            read[name].append(share.detach())
        optimizer.step()
    return {name: float(torch.stack(values).nanmean()) for name, values in read.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare("mnist5k", "", Path(folder))
        data = load("mnist5k", folder, "", options.device)
    for half in (False, True):
        torch.manual_seed(0)
        for name, network in networks(data).items():
            network.to(options.device)
            x, _ = data.batch(data.draws(1, options.batch_size, 1)[0], SIZE)
            free = without_influence(network, x)
            found = shares(network, data, options, half)
            others = found.keys() - free
            rows.append(
                {
                    "network": name,
                    "precision": "bfloat16" if half else "float32",
                    "free": len(free),
                    "others": len(others),
                    "largest_free": max((found[key] for key in free), default=None),
                    "smallest_other": min((found[key] for key in others), default=None),
                    "misjudged": sum((found[key] < SCALE_FREE) != (key in free) for key in found),
                }
            )
    print(json.dumps({"torch": torch.__version__, "threshold": SCALE_FREE, **vars(options), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
