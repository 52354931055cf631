"""What a network costs: multiply-accumulates, seconds and bytes."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_lightning.errors import ConfigError

from ._plan_names import plain


def count_macs(network: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Return the multiply-accumulates of one forward pass in eval mode.

    Convolutions, matrix products and attention count, also where a fused operation does them; what works element by
    element, such as norms and activations, does not. Neither weights, buffers, modes nor random numbers change.

    Args:
        network: any module; on its device.
        *args: what the network is called with, on its device; of a batch all samples count.
        **kwargs: what it is called with by name.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 10))  # 3 * 8 * 3 * 3 * 10 * 10
        21600
    """
    return sum(layer_macs(network, *args, **kwargs).values())


def layer_macs(network: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Return the multiply-accumulates of one forward pass in eval mode, by the module that does them itself.

    Args:
        network: as `count_macs` takes it, and its arguments.
        *args: what the network is called with.
        **kwargs: what it is called with by name.

    Returns:
        The path of a module -> its own, without those of modules inside it, where there are any; the path of the
        network itself is empty. Their sum is what `count_macs` returns.

    Example:
        >>> layer_macs(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))
        {'0': 32, '2': 16}
    """
    # Takes a quarter of a second, which whoever imports this module for something else need not pay.
    from torch.utils.flop_counter import FlopCounterMode

    own: dict[str, int] = {}
    running: list[tuple[str, int]] = [("", 0)]

    def passed_on() -> None:
        """Give what was counted since the last change of module to the innermost one that is running."""
        path, since = running[-1]
        if (now := counter.get_total_flops()) > since:
            own[path] = own.get(path, 0) + (now - since) // 2
        running[-1] = path, now

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            passed_on()
            running.append((path, running[-1][1]))

        return hook

    def leave(*_: Any) -> None:
        passed_on()
        now = running.pop()[1]
        running[-1] = running[-1][0], now

    with ExitStack() as stack:
        stack.enter_context(_evaluated(network))
        for name, module in network.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(plain(name))).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(_unfused(network))
        counter = stack.enter_context(FlopCounterMode(display=False))
        network(*args, **kwargs)
    return own


def latency(network: nn.Module, *args: Any, repeats: int = 20, warmup: int = 5, **kwargs: Any) -> float:
    """Return the median time of one forward pass in eval mode, in seconds, until its result is there.

    Args:
        network: any module.
        *args: what the network is called with, on its device.
        repeats: passes that are timed, at least 1.
        warmup: passes before them, at least 0.
        **kwargs: what it is called with by name.

    Raises:
        ConfigError: when `repeats` or `warmup` is too small.

    Example:
        >>> latency(nn.Linear(4, 2), torch.zeros(1, 4)) > 0
        True
    """
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; expected at least {least}")
    device = next((tensor.device for tensor in _tensors(network)), torch.device("cpu"))
    times = []
    with _evaluated(network):
        for _ in range(warmup + repeats):
            _wait(device)
            start = time.perf_counter()
            network(*args, **kwargs)
            _wait(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def saved_bytes(network: nn.Module) -> int:
    """Return the bytes of the tensors that a file with the network's state dict holds; shared ones count once.

    Example:
        >>> saved_bytes(nn.Linear(4, 2))
        40
    """
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in _tensors(network))}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(network: nn.Module) -> list[Tensor]:
    return [value for value in network.state_dict().values() if isinstance(value, Tensor)]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode and the random numbers are put back."""
    modes = [(module, module.training) for module in network.modules()]
    gpus = {tensor.device.index for tensor in _tensors(network) if tensor.is_cuda}
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(gpus)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _unfused(network: nn.Module) -> Iterator[None]:
    """Operations as the counter knows them, where a fused one would pass it by: attention, layers and recurrence."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    fast, onednn, cuda = mha.get_fastpath_enabled(), mkldnn.enabled, cudnn.enabled
    mha.set_fastpath_enabled(False)
    if recurrent:
        mkldnn.enabled = False  # type: ignore[assignment]
        cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
        if recurrent:
            mkldnn.enabled = onednn
            cudnn.enabled = cuda
