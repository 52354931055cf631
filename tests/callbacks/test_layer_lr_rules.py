"""Rules, groups and fading in a fit, against one parameter group a layer in a plain loop."""

import math
from functools import partial
from operator import mul

import lightning.pytorch as pl
import pytest
import torch
from layer_lr_cases import LAYERS, ONE_CYCLE, RULE, Recorder, User, images, rates_of, trainer_of
from test_layer_lr import Memory
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ds_lightning.callbacks import DynamicLayerLR
from ds_lightning.callbacks._layer_fade import check_rates
from ds_lightning.callbacks._layer_norms import read_norms
from ds_lightning.callbacks._layer_statistics import LayerStatistics
from ds_lightning.callbacks._layers import block_of, find_layers
from ds_lightning.errors import ConfigError, NoEffectWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*",
    "ignore::ds_lightning.errors.NoEffectWarning",
)

AT_ONCE = {"every": 1, "ema": 0.0, "warmup": 0}  # the gradient of the last step alone decides
WARM_UP = partial(LambdaLR, lr_lambda=lambda step: min((step + 1) / 10, 1.0))


class Loud(User):
    """Gradients so large that the article's formula shows."""

    loudness = 300.0

    def loss(self, batch):
        return self.loudness * super().loss(batch)


def head_apart(name: str) -> str:
    return "head" if name == "net.7" else "body"


def first_apart(name: str) -> str:
    return "first" if name == "net.0" else "rest"


def written_out(
    kind,
    rule,
    beta,
    fade=False,
    group=str,
    scheduler=None,
    lr=0.05,
    epochs=4,
    reference="mean",
    vectors=1.0,
    spare=False,
    slow=True,
):
    module = kind().double()
    layers = {name: module.get_submodule(name) for name in LAYERS}
    layered = {id(p) for layer in layers.values() for p in layer.parameters()}
    others = [p for p in module.parameters() if id(p) not in layered]
    groups = [*({"params": list(v.parameters())} for v in layers.values()), {"params": others}]
    optimizer = SGD(groups, lr=lr, momentum=beta)
    batches = [(x.double(), y) for _ in range(epochs) for x, y in images()]
    rates = rates_of(scheduler, len(batches)) if scheduler else [lr] * len(batches)
    momentum = dict.fromkeys(LAYERS, 0.0)
    read, raw, history = None, dict.fromkeys(LAYERS, 1.0), []
    starts, shares, kinds = {}, {name: [] for name in LAYERS}, set()
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        optimizer.zero_grad()
        module.loss(batch).backward()
        held = slow and reference == "start" and step < 3  # until it is known whose size counts
        if read:
            sums = {}
            for name in LAYERS:
                row = sums.setdefault(group(name), [0.0, 0.0, 0.0, 0, [], []])
                for i, value in enumerate(read[name]):
                    row[i] = row[i] + value
            x = {}
            for key, (a, e, w, n, elements, _) in sums.items():
                var = max(e - max(a, 0), 1e-3 * e)
                match rule:
                    case "variance":
                        x[key] = -0.5 * math.log(var / n)
                    case "trust":
                        x[key] = -0.5 * math.log(var / n) + 0.5 * math.log(w / n)
                    case "snr":
                        x[key] = 0.5 * math.log(max(a, 1e-3 * e) / var)
                    case "article":
                        x[key] = 1 + 0.5 * (1 - math.exp(-0.1 * torch.cat(elements).var().item()))
            low, high = (0.02, 10.0) if rule == "trust" else (0.4, 2.3)
            about, limits = dict.fromkeys(x, sum(x.values()) / len(x)), dict.fromkeys(x, (low, high))
            if reference == "start":
                for name in LAYERS:
                    shares[name].append(read[name][5][0])
            if reference == "start" and not held:
                starts = starts or dict(x)
                weights = [0.9**age for age in range(len(shares["net.0"]))][::-1]
                mean = {name: sum(map(mul, weights, row)) / sum(weights) for name, row in shares.items()}
                free = {group(name) for name in LAYERS if len(weights) > 2} - {
                    group(name) for name in LAYERS if mean[name] >= 0.003
                }
                hidden = sum(len(weights) > 2 and mean[name] < 0.003 for name in LAYERS)
                plain = {key: x[key] - 0.5 * math.log(row[2] / row[3]) for key, row in sums.items()}
                for key in x:
                    if key in free:
                        about[key] = sum(starts[other] for other in free) / len(free)
                    else:
                        x[key], about[key] = plain[key], sum(plain.values()) / len(x)
                        limits[key] = (0.02 if 2 * hidden >= len(LAYERS) else 0.4), 2.3
                kinds.add(len(free))
            raw = {
                name: x[group(name)]
                if rule == "article"
                else min(
                    max(math.exp(x[group(name)] - about[group(name)]), limits[group(name)][0]), limits[group(name)][1]
                )
                for name in LAYERS
            }
            if spare and not held and not free:
                raw = dict.fromkeys(LAYERS, 1.0)
        if held:
            raw = dict.fromkeys(LAYERS, 0.02)
        power = rate / max(rates[: step + 1]) if fade else 1.0
        used = {name: m**power for name, m in raw.items()}
        read = {}
        for name, layer in layers.items():
            g = layer.weight.grad.clone()
            g2, mean, past = g.square().sum().item(), 0.0, beta**step
            if beta and step > 1:
                rho = (1 - beta) * (1 + past) / ((1 + beta) * (1 - past))
                mean = (momentum[name].square().sum().item() / (1 - past) ** 2 - rho * g2) / (1 - rho)
            w2 = layer.weight.detach().square().sum().item()
            along = torch.cosine_similarity(g.flatten(), layer.weight.detach().flatten(), 0).item()
            read[name] = mean, g2, w2, g.numel(), [g.flatten()], [g.numel() * along**2]
            momentum[name] = beta * momentum[name] + (1 - beta) * g
        for own, factor in zip(optimizer.param_groups, [*used.values(), vectors**power], strict=True):
            own["lr"] = rate * factor
        optimizer.step()
        history.append(used)
    assert reference == "mean" or ((slow or 0 in kinds) and kinds & {1, 2}), (
        "at first no layer is taken to be free, and in the end not all are"
    )
    return module, history


