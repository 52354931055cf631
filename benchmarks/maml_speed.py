"""What a meta-training step of MAML costs: time against a plain loop and TorchOpt, and memory by inner steps.

Run: OMP_NUM_THREADS=1 python benchmarks/maml_speed.py [--device cpu] [--rounds 9] [--skip-compile]

A step is the second-order gradient of the mean query loss. The rivals take turns; medians in milliseconds. `loop` is
the step as learn2learn does it: one task after the other, `torch.autograd.grad(create_graph=True)`, a functional
update. TorchOpt is asked when it is installed. Memory is the peak of the bytes of all tensors that live at once, beyond
the weights and the data, counted at every operation on a CPU, by CUDA's allocator on a GPU. Prints JSON.
"""

import argparse
import json
import random
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_lightning.functional import adapted_outputs
from ds_lightning.networks import conv4, mlp

try:
    import torchopt
except ImportError:
    torchopt = None

Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Gradients = tuple[Tensor, ...]
perceptron = partial(mlp, 1, 1)
four_blocks = partial(conv4, 5, in_channels=1, image_size=28, width=32)


def sinusoids(tasks: int, shots: int, device: str) -> Data:
    x = 10 * torch.rand(tasks, 2 * shots, 1, device=device) - 5
    y = (0.1 + 4.9 * torch.rand(tasks, 1, 1, device=device)) * torch.sin(x + 3 * torch.rand(tasks, 1, 1, device=device))
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def pictures(tasks: int, device: str, ways: int = 5, queries: int = 5) -> Data:
    def part(samples: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(ways, device=device).repeat_interleave(samples).expand(tasks, -1)
        return torch.randn(tasks, ways * samples, 1, 28, 28, device=device), label

    return part(1), part(queries)


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(outputs, y) if y.is_floating_point() else F.cross_entropy(outputs, y)


def ours(network: nn.Module, data: Data, steps: int, **how: Any) -> Gradients:
    support, (query, y) = data
    outputs = adapted_outputs(network, support, query, inner_lr=0.01, after=(steps,), **how)[0]
    return torch.autograd.grad(loss_of(outputs.flatten(0, 1), y.flatten(0, 1)), list(network.parameters()))


def loop(network: nn.Module, data: Data, steps: int) -> Gradients:
    (x, y), (query, labels) = data
    names, start = zip(*network.named_parameters(), strict=True)
    losses = []
    for task in range(len(x)):
        now = start
        for _ in range(steps):
            loss = loss_of(functional_call(network, dict(zip(names, now, strict=True)), (x[task],)), y[task])
            slopes = torch.autograd.grad(loss, now, create_graph=True)
            now = tuple(value - 0.01 * slope for value, slope in zip(now, slopes, strict=True))
        outputs = functional_call(network, dict(zip(names, now, strict=True)), (query[task],))
        losses.append(loss_of(outputs, labels[task]))
    return torch.autograd.grad(torch.stack(losses).mean(), start)


def torchopt_loop(network: nn.Module, data: Data, steps: int) -> Gradients:
    (x, y), (query, labels) = data
    inner = torchopt.MetaSGD(network, lr=0.01)
    start = list(network.parameters())
    first, first_inner = torchopt.extract_state_dict(network), torchopt.extract_state_dict(inner)
    losses = []
    for task in range(len(x)):
        for _ in range(steps):
            inner.step(loss_of(network(x[task]), y[task]))
        losses.append(loss_of(network(query[task]), labels[task]))
        torchopt.recover_state_dict(network, first)
        torchopt.recover_state_dict(inner, first_inner)
    return torch.autograd.grad(torch.stack(losses).mean(), start)


def milliseconds(rivals: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        order = list(rivals.items())
        # Who comes after a slow rival finds cold caches: each comes after each.
        random.Random(turn).shuffle(order)
        for name, rival in order:
            begin = time.perf_counter()
            rival()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                found[name].append(1e3 * (time.perf_counter() - begin))
    return {name: round(statistics.median(times), 2) for name, times in found.items()}


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live, made since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def peak_mebibytes(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    with PeakBytes() as counted:
        step()
    return round(counted.peak / 2**20, 2)


def speed(device: str, rounds: int) -> dict[str, Any]:
    found = {}
    cases = [("sinusoid, 25 tasks, K=10", perceptron, sinusoids(25, 10, device), (1, 5))]
    cases += [(f"conv-4, {tasks} tasks", four_blocks, pictures(tasks, device), (1, 5)) for tasks in (4, 16)]
    for name, make, data, counts in cases:
        network = make().to(device)
        for steps in counts:
            torch.testing.assert_close(ours(network, data, steps), loop(network, data, steps), rtol=1e-2, atol=1e-4)
            rivals: dict[str, Callable[[], Any]] = {
                "auto": lambda n=network, d=data, s=steps: ours(n, d, s),
                "vmap": lambda n=network, d=data, s=steps: ours(n, d, s, tasks="vmap"),
                "loop": lambda n=network, d=data, s=steps: loop(n, d, s),
                "checkpointed": lambda n=network, d=data, s=steps: ours(n, d, s, checkpoint=True),
            }
            if torchopt is not None:
                rivals["torchopt"] = lambda n=network, d=data, s=steps: torchopt_loop(n, d, s)
            # A step of a few milliseconds needs more turns.
            times = milliseconds(rivals, rounds * 8 if make is perceptron else rounds, device)
            found[f"{name}, {steps} steps"] = {**times, "loop / auto": round(times["loop"] / times["auto"], 2)}
    return found


def memory(device: str) -> dict[str, Any]:
    found = {}
    for name, network, data in (
        ("conv-4, 1 task", four_blocks().to(device), pictures(1, device)),
        ("conv-4, 4 tasks", four_blocks().to(device), pictures(4, device)),
        ("sinusoid, 25 tasks", perceptron().to(device), sinusoids(25, 10, device)),
    ):
        peaks = {
            (kind, steps): peak_mebibytes(
                lambda n=network, d=data, k=kind, s=steps: ours(n, d, s, checkpoint=k), device
            )
            for kind in (False, True)
            for steps in (1, 10)
        }
        found[name] = {
            "plain, 1 and 10 steps": [peaks[False, 1], peaks[False, 10]],
            "checkpointed, 1 and 10 steps": [peaks[True, 1], peaks[True, 10]],
            "plain 10 / plain 1": round(peaks[False, 10] / peaks[False, 1], 2),
            "checkpointed 10 / plain 1": round(peaks[True, 10] / peaks[False, 1], 2),
            "checkpointed 10 / checkpointed 1": round(peaks[True, 10] / peaks[True, 1], 2),
        }
    return found


def compiled(device: str, rounds: int) -> dict[str, Any]:
    """Compile the meta-loss of the sinusoid and say how far its gradient is from the true one, or the error."""
    data = sinusoids(25, 10, device)
    network = perceptron().to(device)
    names, start = zip(*network.named_parameters(), strict=True)
    (x, y), (query, labels) = data

    def plain() -> Tensor:
        """One step for the first task."""
        loss = loss_of(functional_call(network, dict(zip(names, start, strict=True)), (x[0],)), y[0])
        slopes = torch.autograd.grad(loss, start, create_graph=True)
        now = {name: value - 0.01 * slope for name, value, slope in zip(names, start, slopes, strict=True)}
        return loss_of(functional_call(network, now, (query[0],)), labels[0])

    def vmapped() -> Tensor:
        """One step for all tasks."""
        each = vmap(lambda now, x, y: loss_of(functional_call(network, dict(zip(names, now, strict=True)), (x,)), y))
        now = tuple(value.expand(len(x), *value.shape) for value in start)
        slopes = torch.autograd.grad(each(now, x, y).sum(), now, create_graph=True)
        now = tuple(value - 0.01 * slope for value, slope in zip(now, slopes, strict=True))
        return each(now, query, labels).mean()

    def library() -> Tensor:
        outputs = adapted_outputs(network, (x, y), query, inner_lr=0.01, after=(1,))[0]
        return loss_of(outputs.flatten(0, 1), labels.flatten(0, 1))

    def gradient(loss: Callable[[], Tensor]) -> Tensor:
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss(), start)])

    found: dict[str, Any] = {}
    for name, slow in (("plain step", plain), ("vmapped step", vmapped), ("adapted_outputs", library)):
        fast = torch.compile(slow)
        try:
            off = (gradient(fast) - gradient(slow)).norm() / gradient(slow).norm()
            rivals = {"compiled": partial(gradient, fast), "eager": partial(gradient, slow)}
            found[name] = {"relative error of the gradient": off.item(), **milliseconds(rivals, rounds, device)}
        except RuntimeError as error:
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    try:
        loop(torch.compile(network), data, 1)
    except RuntimeError as error:
        found["network alone"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip-compile", action="store_true", help="it needs a C++ compiler and a minute")
    args = parser.parse_args()
    torch.manual_seed(0)
    report = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "torchopt": torchopt.__version__ if torchopt is not None else "not installed",
        "milliseconds": speed(args.device, args.rounds),
        "peak_mebibytes": memory(args.device),
        "torch.compile": "skipped" if args.skip_compile else compiled(args.device, args.rounds),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
