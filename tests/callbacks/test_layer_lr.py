import inspect
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from layer_lr_cases import LAYERS, ONE_CYCLE, RULE, SGD_MOMENTUM, Recorder, User, images, rates_of, trainer_of
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR

from ds_lightning.callbacks import DynamicLayerLR
from ds_lightning.errors import ConfigError, NoEffectWarning

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*"
)


def reference(make, beta, alpha, scheduler=None, accumulate=1, clip=None, bf16=False, epochs=5):
    """The rule written out, with one parameter group a layer, in a plain loop."""
    dtype = torch.float32 if bf16 else torch.float64
    module = User().to(dtype)
    layers = {name: module.get_submodule(name) for name in LAYERS}
    layered = {id(p) for layer in layers.values() for p in layer.parameters()}
    others = [p for p in module.parameters() if id(p) not in layered]
    optimizer = make([*({"params": list(v.parameters())} for v in layers.values()), {"params": others}])
    batches = [(x.to(dtype), y) for _ in range(epochs) for x, y in images()]
    rates = rates_of(scheduler, len(batches) // accumulate)
    low, high = 0.4, 2.3
    decay = RULE["ema"] ** RULE["every"]
    momentum = dict.fromkeys(LAYERS, 0.0)
    a, e, w = dict.fromkeys(LAYERS, 0.0), dict.fromkeys(LAYERS, 0.0), 0.0
    m, reading, history = dict.fromkeys(LAYERS, 1.0), None, []
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = module.loss(batch)
            (loss / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        grads = {name: layer.weight.grad.double() for name, layer in layers.items()}
        if step % RULE["every"] == 0:
            if reading:
                w = decay * w + 1 - decay
                x = {}
                for name in LAYERS:
                    g2, m2, t = reading[name]
                    mean = 0.0
                    if beta and t > 2:
                        past = beta ** (t - 1)
                        rho = (1 - beta) * (1 + past) / ((1 + beta) * (1 - past))
                        mean = (m2 / (1 - past) ** 2 - rho * g2) / (1 - rho)
                    a[name] = decay * a[name] + (1 - decay) * mean
                    e[name] = decay * e[name] + (1 - decay) * g2
                    var = max(e[name] / w - max(a[name] / w, 0), 1e-3 * e[name] / w)
                    x[name] = -alpha / 2 * math.log(var / layers[name].weight.numel())
                ramp = min((step - RULE["every"]) / (RULE["warmup"] - RULE["every"]), 1.0)
                centre = sum(x.values()) / len(x)
                m = {k: math.exp(ramp * min(max(v - centre, math.log(low)), math.log(high))) for k, v in x.items()}
            reading = {
                name: (
                    g.square().sum().item(),
                    torch.as_tensor(momentum[name]).square().sum().item(),
                    step + 1,
                )
                for name, g in grads.items()
            }
        momentum = {name: beta * momentum[name] + (1 - beta) * g for name, g in grads.items()}
        for group, factor in zip(optimizer.param_groups, [*m.values(), 1.0], strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        history.append(m)
    return module, history


@pytest.mark.parametrize(
    ("make", "beta", "alpha", "options"),
    [
        (partial(SGD, lr=0.05), 0.0, 1.0, {}),
        (partial(SGD, lr=0.05, momentum=0.9, nesterov=True), 0.9, 1.0, {"scheduler": ONE_CYCLE}),
        (partial(AdamW, lr=0.05, weight_decay=0.1), 0.9, 0.5, {"scheduler": partial(ExponentialLR, gamma=0.9)}),
        (SGD_MOMENTUM, 0.9, 1.0, {"accumulate": 2, "clip": 0.5, "epochs": 8}),
        (SGD_MOMENTUM, 0.9, 1.0, {"bf16": True}),
    ],
    ids=["sgd", "nesterov-one-cycle", "adamw-exponential", "accumulate-clip", "bf16"],
)
def test_equals_the_rule_written_out(make, beta, alpha, options):
    module, recorder = User(make, options.get("scheduler")), Recorder()
    accumulate = options.get("accumulate", 1)
    trainer = trainer_of(
        DynamicLayerLR(**RULE),
        recorder,
        epochs=options.get("epochs", 5),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=options.get("clip"),
        precision="bf16-mixed" if options.get("bf16") else "64-true",
    )
    trainer.fit(module, images())
    expected, history = reference(make, beta, alpha, **options)
    steps = options.get("epochs", 5) * 6 // accumulate  # 24 samples, batches of 4
    assert trainer.global_step == len(history) == steps
    used = recorder.multipliers[accumulate - 1 :: accumulate]
    for got, want in zip(used, history, strict=True):
        assert tuple(got) == LAYERS
        assert got == pytest.approx(want, rel=1e-3 if options.get("bf16") else 1e-6)
    assert used[2 * RULE["every"] - 1] == dict.fromkeys(LAYERS, 1.0)
    assert min(used[-1].values()) < 0.8
    assert max(used[-1].values()) > 1.2
    for got, want in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 if options.get("bf16") else 1e-6)


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        ONE_CYCLE,
        partial(CosineAnnealingLR, T_max=30),
        partial(ExponentialLR, gamma=0.9),
    ],
    ids=lambda s: s.func.__name__,
)
def test_the_scheduler_s_rate_is_never_touched(scheduler):
    recorder = Recorder()
    trainer = trainer_of(DynamicLayerLR(**RULE), recorder)
    trainer.fit(User(partial(SGD, lr=0.05), scheduler), images())
    expected = rates_of(scheduler, 31)
    assert recorder.rates == expected[:30]
    (group,) = trainer.optimizers[0].param_groups
    assert group["lr"] == expected[30]
    assert max(abs(m - 1) for m in recorder.multipliers[-1].values()) > 0.1