@pytest.mark.parametrize(
    ("rule", "beta", "options"),
    [
        ("trust", 0.0, {"reference": "mean"}),
        ("trust", 0.0, {"reference": "start"}),
        ("trust", 0.9, {"reference": "start", "fade": True, "scheduler": ONE_CYCLE}),
        ("trust", 0.9, {"reference": "mean", "group": head_apart}),
        ("trust", 0.9, {"reference": "start", "vectors": 20.0}),
        ("trust", 0.9, {"reference": "start", "group": first_apart}),
        ("trust", 0.9, {"reference": "start", "spare": True}),
        ("trust", 0.9, {"reference": "start", "spare": True, "slow": False}),
        ("variance", 0.9, {"vectors": 0.5, "fade": True, "scheduler": ONE_CYCLE}),
        ("snr", 0.9, {}),
        ("snr", 0.9, {"group": head_apart}),
        ("variance", 0.9, {"fade": True, "scheduler": partial(CosineAnnealingLR, T_max=24)}),
        ("variance", 0.0, {"fade": True, "scheduler": WARM_UP}),
        ("article", 0.0, {"kind": Loud, "lr": 1e-4}),
        ("article", 0.9, {"kind": Loud, "lr": 1e-5, "group": head_apart}),
    ],
    ids=[
        "trust",
        "trust-start",
        "trust-start-momentum-fade",
        "trust-groups",
        "trust-vectors",
        "trust-start-groups",
        "default",
        "default-at-once",
        "variance-vectors-fade",
        "snr",
        "snr-groups",
        "variance-fade",
        "variance-warm-up",
        "article",
        "article-groups",
    ],
)
def test_equals_the_rule_written_out(rule, beta, options):
    options = {"kind": User, "lr": 0.05, **options}
    module = options["kind"](partial(SGD, lr=options["lr"], momentum=beta), options.get("scheduler"))
    recorder, groups = Recorder(), options.get("group", "layer")
    given = {"fade": options.get("fade", False), "vectors": options.get("vectors", 1.0)}
    if not options.get("spare"):
        given |= {"rule": rule, "reference": options.get("reference")}
    if not options.get("slow", True):
        given["slow_start"] = False
    callback = DynamicLayerLR(groups=groups, **given, **AT_ONCE)
    trainer_of(callback, recorder, epochs=4, precision="64-true").fit(module, images())
    expected, history = written_out(rule=rule, beta=beta, **options)
    assert len(history) == len(recorder.multipliers) == 24
    for got, want in zip(recorder.multipliers, history, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert max(abs(m - 1) for used in history for m in used.values()) > 0.05
    for got, want in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [torch.nn.Identity, torch.nn.BatchNorm2d])
