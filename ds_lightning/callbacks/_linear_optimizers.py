"""Which optimizers take a step that is linear in their rate, and what their momentum says."""

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_lightning.errors import ConfigError

from ._layer_rules import ReferenceName, RuleName

# Their step is `rate * something that does not depend on the rate`, decoupled weight decay included.
_LINEAR = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.SparseAdam,
    torch.optim.Muon,
}
_EXP_AVG = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
_PROBE_STEPS = 3
_PROBE_TOLERANCE = 1e-6


class Momentum(NamedTuple):
    """A parameter's averaged gradient, as `buffer * scale`, a moving average with decay `beta` from zero."""

    buffer: Tensor
    scale: float
    beta: float


def momentum_of(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Momentum | None:
    """Return the momentum that an optimizer keeps of the plain gradient, or None where it keeps none we know."""
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, torch.optim.SGD):
        buffer, beta, dampening = state.get("momentum_buffer"), group["momentum"], group["dampening"]
        if buffer is None or dampening >= 1:
            return None
        return Momentum(buffer, (1 - beta) / (1 - dampening), float(beta))
    if isinstance(optimizer, torch.optim.Muon):
        buffer = state.get("momentum_buffer")
        return None if buffer is None else Momentum(buffer, 1.0, float(group["momentum"]))
    if isinstance(optimizer, _EXP_AVG):
        buffer = state.get("exp_avg")
        return None if buffer is None else Momentum(buffer, 1.0, float(group["betas"][0]))
    return None


def coupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return the weight decay that enters the momentum (L2), 0 when decay acts on the weights alone."""
    if isinstance(optimizer, torch.optim.Muon) or group.get("decoupled_weight_decay", False):
        return 0.0
    return float(group.get("weight_decay", 0.0))


def default_rule(optimizer: Optimizer) -> RuleName:
    """Return `trust` for SGD, and `variance` for what normalises its step by itself."""
    return "trust" if isinstance(optimizer, torch.optim.SGD) else "variance"


def default_alpha(optimizer: Optimizer) -> float:
    """Return 1 for SGD, and 0.5 for what already normalises its step by the size of the gradient."""
    return 1.0 if isinstance(optimizer, torch.optim.SGD) else 0.5


def default_reference(optimizer: Optimizer, rule: str) -> ReferenceName:
    """Return `start` for rule `trust` with SGD; what normalises its step by itself needs no more than the shares."""
    return "start" if rule == "trust" and isinstance(optimizer, torch.optim.SGD) else "mean"


def check_linear(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step is not linear in its rate.

    What is not from torch is tried out on two numbers: twice the rate must move them twice as far.

    Raises:
        ConfigError: names the optimizer and the reason.
    """
    kind = type(optimizer)
    if kind in _LINEAR:
        return
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    home, name = kind.__module__.lower(), kind.__name__.lower()
    if isinstance(optimizer, torch.optim.LBFGS):
        raise _refusal(optimizer, "it searches along a line and evaluates the loss several times a step")
    if "schedulefree" in home or "schedulefree" in name or "train_mode" in group:
        raise _refusal(optimizer, "a schedule-free optimizer averages weights that follow from its own rate")
    if "dadapt" in home + name or "prodigy" in home + name or "d_coef" in group:
        raise _refusal(optimizer, "it estimates its own rate from the distance travelled")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise _refusal(optimizer, "it does not call torch.optim.Optimizer.__init__, so it has no step hooks")
    try:
        ratio = _displacement_ratio(kind, group)
    except Exception as error:  # a foreign constructor or step may ask for anything
        warnings.warn(
            f"DynamicLayerLR can't try out {kind.__name__} ({type(error).__name__}: {error}); it goes on as if its "
            "step were linear in its rate. If it is not, remove the callback",
            stacklevel=2,
        )
        return
    if abs(ratio - 2) > _PROBE_TOLERANCE:
        raise _refusal(optimizer, f"twice the rate moved a test weight {ratio:.4g} times as far, expected 2")


def _refusal(optimizer: Optimizer, reason: str) -> ConfigError:
    return ConfigError(
        f"DynamicLayerLR can't work with {type(optimizer).__name__}: {reason}. Expected an optimizer whose step is "
        "linear in its rate, such as SGD, Adam or AdamW; change the optimizer or remove the callback"
    )


def _displacement_ratio(kind: type[Optimizer], group: dict[str, Any]) -> float:
    """Take the same steps twice, the last one once with the rate and once with twice the rate."""
    accepted = inspect.signature(kind.__init__).parameters
    options = {key: value for key, value in group.items() if key in accepted and key != "params"}
    # The test weight is on the CPU, whatever the model is on.
    options.update({key: False for key in ("fused", "capturable", "foreach") if options.get(key)})
    options["lr"] = float(group["lr"])  # a tensor would be shared with the user's own group
    moved: list[float] = []
    for factor in (1, 2):
        weight = torch.nn.Parameter(torch.tensor([[0.7, -0.3], [0.2, 1.1]], dtype=torch.float64))
        optimizer = kind([weight], **options)
        for step in range(1, _PROBE_STEPS + 1):
            before = weight.detach().clone()
            weight.grad = torch.tensor([[0.5, -1.0], [0.3, 0.2]], dtype=torch.float64) / step
            if step == _PROBE_STEPS:
                optimizer.param_groups[0]["lr"] *= factor
            optimizer.step()
        moved.append((weight.detach() - before).norm().item())
    if moved[0] == 0:
        raise ValueError("the test weight did not move")
    return moved[1] / moved[0]
