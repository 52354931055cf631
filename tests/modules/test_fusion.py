import copy
import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from fusion_cases import (
    AUDIO,
    CLASSES,
    IMAGE,
    LABEL,
    NAMES,
    OPTIONS,
    PRESENT,
    SAMPLES,
    SEVERAL,
    TABLE,
    Flat,
    Rows,
    RowsData,
    batch_of,
    model_of,
    trainer_in,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.modules import MultimodalFusion
from ds_lightning.networks import TextEncoder

FUSIONS = [
    {"fusion": "cross"},
    {"fusion": "cross", "skip": False},
    {"fusion": "late"},
    {"fusion": "single", "single": "audio"},
]


def quiet(model: MultimodalFusion) -> dict[str, Any]:
    logged: dict[str, Any] = {}
    model.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    return logged


def gradients(model: MultimodalFusion) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- what is absent


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_stands_in_an_absent_entry_changes_nothing(fusion: dict[str, Any]) -> None:
    found = []
    for fill in (0.0, math.nan, 1e9):
        model = model_of(**fusion)
        quiet(model)
        batch = batch_of(fill=fill)
        loss = model.training_step(batch, 0)
        loss.backward()
        found.append((loss.detach(), model.eval()(batch).detach(), gradients(model)))
    for loss, logits, grads in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(logits, found[0][1])
        assert all(torch.equal(grad, found[0][2][name]) for name, grad in grads.items())
        assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("fusion", FUSIONS[:3])
def test_a_sample_does_not_depend_on_what_the_others_have(fusion: dict[str, Any]) -> None:
    model, batch = model_of(**fusion).eval(), batch_of(fill=math.nan)
    together = model(batch)
    for row in range(SAMPLES):
        one = {name: x[row : row + 1] for name, x in batch.items()}
        # Without the key of what it does not have.
        one = {name: x for name, x in one.items() if name not in NAMES or PRESENT[row, NAMES.index(name)]}
        torch.testing.assert_close(model(one)[0], together[row], rtol=1e-5, atol=1e-6)


def test_batch_norm_sees_only_the_samples_that_are_there() -> None:
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2, momentum=1.0))
    norm.num_features = 2  # type: ignore[assignment]
    model = model_of(encoders={"image": None, "audio": None, "table": norm}, encoder_options={**OPTIONS, "table": {}})
    quiet(model)
    model.training_step(batch_of(fill=1e6), 0)
    seen = TABLE[PRESENT[:, 2]]
    torch.testing.assert_close(norm[1].running_mean, seen.mean(0))
    torch.testing.assert_close(norm[1].running_var, seen.var(0))


def test_without_present_all_are_there() -> None:
    model = model_of().eval()
    batch = {"image": IMAGE, "audio": AUDIO, "table": TABLE}
    everything = torch.ones(SAMPLES, 3, dtype=torch.bool)
    torch.testing.assert_close(model(batch), model({**batch, "present": everything}), rtol=1e-5, atol=1e-6)