def test_where_the_size_of_weights_counts_the_rule_is_variance(norm):
    """Without norm layers everywhere, before a BatchNorm nowhere."""

    class Unnormed(User):
        def __init__(self, make):
            super().__init__(make, norm=lambda channels: norm(channels) if norm is not torch.nn.Identity else norm())
            self.net[5] = torch.nn.Identity()

    def multipliers(**options):
        recorder = Recorder()
        callback = DynamicLayerLR(slow_start=False, **{**RULE, **options})
        trainer_of(callback, recorder).fit(Unnormed(partial(SGD, lr=0.05, momentum=0.9)), images())
        return recorder.multipliers

    plain, weighed = multipliers(rule="variance"), multipliers(rule="trust", reference="start")
    assert max(abs(m - 1) for used in plain for m in used.values()) > 0.05
    if norm is torch.nn.Identity:
        assert weighed == plain
        with pytest.warns(
            NoEffectWarning, match="no layer stands before a norm, and then the default rule scales none with SGD"
        ):
            assert {m for used in multipliers(rule=None) for m in used.values()} == {1.0}
    else:
        assert any(abs(a["net.0"] - b["net.0"]) > 0.05 for a, b in zip(plain, weighed, strict=True))


@pytest.mark.parametrize("make", [partial(SGD, lr=1e-3, momentum=0.9), partial(AdamW, lr=1e-3)])
@pytest.mark.parametrize("norms", [1, 2])
def test_a_noisy_head_may_go_below_the_usual_bound_where_most_layers_have_a_norm(make, norms):
    class NoisyHead(User):
        def __init__(self):
            super().__init__(make)
            if norms == 2:  # without a bias the size of net.4 is hidden
                self.net[4] = torch.nn.Linear(144, 8, bias=False)
            else:
                self.net[5] = torch.nn.Identity()
            self.net[6].register_forward_hook(lambda module, args, out: 30 * out)

    recorder = Recorder()
    module = NoisyHead()
    trainer_of(DynamicLayerLR(alpha=1.0, **AT_ONCE), recorder).fit(module, images())
    waited = 3 if isinstance(make(module.parameters()), SGD) else 0
    head = min(used["net.7"] for used in recorder.multipliers[waited:])
    if norms == 2:
        assert 0.02 <= head < 0.35
    else:
        assert head == pytest.approx(0.4)


