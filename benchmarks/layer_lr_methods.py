"""The methods of benchmarks/layer_lr.py, and one training with one of them."""

import json
import logging
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from layer_lr_networks import Data, build, head_of, load, summary
from torch import Tensor, nn
from torch.nn import functional as F

# Arguments of DynamicLayerLR, and those BY_HAND; the optimizer is the baseline's.
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    **{rule: {"rule": rule} for rule in ("variance", "trust", "snr", "article")},
    "trust_mean": {"rule": "trust", "reference": "mean"},
    "trust_vectors": {"rule": "trust", "bounds": (0.01, 100.0), "vectors": 50.0},
    "variance_fade": {"rule": "variance", "fade": True},
    "trust_fade": {"rule": "trust", "fade": True},
    "variance_block": {"rule": "variance", "groups": "block"},
    "slow_head_default": {"slow_head": True},
}
# timm's name and the weight decay that it is usually run with. Biases and norms have none, as timm does by itself.
PEERS: dict[str, dict[str, Any]] = {
    "lars": {"opt": "lars", "weight_decay": 5e-4},
    "lamb": {"opt": "lamb", "weight_decay": 0.05},
    "novograd": {"opt": "novograd", "weight_decay": 1e-3},
    # Embeddings, the head, biases and norms are AdamW's.
    "muon": {"opt": "muon", "weight_decay": 0.05},
    "layer_decay": {"layer_decay": 0.75},
}
# Two rates by hand, about as far apart as those that rule `trust` comes to with SGD.
SLOW_HEAD = 1 / 25
METHODS = ("baseline", "slow_head", *RULES, *PEERS)
BY_HAND = ("optimizer", "slow_head")  # of a method's arguments those that are not DynamicLayerLR's
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.05}


@dataclass(frozen=True)
class Run:
    """One training.

    `method` is one of METHODS, or `NAME={...}` with arguments of DynamicLayerLR as JSON, beside them `optimizer`, a
    peer's name, and `slow_head`. `part` keeps some of the classes. `initial` is a file of weights to start from, all
    but the head's; `keep` is where the trained ones go. No run starts after `deadline`, a time since the epoch.
    """

    setting: str
    network: str
    data: str
    optimizer: str
    steps: int
    batch_size: int
    size: int = 0
    method: str = "baseline"
    lr: float = 0.1
    seed: int = 0
    warmup: int = 0
    points: int = 20
    part: str = ""
    initial: str = ""
    keep: str = ""
    device: str = "cpu"
    cache: str = ""
    deadline: float = math.inf


class Plain(pl.LightningModule):
    """What anybody would write: the loss, and a cosine over all steps, after a linear warm-up if there is one."""

    def __init__(self, network: nn.Module, data: Data, run: Run) -> None:
        super().__init__()
        self.network, self.data, self.run = network, data, run

    def training_step(self, draw: Tensor, batch_idx: int) -> Tensor:
        x, y = self.data.batch(draw, self.run.size)
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.network, self.run)
        steps, warmup = self.run.steps, self.run.warmup

        def share(step: int) -> float:
            return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Draws:
    """The batches of a fit: rows of one tensor that is on the device already."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows.unbind(0))


class Curve(pl.Callback):
    """Reads the validation accuracy at some steps, at half-time and the end the multipliers, without waiting."""

    def __init__(self, steps: list[int], layers: Any) -> None:
        self.steps, self.layers = set(steps), layers
        self.half = min(steps, key=lambda step: abs(step - max(steps) / 2))
        self.accuracies: list[Tensor] = []
        self.multipliers: dict[str, dict[str, float]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.to(memory_format=torch.channels_last)
        if pl_module.run.device == "cuda" and pl_module.run.size:
            capture(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step not in self.steps:
            return
        self.accuracies.append(judged(pl_module, "val"))
        for when, wanted in (("half", self.half), ("end", max(self.steps))):
            if step == wanted and self.layers is not None:
                self.multipliers[when] = dict(self.layers.multipliers)


def capture(module: Plain) -> None:
    """Record forward and backward of the network as CUDA graphs: the host is too slow for kernels as small as these."""
    draw = module.data.draws(1, module.run.batch_size, 0)[0]
    x, _ = module.data.batch(draw, module.run.size)
    buffers = {name: value.clone() for name, value in module.network.named_buffers()}
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(module.network, (x,))
    for name, value in module.network.named_buffers():  # the recording trained the statistics of the norms
        value.copy_(buffers[name])


def judged(module: Plain, split: str) -> Tensor:
    """Return the accuracy on a split, on the device."""
    module.network.eval()
    cuda = module.run.device == "cuda"
    with torch.inference_mode(), torch.autocast(module.run.device, torch.bfloat16, enabled=cuda):
        share = module.data.correct(module.network, split, module.run.size)
    module.network.train()
    return share


def optimizer_of(network: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Return the optimizer of a run: the setting's own, or a peer's from timm."""
    fused = {"fused": True} if run.device == "cuda" else {}
    decay = WEIGHT_DECAY[run.optimizer]
    given = arguments_of(run.method)
    peer = given.get("optimizer", run.method)
    if peer not in PEERS:
        groups: list[dict[str, Any]] = [{"params": list(network.parameters())}]
        if run.method == "slow_head" or given.get("slow_head"):
            head = list(network.get_submodule(head_of(network)).parameters())
            rest = [p for p in network.parameters() if all(p is not mine for mine in head)]
            groups = [{"params": rest}, {"params": head, "lr": run.lr * SLOW_HEAD}]
        if run.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=run.lr, weight_decay=decay, **fused)
        return torch.optim.SGD(groups, lr=run.lr, momentum=0.9, weight_decay=decay, **fused)
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = {"opt": run.optimizer, "weight_decay": decay, **PEERS[peer]}
    head = head_of(network)
    network.pretrained_cfg = {"classifier": head}  # type: ignore[assignment]  # where timm looks for the head
    if options["opt"] == "muon":
        options["fallback_list"] = [f"{head}.*", "*embedding*", "*position*"]
    if options["opt"] == "sgd":
        options["nesterov"] = False
    if options["opt"] in WEIGHT_DECAY:
        options |= fused
    optimizer: torch.optim.Optimizer = create_optimizer_v2(network, lr=run.lr, **options)
    for group in optimizer.param_groups:  # timm leaves this to its own schedulers
        group["lr"] = run.lr * group.get("lr_scale", 1.0)
    return optimizer