def test_padding_of_every_kind_changes_nothing() -> None:
    options = {
        "text": {"vocab_size": 9, "width": 8, "depth": 1, "heads": 2},
        "audio": {"mels": 4, "width": 8, "depth": 1},
        "series": {"channels": 2, "width": 8, "depth": 1},
    }
    for fusion in ("cross", "late"):
        encoders = dict.fromkeys(options)
        model = model_of(encoders=encoders, encoder_options=options, fusion=fusion).eval()
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(1, 9, (2, 5), generator=generator)
        audio, series = torch.randn(2, 4, 12, generator=generator), torch.randn(2, 2, 16, generator=generator)
        padded = {
            "text": F.pad(text, (0, 3)),
            "audio": F.pad(audio, (0, 9), value=50.0),
            "audio_mask": F.pad(torch.ones(2, 12), (0, 9)).bool(),
            "series": F.pad(series, (0, 7), value=-50.0),
            "series_mask": F.pad(torch.ones(2, 16), (0, 7)).bool(),
        }
        plain = {"text": text, "audio": audio, "audio_mask": torch.ones(2, 12).bool(), "series": series}
        torch.testing.assert_close(model(padded), model(plain), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the fusions


def flat_model(**options: Any) -> MultimodalFusion:
    encoders = {"image": Flat(64), "audio": Flat(48), "table": Flat(2)}
    return model_of(encoders=encoders, encoder_options=None, **options)


def alone(model: MultimodalFusion) -> Tensor:
    """Logits (B, M, C) of each modality alone, from the weights."""
    network: Any = model.network
    parts = []
    for name, x in zip(NAMES, (IMAGE, AUDIO, TABLE), strict=True):
        encoder: Any = model._given[name]
        parts.append(network.heads[name](encoder(x)))
    return torch.stack(parts, dim=1)


def test_late_is_the_mean_of_what_is_there() -> None:
    model = flat_model(fusion="late").eval()
    each = alone(model)
    expected = torch.stack([each[i][PRESENT[i]].mean(0) for i in range(SAMPLES)])
    torch.testing.assert_close(model(batch_of(fill=math.nan)), expected)
    nothing = {**batch_of(), "present": torch.zeros_like(PRESENT)}
    assert torch.equal(model(nothing), torch.zeros(SAMPLES, CLASSES))


def test_cross_adds_late_to_what_attention_says_and_begins_with_late() -> None:
    options = {"encoders": {"image": Flat(64), "audio": Flat(48), "table": Flat(2)}, "encoder_options": None}
    with_skip, without = model_of(**options, auxiliary=0.0).eval(), model_of(**options, skip=False).eval()
    network: Any = with_skip.network
    without.load_state_dict(with_skip.state_dict())
    batch, each = batch_of(fill=math.nan), alone(with_skip)
    late = torch.stack([each[i][PRESENT[i]].mean(0) for i in range(SAMPLES)])
    torch.testing.assert_close(with_skip(batch), without(batch) + late)
    assert without(batch).abs().max() > 0.01
    subset = batch["present"] & torch.tensor([True, False, True])
    torch.testing.assert_close(
        network.logits(network.encode(batch), names=("image", "table")), with_skip({**batch, "present": subset})
    )
    new = MultimodalFusion(**options, num_classes=CLASSES).eval()
    torch.testing.assert_close(new(batch), torch.stack([alone(new)[i][PRESENT[i]].mean(0) for i in range(SAMPLES)]))


def test_single_builds_and_reads_one_alone() -> None:
    model = model_of(encoders=dict.fromkeys(NAMES), fusion="single", single="table")
    assert model.network is not None
    assert list(model.network.encoders) == ["table"]
    logits = model.eval()({"table": TABLE})
    batch = {"table": TABLE, "image": torch.full_like(IMAGE, math.nan), "present": torch.ones_like(PRESENT)}
    torch.testing.assert_close(model(batch), logits)
    absent = model({**batch, "present": PRESENT})
    assert torch.equal(absent[~PRESENT[:, 2]], torch.zeros(1, CLASSES))
    torch.testing.assert_close(absent[PRESENT[:, 2]], logits[PRESENT[:, 2]])


def test_the_loss_is_that_of_all_and_of_each_that_is_there() -> None:
    model = flat_model(auxiliary=0.7)
    logged, batch = quiet(model), batch_of(fill=math.nan)
    loss = model.training_step(batch, 0)
    together, each = model(batch), alone(model)
    total = 0.0
    for i in range(SAMPLES):
        losses = [-each[i, m].log_softmax(0)[LABEL[i]] for m in range(3) if PRESENT[i, m]]
        total += -together[i].log_softmax(0)[LABEL[i]] + 0.7 * sum(losses) / len(losses)
    torch.testing.assert_close(loss, total / SAMPLES, rtol=1e-5, atol=1e-6)
    assert logged["train/accuracy"] == (together.argmax(1) == LABEL).float().mean()


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_mixed_batch_is_weighted_by_lambda(multilabel: bool) -> None:
    label = SEVERAL if multilabel else LABEL
    model = flat_model(auxiliary=0.5, multilabel=multilabel)
    logged = quiet(model)
    mix = torch.linspace(0, 1, SAMPLES)
    batch = batch_of(label=label, label_mixed=label.roll(1, 0), mix=mix)
    loss = model.training_step(batch, 0)
    together, each = model(batch), alone(model)
    total, hits = 0.0, 0.0
    for i in range(SAMPLES):
        for share, target in ((mix[i], label[i]), (1 - mix[i], label.roll(1, 0)[i])):
            outputs = [together[i], *(each[i, m] for m in range(3) if PRESENT[i, m])]
            if multilabel:
                losses = [F.binary_cross_entropy(one.sigmoid(), target) for one in outputs]
                hits += share * ((together[i] > 0) == (target > 0)).float().mean()
            else:
                losses = [F.cross_entropy(one[None], target[None]) for one in outputs]
                hits += share * (together[i].argmax() == target)
            total += share * (losses[0] + 0.5 * sum(losses[1:]) / len(losses[1:]))
    torch.testing.assert_close(loss, total / SAMPLES, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged["train/accuracy"], hits / SAMPLES, rtol=1e-5, atol=1e-6)


def test_attention_learns_what_no_mean_of_logits_can() -> None:
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    batch = {"series": a[:, None] * 2.0 - 1, "table": b[:, None] * 2.0 - 1, "label": a ^ b}
    accuracy = {}
    for fusion in ("cross", "late"):
        model = model_of(
            encoders={"series": Flat(1), "table": Flat(1)},
            encoder_options=None,
            num_classes=2,
            width=16,
            fusion=fusion,
            optimizer=partial(torch.optim.AdamW, lr=0.01),
        )
        logged = quiet(model)
        optimizer: Any = model.configure_optimizers()
        for _ in range(60):
            optimizer.zero_grad()
            model.training_step(batch, 0).backward()
            optimizer.step()
        accuracy[fusion] = logged["train/accuracy"].item()
    # A sum of a function of each can have at most three of the four corners right.
    assert accuracy["cross"] == 1.0
    assert accuracy["late"] <= 0.75


def test_modality_dropout_hides_all_but_one_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flat_model(modality_dropout=0.9999, fusion="late", auxiliary=0.0)
    quiet(model)
    torch.manual_seed(1)
    loss = model.training_step({"image": IMAGE, "audio": AUDIO, "table": TABLE, "label": LABEL}, 0)
    losses = torch.stack([F.cross_entropy(alone(model)[:, m], LABEL, reduction="none") for m in range(3)], dim=1)
    assert losses.amin(1).mean() < loss < losses.amax(1).mean()
    assert not torch.isclose(loss, F.cross_entropy(alone(model).mean(1), LABEL))
    torch.testing.assert_close(model.eval()({"image": IMAGE, "audio": AUDIO, "table": TABLE}), alone(model).mean(1))


# ---------------------------------------------------------------- the figures of an evaluation


@pytest.mark.parametrize("fusion", ["cross", "late"])
def test_a_subset_is_a_run_with_nothing_else_present(fusion: str, tmp_path: Any) -> None:
    model = model_of(fusion=fusion)
    (logged,) = trainer_in(tmp_path).validate(model, DataLoader(Rows(), batch_size=7), verbose=False)
    model.eval()
    batch = batch_of()
    assert logged["val/accuracy"] == pytest.approx((model(batch).argmax(1) == LABEL).float().mean().item())
    assert logged["val/loss"] == pytest.approx(F.cross_entropy(model(batch), LABEL).item(), abs=1e-5)
    subsets = [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    for columns in subsets:
        there = torch.zeros_like(PRESENT)
        there[:, columns] = PRESENT[:, columns]
        rows = there.any(1)
        expected = (model({**batch, "present": there}).argmax(1) == LABEL)[rows].float().mean().item()
        name = "_".join(NAMES[column] for column in columns)
        assert logged[f"val/subset/{name}/accuracy"] == pytest.approx(expected)
    assert sum(name.startswith("val/subset/") for name in logged) == 2 * len(subsets)


def test_encoders_run_once_a_batch_whatever_the_subsets(tmp_path: Any) -> None:
    model = flat_model()
    calls: list[int] = []
    encoder: Any = model._given["audio"]
    encoder.layer.register_forward_hook(lambda *_: calls.append(1))
    trainer_in(tmp_path).test(model, DataLoader(Rows(absent=False), batch_size=8), verbose=False)
    assert len(calls) == 3


OVER_ALL = {"test/loss", "test/accuracy", "test/f1", "test/auroc"}


def test_no_subsets_where_they_are_not_wanted(tmp_path: Any) -> None:
    (logged,) = trainer_in(tmp_path).test(model_of(subsets=False), DataLoader(Rows(), batch_size=8), verbose=False)
    assert set(logged) == OVER_ALL


def test_a_single_modality_is_judged_by_the_samples_that_have_it(tmp_path: Any) -> None:
    model = model_of(fusion="single", single="image")
    (logged,) = trainer_in(tmp_path).test(model, DataLoader(Rows(), batch_size=8), verbose=False)
    assert set(logged) == OVER_ALL | {"test/subset/image/accuracy", "test/subset/image/auroc"}
    batch = batch_of()
    there = batch["present"][:, list(model.modalities).index("image")]
    assert 0 < there.sum() < len(there)
    right = (model.eval()(batch).argmax(dim=1) == batch["label"])[there].float().mean().item()
    assert logged["test/subset/image/accuracy"] == pytest.approx(right)


def test_several_labels_a_sample(tmp_path: Any) -> None:
    model = model_of(multilabel=True)
    run = trainer_in(tmp_path, max_epochs=2)
    run.fit(model, DataLoader(Rows(SEVERAL), batch_size=8), DataLoader(Rows(SEVERAL), batch_size=8))
    logits = model.eval()(batch_of())
    right = ((logits > 0) == (SEVERAL > 0)).float().mean().item()
    assert run.callback_metrics["val/accuracy"] == pytest.approx(right)
    (one, *_) = trainer_in(tmp_path).predict(model, DataLoader(Rows(SEVERAL), batch_size=8))
    torch.testing.assert_close(one, logits[:8].sigmoid())


# ---------------------------------------------------------------- gradients


class Shares(L.Callback):
    """What is logged at each step, beside the norms of the gradients."""

    def __init__(self) -> None:
        self.norms: list[list[float]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        encoders = [pl_module._given[name] for name in NAMES]
        norms = [torch.cat([p.grad.flatten() for p in one.parameters()]).norm().item() for one in encoders]
        self.norms.append(norms)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("gradient_share")}
        self.logged.append(metrics)


def test_gradient_shares_are_norms_over_their_sum_now_and_then(tmp_path: Any) -> None:
    spy = Shares()
    run = trainer_in(tmp_path, max_epochs=2, log_every_n_steps=2, callbacks=[spy])
    run.fit(flat_model(), DataLoader(Rows(), batch_size=8))
    assert len(spy.norms) == 6
    assert spy.logged[0] == {}
    for step in (1, 3, 5):
        expected = {
            f"gradient_share/{n}": v / sum(spy.norms[step]) for n, v in zip(NAMES, spy.norms[step], strict=True)
        }
        assert spy.logged[step] == pytest.approx(expected, abs=1e-6)


def test_a_frozen_encoder_stays_as_it_is(tmp_path: Any) -> None:
    model = model_of(freeze=("image",))
    assert model.network is not None
    frozen = model.network.encoders["image"]
    before = copy.deepcopy(frozen.state_dict())
    run = trainer_in(tmp_path, log_every_n_steps=1)
    run.fit(model, DataLoader(Rows(), batch_size=8))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    model.train()
    assert not any(module.training for module in frozen.encoder.modules())
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in frozen.parameters()}
    assert {k for k in run.callback_metrics if k.startswith("gradient")} == {
        "gradient_share/audio",
        "gradient_share/table",
    }


# ---------------------------------------------------------------- attention


def test_attention_maps_have_rows_that_sum_to_one_where_something_is() -> None:
    model = model_of(depth=2).eval()
    names, matrix, tokens = model.attention_maps(batch_of(fill=math.nan))
    assert names == ("fused", *NAMES)
    assert not matrix.requires_grad
    there = torch.cat([torch.ones(SAMPLES, 1), PRESENT.float()], dim=1)
    torch.testing.assert_close(matrix.sum(2), there)
    assert torch.equal(matrix * (1 - there)[:, None, :], torch.zeros_like(matrix))
    for column, name in enumerate(NAMES):
        torch.testing.assert_close(tokens[name].sum(1), matrix[:, 0, column + 1])
    # The last layer's: the first one does not depend on the second's weights.
    network: Any = model.network
    with torch.no_grad():
        network.attention.blocks[1].queries_keys_values.weight.mul_(3.0)
    assert not torch.allclose(model.attention_maps(batch_of()).matrix, matrix)


def test_no_attention_maps_without_attention() -> None:
    with pytest.raises(ConfigError, match="fusion is 'late', which has no attention"):
        model_of(fusion="late").attention_maps(batch_of())


# ---------------------------------------------------------------- building and loading


def test_what_the_data_say_stays_in_the_checkpoint(tmp_path: Any) -> None:
    options = {name: {k: v for k, v in given.items() if k in ("width", "depth")} for name, given in OPTIONS.items()}
    model = model_of(num_classes=None, encoder_options=options, lr_scheduler="cosine")
    assert model.network is None
    run = trainer_in(tmp_path)
    run.fit(model, datamodule=RowsData())
    run.save_checkpoint(tmp_path / "c.ckpt")
    again = MultimodalFusion.load_from_checkpoint(tmp_path / "c.ckpt", weights_only=True)
    torch.testing.assert_close(again.eval()(batch_of()), model.eval()(batch_of()))
    probabilities: Any = torch.cat(trainer_in(tmp_path).predict(again, datamodule=RowsData()))  # type: ignore[arg-type]
    torch.testing.assert_close(probabilities, again(batch_of()).softmax(1))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match=r"other\.ckpt"):
        MultimodalFusion.load_from_checkpoint(tmp_path / "other.ckpt", weights_only=True)