@pytest.mark.parametrize("group", [str, first_apart])
def test_the_default_leaves_layers_before_a_norm_alone_with_other_optimizers(group):
    """Against the variances and the directions of the gradients, written out; net.0 stands before a BatchNorm."""
    read, shares, expected = None, {name: [] for name in LAYERS}, []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, _):
            nonlocal read
            used = dict.fromkeys(LAYERS, 1.0)
            if read:
                for name, row in read.items():
                    shares[name].append(row[2])
                ages = [0.9**age for age in range(len(shares["net.0"]))][::-1]
                counts = {
                    name
                    for name, row in shares.items()
                    if len(row) > 2 and sum(map(mul, ages, row)) / sum(ages) >= 0.003
                }
                free = {name for name, row in shares.items() if len(row) > 2} - counts
                sums = {}
                for name in LAYERS:
                    row = sums.setdefault(group(name), [0.0, 0])
                    row[0], row[1] = row[0] + read[name][0], row[1] + read[name][1]
                x = {key: -0.25 * math.log(e / n) for key, (e, n) in sums.items()}
                for name in counts:
                    about = sum(x.values()) / len(x)
                    used[name] = min(max(math.exp(x[group(name)] - about), 0.02 if 2 * len(free) >= 3 else 0.4), 2.3)
            expected.append(used)
            read = {}
            for name in LAYERS:
                w = pl_module.get_submodule(name).weight
                along = torch.cosine_similarity(w.grad.flatten(), w.detach().flatten(), 0).item()
                read[name] = w.grad.square().sum().item(), w.numel(), w.numel() * along**2

    recorder = Recorder()
    callback = DynamicLayerLR(groups="layer" if group is str else group, **AT_ONCE)
    module = User(partial(RMSprop, lr=1e-3))
    trainer_of(callback, recorder, Spy(), epochs=4, precision="64-true").fit(module, images())
    for got, want in zip(recorder.multipliers, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-6)
    assert {used["net.0"] for used in recorder.multipliers} == {1.0}
    if group is str:
        assert max(recorder.multipliers[-1].values()) > 1.05


def test_the_start_is_where_all_layers_have_a_gradient_or_else_the_end_of_the_warm_up():
    """As residual branches that begin at zero: at first the layers before the last have no gradient."""

    class Zero(User):
        def __init__(self, make):
            super().__init__(make)
            torch.nn.init.zeros_(self.net[7].weight)

    class Frozen(User):
        def __init__(self, make):
            super().__init__(make)
            self.net[0].weight.requires_grad_(False)

    def begun(kind, **options):
        callback = DynamicLayerLR(rule="trust", reference="start", ema=0.0, **options)
        trainer_of(callback, epochs=1).fit(kind(partial(SGD, lr=0.05)), images())  # 6 steps
        return (~callback.state_dict()["optimizers"][0]["layers"]["start"].isnan()).tolist()

    for slow in (False, True):
        assert begun(Zero, every=1, warmup=9, slow_start=slow) == [True] * 3
        assert begun(User, every=5, warmup=9, slow_start=slow) == [True] * 3
        assert begun(Frozen, every=1, warmup=9, slow_start=slow) == [False] * 3
        assert begun(Frozen, every=1, warmup=4, slow_start=slow) == [False, True, True]
    # The only reading that counts is that of the first step.
    assert begun(Zero, every=5, warmup=9, slow_start=False) == [False] * 3


def test_faded_multipliers_end_at_one_and_the_line_at_the_end_names_the_others(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("ds_lightning.callbacks.layer_lr.rank_zero_info", said.append)
    recorder = Recorder()
    schedule = partial(LambdaLR, lr_lambda=lambda step: max(1 - step / 20, 0.0))
    trainer_of(DynamicLayerLR(fade=True, **RULE), recorder).fit(User(partial(SGD, lr=0.05), schedule), images())
    assert recorder.multipliers[-1] == dict.fromkeys(LAYERS, 1.0)
    assert max(abs(m - 1) for m in recorder.multipliers[12].values()) > 0.05
    (line,) = said
    assert "multipliers before fading from 0." in line


def test_rates_on_a_device_can_not_fade():
    groups = [{"lr": 0.1}, {"lr": torch.tensor(0.1)}]
    check_rates(groups)
    with pytest.raises(ConfigError, match="fade=True can't work with a rate that is a tensor on meta"):
        check_rates([*groups, {"lr": torch.tensor(0.1, device="meta")}])

    def on_a_device(parameters):
        optimizer = SGD(parameters, lr=0.1)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
        return optimizer

    with pytest.raises(ConfigError, match="give the optimizer a float as lr, or leave fade out"):
        trainer_of(DynamicLayerLR(fade=True)).fit(User(on_a_device), images())


def test_a_group_that_has_no_name_is_refused():
    with pytest.raises(ConfigError, match=r"groups returns 7 for the layer 'net.0'; expected a str"):
        trainer_of(DynamicLayerLR(groups=lambda name: 7)).fit(User(), images())


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("layer1.0.conv2", "layer1.0"),
        ("layer1.0.downsample.0", "layer1.0"),
        ("encoder.layers.3.self_attn.in_proj_weight", "encoder.layers.3"),
        ("net.layer4.2.conv1", "net.layer4.2"),
        ("features.3.conv.0.0", "features.3.conv.0"),
        ("net.0", "net.0"),
        ("fc", "fc"),
        ("0", "0"),
        ("0.1", "0.1"),
    ],
)
def test_block_of_a_layer(layer, block):
    assert block_of(layer) == block