class Memory(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name, version = "memory", 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *_, **__):
        pass


class Logging(User):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


def test_logs_at_the_steps_of_the_other_metrics_and_sums_up(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("ds_lightning.callbacks.layer_lr.rank_zero_info", said.append)
    logger, recorder = Memory(), Recorder()
    trainer_of(
        DynamicLayerLR(**RULE), recorder, logger=logger, log_every_n_steps=5, accumulate_grad_batches=2, epochs=8
    ).fit(Logging(), images())
    ours = [(step, row) for step, row in logger.rows if "layer_lr/net.0" in row]
    theirs = [step for step, row in logger.rows if "train/loss" in row]
    assert [step for step, _ in ours] == [4, 9, 14, 19] == sorted(set(theirs))  # 24 steps, every fifth
    for step, row in ours:
        assert {k: row[k] for k in row if k.startswith("layer_lr/")} == {
            f"layer_lr/{k}": v for k, v in recorder.multipliers[2 * step].items()
        }
    assert all(type(v) is float for _, row in ours for v in row.values())
    last = recorder.multipliers[-1]
    low, high = min(last, key=last.get), max(last, key=last.get)
    ratio = last["net.0"] / ((last["net.4"] + last["net.7"]) / 2)
    assert said == [
        f"DynamicLayerLR: 3 layers, multipliers from {last[low]:.3g} ({low}) to {last[high]:.3g} ({high}); "
        f"convolutions have {ratio:.2f} times the mean of fully connected layers"
    ]


@pytest.mark.parametrize(
    ("callback", "options", "reason"),
    [
        (DynamicLayerLR("variance", include=["net.0.*"]), {}, "there is one layer"),
        (DynamicLayerLR("variance", groups=lambda name: "all"), {}, "all layers are in one group"),
        (DynamicLayerLR(include=["net.1.*"]), {}, "no optimizer holds a weight"),
        (DynamicLayerLR(slow_start=False), {}, "first change after 30 optimizer steps, and there were 6"),
        (DynamicLayerLR(), {"max_steps": 3}, "first change after 3 optimizer steps, and there were 3"),
        (DynamicLayerLR("variance", every=1, warmup=0, alpha=1e-6), {}, "every multiplier stayed within 1% of 1 for 6"),
        (DynamicLayerLR("variance"), {"max_steps": 0}, "first change after 20 optimizer steps, and there were 0"),
    ],
    ids=["one-layer", "one-group", "no-layer", "short", "shorter", "flat", "max-steps-0"],
)
def test_no_effect_is_said(callback, options, reason):
    with pytest.warns(NoEffectWarning, match=reason):
        trainer_of(callback, epochs=1, **options).fit(User(), images())


def test_where_all_layers_stand_before_norms_the_default_says_so_with_adamw():
    def trained(*callbacks):
        module = User(AdamW)
        module.net[4] = torch.nn.Linear(144, 8, bias=False)
        trainer_of(*callbacks).fit(module, images())
        return list(module.parameters())

    with pytest.warns(
        NoEffectWarning, match="2 of 2 layers stand before a norm layer, and with AdamW the default rule"
    ):
        found = trained(DynamicLayerLR(every=1, warmup=0, exclude=["net.7.*"]))
    assert all(map(torch.equal, found, trained()))


def test_no_optimizer_is_no_effect():
    with pytest.warns(NoEffectWarning, match="no optimizer holds a weight"):
        trainer_of(DynamicLayerLR(), epochs=1).fit(User(lambda parameters: None), images())


def test_fast_dev_run_is_quiet(recwarn):
    trainer = trainer_of(DynamicLayerLR(), fast_dev_run=True)
    trainer.fit(User(), images())
    assert trainer.global_step == 1
    assert not [w for w in recwarn if issubclass(w.category, NoEffectWarning)]


def test_refuses_what_cannot_work():
    with pytest.raises(ConfigError, match="can't work with LBFGS"):
        trainer_of(DynamicLayerLR()).fit(User(torch.optim.LBFGS), images())
    with pytest.raises(ConfigError, match=r"include has the pattern 'backbone\.\*', which matches no parameter"):
        trainer_of(DynamicLayerLR(include=["backbone.*"])).fit(User(), images())
    trainer, callback, module = trainer_of(DynamicLayerLR()), DynamicLayerLR(), User()
    trainer.strategy.__class__ = type("Parts", (FSDPStrategy,), {})
    with pytest.raises(ConfigError, match="can't work with Parts, which gives each rank parts of a layer that"):
        callback.on_fit_start(trainer, module)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; expected a number > 0"),
        ({"bounds": (1.2, 2.0)}, r"bounds is \(1.2, 2.0\); expected .* 0 < low <= 1 <= high"),
        ({"bounds": (0.4,)}, "bounds is"),
        ({"every": 0}, "every is 0; expected a number of optimizer steps >= 1"),
        ({"ema": 1.0}, r"ema is 1.0; expected a decay in \[0, 1\)"),
        ({"warmup": -1}, "warmup is -1"),
        ({"rule": "fisher"}, "rule is 'fisher'; expected one of variance, trust, snr, article"),
        ({"trust": 0.5}, "trust is 0.5, but rule=None does not use it; use rule='trust'"),
        ({"trust": 0.5, "rule": "variance"}, "trust is 0.5, but rule='variance' does not use it; use rule='trust'"),
        ({"trust": 1.0, "rule": "snr"}, "use rule='trust'"),
        (
            {"reference": "start", "rule": "variance"},
            "reference is 'start', but rule='variance' has no other than 'mean'; use rule='trust'",
        ),
        ({"reference": "end", "rule": "trust"}, "reference is 'end'; expected 'mean', 'start', or None"),
        ({"trust": -1.0, "rule": "trust"}, "trust is -1.0; expected a number >= 0"),
        ({"alpha": 1.0, "rule": "article"}, "alpha is 1.0, but rule='article' has none"),
        ({"bounds": (0.4, 2.3), "rule": "article"}, "bounds is .* but rule='article' has none"),
        ({"groups": "stage"}, "groups is 'stage'; expected 'layer', 'block' or a function"),
        ({"exclude": "head.*"}, r"exclude is the string 'head.\*'; expected a list"),
    ],
)
def test_arguments_are_checked(arguments, text):
    with pytest.raises(ConfigError, match=text):
        DynamicLayerLR(**arguments)


def from_command_line(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["fit"])
    cli = LightningCLI(
        User,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args=["--config", str(ROOT / "callbacks" / "layer_lr.yaml"), "--trainer.logger=false", *args],
    )
    (built,) = (c for c in cli.trainer.callbacks if isinstance(c, DynamicLayerLR))
    return built


ARGUMENTS = {
    *("rule", "alpha", "trust", "bounds", "reference", "vectors"),
    *("every", "ema", "slow_start", "warmup", "groups", "fade", "include", "exclude"),
}


def test_preset_builds_the_defaults(monkeypatch):
    assert set(inspect.signature(DynamicLayerLR).parameters) == ARGUMENTS
    built, default = from_command_line(monkeypatch), DynamicLayerLR()
    for name in ARGUMENTS:
        assert getattr(built, name) == getattr(default, name)


def test_all_arguments_are_taken_from_the_command_line(monkeypatch):
    options = {"rule": "trust", "trust": 0.5, "reference": "mean", "groups": "block", "fade": "true"}
    built = from_command_line(monkeypatch, *(f"--trainer.callbacks.init_args.{k}={v}" for k, v in options.items()))
    assert (built.rule, built.trust, built.groups, built.fade) == ("trust", 0.5, "block", True)
    assert built.reference == "mean"