def test_a_users_encoders(tmp_path: Any) -> None:
    encoders = {
        "text": TextEncoder(9, width=8, depth=1, heads=2),
        "image": nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
    }
    model = model_of(encoders=encoders, encoder_options={"image": {"width_in": 5}})
    batch = {"text": torch.randint(0, 9, (4, 6)), "image": IMAGE[:4]}
    trainer = trainer_in(tmp_path)
    trainer.fit(model, DataLoader([{**batch, "label": LABEL[:4]}], batch_size=None))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    again = MultimodalFusion.load_from_checkpoint(tmp_path / "c.ckpt", encoders=encoders, weights_only=True)
    torch.testing.assert_close(again.eval()(batch), model.eval()(batch))


def test_half_precision(tmp_path: Any) -> None:
    run = trainer_in(tmp_path, precision="bf16-mixed")
    run.fit(model_of(modality_dropout=0.3), RowsData())
    assert math.isfinite(run.callback_metrics["train/loss"])
    assert 0 <= run.callback_metrics["val/auroc"] <= 1


def test_from_the_command_lines_words() -> None:
    from ds_lightning.training import build, resolve

    config = resolve(
        [],
        {
            "model": {
                "class_path": "MultimodalFusion",
                "init_args": {
                    "encoders": {"table": None, "image": "resnet8"},
                    "num_classes": 3,
                    "freeze": ["image"],
                    "encoder_options": {"table": {"columns": 2}, "image": {"in_channels": 1, "width": 4}},
                },
            },
            "trainer.logger": False,
        },
    )
    model: Any = build(config).model
    assert model.eval()({"table": TABLE, "image": IMAGE}).shape == (SAMPLES, CLASSES)