def callback_of(method: str, head: str) -> Any:
    """Return the callback of a method, or None."""
    if method in ("baseline", "slow_head") or method in PEERS:
        return None
    from ds_lightning.callbacks import DynamicLayerLR

    given = arguments_of(method)
    if given.get("slow_head"):
        given["exclude"] = [*given.get("exclude", []), f"network.{head}.*"]
    return DynamicLayerLR(**{name: value for name, value in given.items() if name not in BY_HAND})


def arguments_of(method: str) -> dict[str, Any]:
    """Return the arguments of a method that is given as `NAME={...}`, or of a rule by its name."""
    _, given, options = method.partition("=")
    return dict(json.loads(options) if given else RULES.get(method, {}))


def start_from(network: nn.Module, path: str) -> None:
    """Load weights, all but the head's."""
    head = head_of(network)
    found = torch.load(path, map_location="cpu", weights_only=True)
    rest = {name: value for name, value in found.items() if not name.startswith(f"{head}.")}
    lacking, unknown = network.load_state_dict(rest, strict=False)
    if unknown or any(not name.startswith(f"{head}.") for name in lacking):
        raise RuntimeError(f"{path} has other weights than the network: {lacking} lack, {unknown} are unknown")


def train(run: Run, logger: Any = False) -> dict[str, Any] | None:
    """Train once and return the curve, the test accuracy and the multipliers; None when it is too late to start."""
    parent = multiprocessing.parent_process()
    if time.time() > run.deadline or (parent is not None and not parent.is_alive()):
        return None
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    begin = time.perf_counter()
    data = load(run.data, run.cache, run.part, run.device)
    torch.manual_seed(run.seed)
    network = build(run.network, data, run.size)
    if run.initial:
        start_from(network, run.initial)
    steps = sorted({max(1, round(run.steps * point / run.points)) for point in range(1, run.points + 1)})
    layers = callback_of(run.method, head_of(network))
    curve = Curve(steps, layers)
    module = Plain(network, data, run)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator=run.device,
        devices=1,
        precision="bf16-mixed" if run.device == "cuda" else "32-true",
        benchmark=run.device == "cuda",
        max_steps=run.steps,
        max_epochs=-1,
        logger=logger,
        callbacks=[curve] if layers is None else [layers, curve],
        **quiet,  # type: ignore[arg-type]
    )
    torch.manual_seed(run.seed)  # dropout, whatever the start took
    trainer.fit(module, Draws(data.draws(run.steps, run.batch_size, run.seed)))
    module.to(run.device)  # fit leaves it on the CPU
    accuracies = [round(float(share), 5) for share in curve.accuracies]
    if run.keep:
        torch.save(network.state_dict(), run.keep)
    result = {
        "steps": steps,
        "curve": accuracies,
        "test": round(float(judged(module, "test")), 5),
        "multipliers": {when: summary(found, network) for when, found in curve.multipliers.items()},
        "seconds": round(time.perf_counter() - begin, 1),
    }
    last = " ".join(f"{share:.3f}" for share in accuracies[-4:])
    print(
        f"{run.setting} {run.method} rate {run.lr:g} seed {run.seed}, {run.steps} steps: "
        f"val {last}, test {result['test']:.4f} ({result['seconds']:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return result