class Briefly(Loud):
    """Large gradients in the first three steps."""

    def loss(self, batch):
        return super().loss(batch) / (1.0 if self.trainer.global_step < 3 else 1e4)


def test_the_article_s_formula_warns_with_the_measured_scales(recwarn):
    recorder = Recorder()
    trainer_of(DynamicLayerLR(rule="article", **AT_ONCE), recorder).fit(Briefly(partial(SGD, lr=1e-5)), images())
    scales = [m for used in recorder.multipliers for m in used.values()]
    assert max(scales) > 1.1
    assert max(recorder.multipliers[-1].values()) < 1.001
    (said,) = (str(w.message) for w in recwarn if issubclass(w.category, NoEffectWarning))
    assert f"gave scales from {min(scales):.7f} to {max(scales):.7f} over 30 optimizer steps" in said
    assert "more than 1% from 1 after 3 of 29 readings" in said


def test_the_article_s_formula_is_quiet_where_it_has_an_effect(recwarn):
    trainer_of(DynamicLayerLR(rule="article", **AT_ONCE)).fit(Loud(partial(SGD, lr=1e-5)), images())
    assert not [w for w in recwarn if issubclass(w.category, NoEffectWarning)]


def test_what_is_read_of_scaled_gradients():
    """A fused optimizer unscales inside its kernel, so that gradients are still scaled when they are read."""
    module = User()
    module.loss(next(iter(images()))).backward()
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
    optimizer.grad_scale = torch.tensor(8.0)
    layers = find_layers(module, module.parameters())
    statistics = LayerStatistics().aligned([layer.name for layer in layers])
    rows = read_norms(optimizer, layers, statistics, False, ("weight", "sum", "inner")).by_row(LAYERS[::-1])
    weights = [module.get_submodule(name).weight for name in LAYERS[::-1]]
    assert rows["weight"].tolist() == pytest.approx([w.norm().item() for w in weights])
    assert rows["gradient"].tolist() == pytest.approx([w.grad.norm().item() / 8 for w in weights])
    inner = [(w * w.grad).sum().item() / 8 for w in weights]
    assert rows["inner"].tolist() == pytest.approx(inner, abs=1e-6)
    assert rows["sum"].tolist() == pytest.approx([w.grad.sum().item() / 8 for w in weights], abs=1e-6)


def test_variances_are_logged():
    class Norms(pl.Callback):
        def __init__(self):
            self.squares = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.squares.append(pl_module.net[4].weight.grad.square().mean().item())

    logger, norms = Memory(), Norms()
    trainer_of(DynamicLayerLR(**AT_ONCE), norms, logger=logger, log_every_n_steps=1, epochs=2).fit(
        User(partial(SGD, lr=0.05)), images()
    )
    ours = [row for _, row in logger.rows if "layer_lr/net.4" in row]
    assert "layer_lr_variance/net.4" not in ours[0]  # nothing was read before the first step
    # Without momentum all is variance; it counts one period after it was read.
    found = [row["layer_lr_variance/net.4"] for row in ours[1:]]
    assert found == pytest.approx(norms.squares[:-1], rel=1e-5)