# ---------------------------------------------------------------- several processes


class Halves(L.LightningDataModule):
    """Each process gets every other sample of a batch of 8; the second one's first half batch has no audio."""

    def train_dataloader(self) -> DataLoader[Any]:
        processes, rank = self.trainer.world_size, self.trainer.global_rank  # type: ignore[union-attr]
        rows = Rows(dtype=torch.float64)
        rows.all["present"][1:8:2, 1] = False
        mine = torch.utils.data.Subset(rows, range(rank, SAMPLES, processes))
        return DataLoader(mine, batch_size=8 // processes)

    val_dataloader = train_dataloader


class EndGloo(L.Callback):
    """Ends gloo's threads before the process ends, which now and then aborts otherwise."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def test_two_processes_are_one_also_where_one_has_no_audio(tmp_path: Any) -> None:
    found = []
    for options in ({"strategy": "ddp_fork", "devices": 2}, {"devices": 1}):
        model = model_of(optimizer=partial(torch.optim.SGD, lr=0.1)).double()
        run = trainer_in(
            tmp_path,
            precision="64-true",
            use_distributed_sampler=False,
            enable_checkpointing=False,
            callbacks=EndGloo(),
            **options,
        )
        run.fit(model, Halves())
        metrics = {k: v.item() for k, v in run.callback_metrics.items() if k.startswith("val/")}
        found.append((model.state_dict(), metrics))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-9, atol=1e-11)
    assert len(found[0][1]) == 4 + 2 * 7
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"encoders": {}}, "encoders is empty"),
        ({"encoders": {"imag": None}, "encoder_options": None}, "encoders has 'imag'; did you mean image?"),
        ({"encoder_options": {"text": {}}}, "encoder_options has 'text'; expected some of image, audio, table"),
        ({"freeze": ("audoi",)}, "freeze has 'audoi'; did you mean audio?"),
        ({"fusion": "early"}, "fusion is 'early'; expected 'cross', 'late' or 'single'"),
        ({"fusion": "single"}, "single is not given; expected one of image, audio, table"),
        ({"single": "image"}, "single is 'image' and fusion 'cross'"),
        ({"fusion": "single", "single": "text"}, "single has 'text'; expected some of"),
        ({"num_classes": 1}, "num_classes is 1; expected at least 2"),
        ({"width": 9}, "width is 9; expected a multiple of heads, 2"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; expected a probability"),
        ({"modality_dropout": -0.1}, "modality_dropout is -0.1; expected a probability"),
        ({"auxiliary": math.nan}, "auxiliary is nan; expected a weight of at least 0"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'; expected 'cosine'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        model_of(**options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"present": PRESENT[:, :2]}, r"present is torch.bool of shape \(24, 2\); expected .*image, audio, table"),
        ({"present": PRESENT.float()}, "present is torch.float32 of shape"),
        ({"audio": None}, "the batch has no audio, only image, table; give it, or `present`"),
        ({"audio": AUDIO[:5]}, "the batch has 24 of image and 5 of audio"),
        ({"audio_mask": torch.ones(SAMPLES, 3).bool()}, r"audio_mask is torch.bool of shape \(24, 3\)"),
        ({"label": None}, "expected `label` among them"),
        ({"label": SEVERAL}, r"label is torch.float32 of shape \(24, 3\); expected class indices"),
        ({"label": LABEL + 1}, "label goes from 1 to 3; expected 0 to 2"),
        ({"label": LABEL - 1}, "label goes from -1 to 1; expected 0 to 2"),
        ({"mix": torch.ones(SAMPLES)}, "a mixed batch needs `mix` and `label_mixed`"),
        ({"mix": torch.ones(2), "label_mixed": LABEL}, r"mix has the shape \(2,\)"),
    ],
)
def test_a_wrong_batch_is_refused(change: dict[str, Any], text: str) -> None:
    batch = {name: x for name, x in {**batch_of(), **change}.items() if x is not None}
    with pytest.raises(ConfigError, match=text):
        model_of().training_step(batch, 0)


@pytest.mark.parametrize(
    ("label", "text"),
    [(LABEL, r"label is torch.int64 of shape \(24,\); expected float \(24, 3\)"), (SEVERAL * 2, "expected 0 to 1")],
)
def test_wrong_labels_of_several_classes(label: Tensor, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        model_of(multilabel=True).training_step(batch_of(label=label), 0)


def test_no_batch_at_all() -> None:
    with pytest.raises(ConfigError, match="batch is a str"):
        model_of()("batch")
    with pytest.raises(ConfigError, match=r"the batch has the keys \['label'\]; expected image, audio, table"):
        model_of()({"label": LABEL})


def test_what_nobody_says(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="num_classes is neither given nor known"):
        trainer_in(tmp_path).fit(model_of(num_classes=None), DataLoader(Rows(), batch_size=8))
    model = model_of(encoder_options={**OPTIONS, "audio": {}})
    with pytest.raises(ConfigError, match=r"mels of the audio encoder is neither .* encoder_options=\{'audio'"):
        trainer_in(tmp_path).fit(model, DataLoader(Rows(), batch_size=8))


def test_modalities_in_another_order_than_the_datas(tmp_path: Any) -> None:
    model = model_of(encoders=dict.fromkeys(("audio", "image", "table")))
    with pytest.raises(ConfigError, match="encoders has audio, image, table, and the data have image, audio, table"):
        trainer_in(tmp_path).fit(model, datamodule=RowsData())


class Odd(nn.Module):
    """Says that it gives tokens, and gives none."""

    num_features = 4

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def test_an_encoder_that_gives_no_tokens() -> None:
    model = model_of(encoders={"table": Odd()}, encoder_options=None)
    with pytest.raises(
        ConfigError, match=r"the table encoder Odd gave a tensor \(24, 2\); expected tokens \(24, N, 4\)"
    ):
        model({"table": TABLE})
