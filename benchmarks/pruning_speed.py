"""How fast a pruned ResNet-50 is, for benchmarks/pruning.py."""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from step_time import loss_on_fixed_batch, run
from torch import Tensor, nn

from ds_lightning.networks import apply_plan, count_macs, prune_channels

# Half of ResNet-50's multiply-accumulates, found by trial.
CHANNEL_RATIO = 0.296


def ours(network: nn.Module, x: Tensor, **options: Any) -> None:
    apply_plan(network, prune_channels(network, x, 0.5, **options))


def early_layers_first(
    network: nn.Module,
    x: Tensor,
    early: float,
    round_to: int,
    target: float = 0.5,
    front: Sequence[str] = ("conv1", "layer1", "layer2"),
    rest: Sequence[str] = ("layer3", "layer4"),
) -> None:
    """Prune the front until so much of all the work is left, then the rest to the target."""
    whole = count_macs(network, x)
    for wanted, kept in ((early, rest), (target, front)):
        share = wanted * whole / count_macs(network, x)
        apply_plan(network, prune_channels(network, x, share, scope="layer", round_to=round_to, exclude=list(kept)))


def torch_pruning_alone(network: Any, x: Tensor, round_to: int | None = None) -> None:
    import torch_pruning

    torch_pruning.pruner.MagnitudePruner(
        network,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=CHANNEL_RATIO,
        ignored_layers=[network.fc],
        round_to=round_to,
    ).step()


def masks(network: nn.Module, _: Tensor) -> None:
    from torch.nn.utils import prune

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            prune.ln_structured(module, "weight", amount=0.5, n=2, dim=0)
            prune.remove(module, "weight")


def image_step(network: nn.Module, options: argparse.Namespace) -> Callable[[], None]:
    network.eval()
    x = torch.randn(1, 3, options.image_size, options.image_size)

    def step() -> None:
        with torch.inference_mode():
            network(x)

    return step


def training_step(network: nn.Module, options: argparse.Namespace) -> Callable[[], None]:
    network.train().to(options.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    loss = loss_on_fixed_batch(argparse.Namespace(**vars(options), precision="bf16"))
    called = torch.compile(network) if options.compile else network

    def step() -> None:
        optimizer.zero_grad()
        loss(called).backward()
        optimizer.step()

    if not options.graph:
        return step
    # One recording of the whole step: what the GPU needs, whatever the host is busy with.
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(5):
            step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def replay(_: object = step) -> None:  # holds what the graph reads
        graph.replay()

    return replay


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Time the networks in turns."""
    import torch_pruning  # noqa: F401  # its import is not what is measured

    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    gpu = options.device == "cuda"
    methods: dict[str, Callable[[Any, Tensor], None]] = {"unpruned": lambda network, x: None}
    methods["torch_pruning"] = torch_pruning_alone
    if gpu:
        for scope, round_to in itertools.product(options.scopes, options.round_to):
            methods[f"ours_{scope}_{round_to}"] = partial(ours, scope=scope, round_to=round_to)
        for early, round_to in itertools.product(options.early, options.round_to):
            methods[f"early_{early:g}_{round_to}"] = partial(early_layers_first, early=early, round_to=round_to)
    else:
        methods["ours"] = ours
        methods["torch_pruning_round_to_8"] = lambda network, x: torch_pruning_alone(network, x, round_to=8)
        methods["masks"] = masks
    whole = torchvision.models.resnet50()
    x = torch.randn(1, 3, options.image_size, options.image_size)
    macs, whole_written, rows, steps = count_macs(whole, x), written(whole, x), {}, {}
    for name, method in methods.items():
        network = copy.deepcopy(whole)
        begin = time.perf_counter()
        method(network, x)
        rows[name] = {
            "pruning_seconds": round(time.perf_counter() - begin, 2),
            "macs_share": round(count_macs(network, x) / macs, 4),
            "written_share": round(written(network, x) / whole_written, 4),
            "parameters": sum(p.numel() for p in network.parameters()),
            "zeros": round(zeros(network), 4),
        }
        steps[name] = (training_step if gpu else image_step)(network, options)
        run(steps[name], 10 if gpu else 2, options.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.turns):
        for name, step in steps.items():
            times[name].append(run(step, options.per_turn, options.device) / options.per_turn)
    for name, row in rows.items():
        row["ms"] = round(1e3 * statistics.median(times[name]), 2)
        ratios = [mine / first for mine, first in zip(times[name], times["unpruned"], strict=True)]
        row["ratio_to_unpruned"] = round(statistics.median(ratios), 4)
    how = ["training, bf16", *(name for name in ("compile", "graph") if getattr(options, name))]
    setting = {"step": ", ".join(how) if gpu else "one image, one thread", "image_size": options.image_size}
    return {**setting, "batch_size": options.batch_size if gpu else 1, "turns": options.turns, "networks": rows}


def written(network: nn.Module, x: Tensor) -> int:
    """Return how many numbers the convolutions write, which is what the layers behind them read."""
    sizes: list[int] = []
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(lambda _, __, out: sizes.append(out.numel())) for module in convolutions]
    with torch.inference_mode():
        copy.deepcopy(network).eval()(x)
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def zeros(network: nn.Module) -> float:
    """Return the share of the convolutions' weights that are zero."""
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
