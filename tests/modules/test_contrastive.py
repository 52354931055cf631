import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contrastive_cases as cases
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ds_lightning.callbacks import ExactResume
from ds_lightning.errors import CollapseWarning, ConfigError
from ds_lightning.functional import info_nce, nt_xent
from ds_lightning.modules import ContrastivePretraining
from ds_lightning.modules._collapse import CollapseWatch
from ds_lightning.networks import TextEncoder

MOCO = {"momentum_encoder": 0.9, "queue_size": 40}


def small(encoder: Any = "resnet8", **options: Any) -> ContrastivePretraining:
    torch.manual_seed(0)
    known = cases.SMALL if encoder == "resnet8" else cases.TEXT if encoder in ("text", "bag") else {}
    return ContrastivePretraining(encoder, **{**known, **options})


def quiet(model: ContrastivePretraining, monkeypatch: pytest.MonkeyPatch) -> ContrastivePretraining:
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    monkeypatch.setattr(model, "_log_figures", lambda *_: None)
    model._trainer = type("Stub", (), {"log_every_n_steps": 50, "global_step": 0, "global_rank": 0})()
    return model


def loss_of(model: ContrastivePretraining, batch: Any) -> Tensor:
    return model.training_step(batch, 0)


def gradients(model: ContrastivePretraining) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def pairwise_loss(query: Tensor, keys: Tensor, positive: list[int], temperature: float) -> Tensor:
    """InfoNCE row by row, with cosine similarities."""
    total = torch.zeros(())
    for row, own in zip(query, positive, strict=True):
        logits = torch.stack([F.cosine_similarity(row, key, dim=0) for key in keys]) / temperature
        total = total - logits.log_softmax(0)[own]
    return total / len(query)


# ---------------------------------------------------------------- the methods' losses


def test_simclr_is_the_loss_of_its_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quiet(small(temperature=0.2), monkeypatch), cases.batch()
    tower = model.towers["views"]
    first, second = (tower(batch[side]["image"]) for side in ("first", "second"))
    assert torch.allclose(loss_of(model, batch), nt_xent(first, second, 0.2), atol=1e-5)
    other = quiet(small(temperature=0.2, loss="info_nce"), monkeypatch)
    rows = list(range(len(first)))
    both = (pairwise_loss(first, second, rows, 0.2) + pairwise_loss(second, first, rows, 0.2)) / 2
    assert torch.allclose(loss_of(other, batch), both, atol=1e-4)


def test_moco_compares_with_the_slow_encoder_and_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quiet(small(**MOCO), monkeypatch), cases.batch()
    with torch.no_grad():
        for parameter in model.slow_towers.parameters():
            parameter.mul_(0.9)
    before = model.queue.keys.clone()
    query = model.towers["views"](batch["first"]["image"])
    key = model.slow_towers["views"](batch["second"]["image"])
    expected = pairwise_loss(query, torch.cat([key, before]), list(range(len(query))), 0.1)
    loss = loss_of(model, batch)
    assert torch.allclose(loss, expected, atol=1e-4)
    loss.backward()
    assert not any(name.startswith("slow_towers") for name in gradients(model))
    assert torch.allclose(model.queue.keys, torch.cat([F.normalize(key, dim=1), before])[:40], atol=1e-6)


def test_without_a_queue_both_views_are_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quiet(small(momentum_encoder=0.9), monkeypatch), cases.batch()
    with torch.no_grad():
        for parameter in model.slow_towers.parameters():
            parameter.mul_(0.9)
    views = [batch[side]["image"] for side in ("first", "second")]
    fast, slow = ([towers["views"](view) for view in views] for towers in (model.towers, model.slow_towers))
    expected = (info_nce(fast[0], slow[1], 0.1) + info_nce(fast[1], slow[0], 0.1)) / 2
    assert torch.allclose(loss_of(model, batch), expected, atol=1e-5)


def test_the_slow_encoder_follows_once_a_step(tmp_path: Any) -> None:
    model = small(**MOCO, optimizer=partial(torch.optim.SGD, lr=0.1))
    start = [parameter.clone() for parameter in model.slow_towers.parameters()]
    # 2 batches an epoch, and one step.
    cases.trainer(tmp_path, accumulate_grad_batches=2).fit(model, cases.Viewed())
    moved = 0
    for old, slow, fast in zip(start, model.slow_towers.parameters(), model.towers.parameters(), strict=True):
        assert torch.allclose(slow, 0.9 * old + 0.1 * fast, atol=1e-6)
        moved += not torch.equal(old, slow)
    assert moved == len(start)


def test_a_sentence_twice_differs_by_its_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quiet(small("text"), monkeypatch), cases.batch(modality="text")
    assert torch.equal(batch["first"]["text"], batch["second"]["text"])
    _, first, second = model._compared(batch, training=True)
    assert not torch.allclose(first, second)
    model.eval()
    _, first, second = model._compared(batch, training=False)
    assert torch.allclose(first, second, atol=1e-6)
    longer = torch.cat([batch["second"]["text"], torch.zeros(cases.SAMPLES, 3, dtype=torch.int64)], dim=1)
    _, _, padded = model._compared({**batch, "second": {"text": longer}}, training=False)
    assert torch.allclose(padded, second, atol=1e-5)


def test_samples_that_show_the_same_are_no_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quiet(small(mask_same=True, loss="info_nce", **MOCO), monkeypatch), cases.batch(labels=5)
    batch["label"][:4] = -1
    label = batch["label"].tolist()
    query = model.towers["views"](batch["first"]["image"])
    key = model.slow_towers["views"](batch["second"]["image"])
    total = torch.zeros(())
    for row in range(len(query)):
        kept = [j for j in range(len(key)) if j == row or label[row] < 0 or label[j] != label[row]]
        keys = torch.cat([key[kept], model.queue.keys])
        total = total + pairwise_loss(query[row : row + 1], keys, [kept.index(row)], 0.1)
    assert torch.allclose(loss_of(model, batch), total / len(query), atol=1e-4)
    # Now the queue has ids: all negatives of a second pass are of other classes, or unknown.
    assert model.queue.ids[4:32].tolist() == label[4:]
    assert (model.queue.ids[:4] < -(2**60)).all()
    before = model.queue.keys.clone(), model.queue.ids.tolist()
    found, total = loss_of(model, batch), torch.zeros(())
    for row in range(len(query)):
        kept = [j for j in range(len(key)) if j == row or label[row] < 0 or label[j] != label[row]]
        others = [j for j in range(40) if label[row] < 0 or before[1][j] != label[row]]
        keys = torch.cat([key[kept], before[0][others]])
        total = total + pairwise_loss(query[row : row + 1], keys, [kept.index(row)], 0.1)
    assert torch.allclose(found, total / len(query), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"momentum_encoder": 0.9}, {**MOCO, "hardness": 0.5}])
def test_micro_batches_give_the_gradient_of_the_whole(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, found = cases.batch(), []
    for micro_batch in (None, 7):
        model = quiet(small(micro_batch=micro_batch, **options), monkeypatch)
        loss = loss_of(model, batch)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (whole, expected), (parts, grads) = found
    assert torch.allclose(whole, parts, atol=1e-5)
    assert expected.keys() == grads.keys()
    for name, value in expected.items():
        assert torch.allclose(grads[name], value, atol=1e-4 * float(value.abs().max()) + 1e-7), name


# ---------------------------------------------------------------- fits


@pytest.mark.parametrize("options", [{**MOCO, "learn_temperature": True}, {"micro_batch": 5}])
def test_resume_is_bit_equal(tmp_path: Any, options: Any) -> None:
    data = cases.Viewed(batch_size=8)

    def fit(epochs: int, ckpt: Any = None) -> ContrastivePretraining:
        model = small(**options)
        run = cases.trainer(tmp_path, max_epochs=epochs)
        run.fit(model, data, ckpt_path=ckpt)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole = fit(3)
    fit(1)
    resumed = fit(3, tmp_path / "1.ckpt")
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys()
    if "queue_size" in options:
        assert {"queue.keys", "queue.ids", "temperature.log"} <= mine.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    loaded = ContrastivePretraining.load_from_checkpoint(tmp_path / "3.ckpt", weights_only=True)
    image = cases.batch()["first"]["image"]
    assert torch.equal(loaded.embed(image), resumed.embed(image))
    assert torch.load(tmp_path / "3.ckpt", weights_only=True)["hyper_parameters"]["in_channels"] == 1


def test_a_checkpoint_in_the_middle_of_an_epoch_has_the_step_of_the_slow_encoder(tmp_path: Any) -> None:
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model = small(**MOCO)
    run = cases.trainer(tmp_path, callbacks=[kept], enable_checkpointing=True)
    run.fit(model, cases.Viewed(batch_size=16))
    last = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(last[name], value), name


def test_two_ranks_equal_one(tmp_path: Any) -> None:
    """One SGD step of rate 1 moves each parameter by its gradient; the queue has the keys of both ranks."""

    def fit(batch_size: int, **options: Any) -> ContrastivePretraining:
        model = small(
            **MOCO, mask_same=True, learn_temperature=True, optimizer=partial(torch.optim.SGD, lr=1.0), micro_batch=5
        )
        data = cases.Viewed(cases.Views(labels=7), batch_size=batch_size)
        cases.trainer(tmp_path, max_steps=1, limit_val_batches=0, **options).fit(model, data)
        return model

    one = fit(16)
    two = fit(8, strategy="ddp_fork", devices=2)
    start = small(**MOCO, learn_temperature=True)
    mine, theirs = dict(two.named_parameters()), dict(one.named_parameters())
    for name, before in start.named_parameters():
        step = (theirs[name] - before).detach()
        assert name.startswith("slow") or step.abs().max() > 0, name
        assert torch.allclose(mine[name] - before, step, atol=1e-4 * float(step.abs().max()) + 1e-6), name
    # Rank 0 has the even samples and rank 1 the odd ones.
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    assert torch.allclose(two.queue.keys[:16], one.queue.keys[:16][order], atol=1e-5)
    assert two.queue.ids[:16].tolist() == one.queue.ids[:16][order].tolist()
    assert torch.equal(two.queue.keys[16:], one.queue.keys[16:])


def test_pairs_are_found_again(tmp_path: Any) -> None:
    encoders = {"image": "resnet8", "text": "bag"}
    options = {"image": {"width": 8}, "text": {"width": 16, "dropout": 0.0}}
    torch.manual_seed(0)
    model = ContrastivePretraining(
        encoders,
        encoder_options=options,
        projector=(16,),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        learn_temperature=True,
    )
    data = cases.Viewed(cases.ImagesAndTexts())
    run = cases.trainer(tmp_path, max_epochs=25)
    (before,) = run.validate(model, data, verbose=False)
    run.fit(model, data)
    (after,) = run.validate(model, data, verbose=False)
    assert before["val/recall_at_1"] < 0.2
    assert after["val/recall_at_1"] > 0.6
    expected = {f"val/recall_at_{k}{way}" for k in (1, 5, 10) for way in ("", "_reverse")}
    figures = {f"val/{name}" for name in ("alignment", "uniformity", "effective_rank", "spread", "temperature")}
    assert expected | figures | {"val/loss"} == set(after)
    predicted = run.predict(model, data)
    image = torch.cat([part["image"] for part in predicted])
    text = torch.cat([part["text"] for part in predicted])
    right = ((image @ text.T).argmax(1) == torch.arange(cases.SAMPLES)).float().mean()
    assert after["val/recall_at_1"] == pytest.approx(right.item(), abs=1e-6)
    assert torch.allclose(image.norm(dim=1), torch.ones(cases.SAMPLES), atol=1e-5)
    run.save_checkpoint(tmp_path / "pairs.ckpt")
    loaded = ContrastivePretraining.load_from_checkpoint(tmp_path / "pairs.ckpt", weights_only=True).eval()
    assert loaded.embed(cases.SENTENCES[:3], "text").shape == (3, 16)
    assert torch.allclose(loaded.project(cases.SENTENCES, "text"), text, atol=1e-5)
    with pytest.raises(ConfigError, match="modality is 'audio'; expected one of image, text"):
        loaded.embed(cases.SENTENCES[:3], "audio")


def test_what_is_not_given_comes_from_the_data(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = ContrastivePretraining("text", encoder_options={"width": 16, "depth": 1}, projector=(8,))
    run = cases.trainer(tmp_path)
    run.fit(model, cases.Viewed(cases.Views("text")))
    assert model.hparams["encoder_options"]["vocab_size"] == 30
    assert {"train/loss", "train/spread", "val/effective_rank", "val/loss"} <= set(run.callback_metrics)
    embedded = torch.cat(run.predict(model, cases.Viewed(cases.Views("text"))))
    assert torch.allclose(embedded, model.eval().embed(cases.SENTENCES), atol=1e-5)
    images = ContrastivePretraining(encoder_options={"width": 4}, projector=(8,))
    cases.trainer(tmp_path, limit_train_batches=1).fit(images, cases.Viewed())
    assert (images.hparams["in_channels"], images.hparams["image_size"]) == (1, cases.SIZE)
    # BatchNorm only for those who ask for it.
    assert images.hparams["encoder_options"] == {"width": 4, "norm": "group"}
    asked = ContrastivePretraining("resnet8", in_channels=1, encoder_options={"norm": "batch"})
    for model, norm in ((images, False), (asked, True)):
        assert any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) is norm


@pytest.mark.parametrize("method", [{}, {**MOCO, "learn_temperature": True}, {"micro_batch": 8, "mask_same": True}])
def test_half_precision_trains(method: Any, tmp_path: Any) -> None:
    model = small(**method, optimizer=partial(torch.optim.Adam, lr=0.003))
    run = cases.trainer(tmp_path, max_epochs=8, precision="bf16-mixed")
    data = cases.Viewed(cases.Views(labels=16))
    (before,) = run.validate(model, data, verbose=False)
    run.fit(model, data)
    (after,) = run.validate(model, data, verbose=False)
    assert after["val/loss"] < before["val/loss"] or "queue_size" in method
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert all(torch.tensor(value).isfinite() for value in after.values())


def test_a_module_of_ones_own(tmp_path: Any) -> None:
    network = TextEncoder(30, width=16, depth=0)
    model = ContrastivePretraining(network, projector=())
    run = cases.trainer(tmp_path)
    run.fit(model, cases.Viewed(cases.Views("text")))
    run.save_checkpoint(tmp_path / "own.ckpt")
    again = ContrastivePretraining.load_from_checkpoint(
        tmp_path / "own.ckpt", encoder=TextEncoder(30, width=16, depth=0), weights_only=True
    )
    assert torch.equal(again.eval().project(cases.SENTENCES), F.normalize(network.eval()(cases.SENTENCES), dim=1))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(cases.SIZE**2, 5))
    with pytest.raises(ConfigError, match="Sequential does not say how many features it has; give the number as num"):
        ContrastivePretraining(flat)
    assert ContrastivePretraining(flat, num_features=5).embed(torch.zeros(2, 1, 16, 16)).shape == (2, 5)
    with pytest.raises(ConfigError, match=r"Sequential gave \(2, 5\); expected features \(B, 4\)"):
        ContrastivePretraining(flat, num_features=4).embed(torch.zeros(2, 1, 16, 16))


def test_a_learned_temperature_moves_without_decay_and_has_a_floor(tmp_path: Any) -> None:
    model = small(learn_temperature=True, temperature=0.011, optimizer=partial(torch.optim.SGD, lr=0.5))
    cases.trainer(tmp_path, max_epochs=3).fit(model, cases.Viewed())
    learned = model.temperature().item()
    assert learned >= 0.01 - 1e-7
    assert learned != pytest.approx(0.011, abs=1e-6)
    decayed = small(learn_temperature=True, optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.3))
    groups = decayed.configure_optimizers().param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(decayed.parameters()))


def test_a_collapse_is_told_once(tmp_path: Any) -> None:
    class Collapsed(ContrastivePretraining):
        def contrast(self, first: Tensor, second: Tensor, *_: Any, **__: Any) -> Tensor:
            # All to one direction.
            return -F.normalize(torch.cat([first, second]), dim=1)[:, 0].mean()

    torch.manual_seed(0)
    model = Collapsed(TextEncoder(30, width=8, depth=0), projector=(), optimizer=partial(torch.optim.Adam, lr=0.1))
    data = cases.Viewed(cases.Views("text"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cases.trainer(tmp_path, max_epochs=30).fit(model, data)
    told = [str(one.message) for one in found if issubclass(one.category, CollapseWarning)]
    assert len(told) == 1
    assert "the embeddings have collapsed: spread 0.0" in told[0]
    healthy = small("bag")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        cases.trainer(tmp_path, max_epochs=30).fit(healthy, data)


def test_a_rate_that_is_far_too_high_collapses(tmp_path: Any) -> None:
    model = small(optimizer=partial(torch.optim.SGD, lr=100.0))
    with pytest.warns(CollapseWarning, match="the embeddings have collapsed"):
        cases.trainer(tmp_path, max_epochs=26, limit_val_batches=0).fit(model, cases.Viewed())


@pytest.mark.parametrize(
    ("shape", "collapsed"), [("point", True), ("line", True), ("cone", False), ("sphere", False), ("few", False)]
)
def test_what_a_collapse_is(shape: str, collapsed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 16, generator=generator)
    axis = torch.nn.functional.one_hot(torch.tensor(0), 16).float()
    rows = {
        "point": axis + 1e-4 * noise,
        "line": axis * noise.sign()[:, :1] + 0.001 * noise,
        "cone": axis + 0.005 * noise,
        "sphere": noise,
        "few": axis.expand(3, 16),
    }[shape]
    watch = CollapseWatch()
    watch.update(rows, rows)
    watch.check(49)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        watch.check(50)
        watch.check(51)
    assert len(found) == collapsed


def test_strategies_that_share_parameters_out_are_refused(tmp_path: Any) -> None:
    run = cases.trainer(tmp_path)
    run.strategy.__class__ = type("Parts", (FSDPStrategy,), {})
    model = small()
    model._trainer = run
    with pytest.raises(ConfigError, match=r"not made for Parts: .*; expected strategy='ddp'"):
        model.setup("fit")


def test_from_the_command_line() -> None:
    from ds_lightning.training import build, resolve

    moco = {"model": "ContrastivePretraining", "model.momentum_encoder": 0.99, "model.queue_size": 64}
    built = build(resolve([], {**moco, "model.in_channels": 1, "model.projector": [32, 16]})).model
    assert isinstance(built, ContrastivePretraining)
    assert built.queue.keys.shape == (64, 16)
    pairs = {"class_path": "ContrastivePretraining", "init_args": {"encoder": {"image": "resnet8", "text": "bag"}}}
    pairs["init_args"] |= {"in_channels": 1, "encoder_options": {"text": {"vocab_size": 30}}}
    assert list(build(resolve([], {"model": pairs})).model.towers) == ["image", "text"]


def test_the_code_of_the_page_for_ones_own_runs(tmp_path: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "contrastive.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class Views" in block)

    def augment(image: Tensor) -> Tensor:
        return image + 0.1 * torch.randn_like(image)

    names: dict[str, Any] = {"images": torch.randn(256, 3, 32, 32), "augment": augment, "DataLoader": DataLoader}
    names |= {"torch": torch, "ContrastivePretraining": ContrastivePretraining, "ExactResume": ExactResume}
    # Less of the same, for its time.
    names["L"] = SimpleNamespace(Trainer=lambda **options: cases.trainer(tmp_path, **{**options, "max_epochs": 1}))
    exec(code, names)
    trainer, model = names["trainer"], names["model"]
    assert trainer.global_step == 2
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = ContrastivePretraining.load_from_checkpoint(tmp_path / "own.ckpt", encoder=names["Mine"]())
    assert torch.equal(again.embed(names["images"]), model.embed(names["images"]))


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
def test_resumed_in_the_middle_of_an_epoch_it_ends_bit_equal(tmp_path: Any) -> None:
    """With accumulated gradients, half precision, dropout, running statistics, queue and slow encoder."""

    def fit(folder: str, seed: int, start: Any = None) -> ContrastivePretraining:
        torch.manual_seed(seed)
        layers = (
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        moco = {**MOCO, "learn_temperature": True, "lr_scheduler": "cosine"}
        model = ContrastivePretraining(nn.Sequential(*layers), num_features=8, projector=(8, 6), **moco)
        each = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        mixed = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "enable_checkpointing": True}
        run = cases.trainer(tmp_path, max_epochs=3, callbacks=[each, ExactResume()], **mixed)
        run.fit(model, Shuffled(batch_size=4), ckpt_path=start, weights_only=True if start else None)
        return model

    whole = fit("whole", 0).state_dict()
    for step in (3, 6):
        resumed = fit(f"from{step}", 9, tmp_path / "whole" / f"step={step}.ckpt").state_dict()
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


class Shuffled(cases.Viewed):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"temperature": 0.001, "learn_temperature": True}, "temperature is 0.001; expected at least 0.01"),
        ({"loss": "ntxent"}, "loss is 'ntxent'; expected nt_xent, info_nce or nothing"),
        ({"loss": "nt_xent", "momentum_encoder": 0.9}, "loss is 'nt_xent'; expected info_nce"),
        ({"projector": (8, 0)}, r"projector is \[8, 0\]; expected widths of at least 1"),
        ({"momentum_encoder": 1.0}, r"momentum_encoder is 1.0; expected a share in \[0, 1\)"),
        ({"queue_size": 10}, "queue_size is 10; it needs momentum_encoder"),
        ({"queue_size": -1}, "queue_size is -1; expected at least 0"),
        ({"hardness": -1.0}, "hardness is -1.0; expected at least 0"),
        ({"micro_batch": 0}, "micro_batch is 0; expected at least 1"),
        ({"encoder": {"image": "resnet8"}}, r"encoder has the keys \['image'\]; expected two of image, text"),
        ({"encoder": {"image": "resnet8", "text": "bag"}, "momentum_encoder": 0.9}, "momentum_encoder is for views"),
        ({"encoder": {"image": "resnet8", "text": "bag"}, "projector": ()}, "projector is empty; two encoders need"),
        (
            {"encoder": {"image": "resnet8", "text": "bag"}, "encoder_options": {"width": 4}},
            "encoder_options has 'width'; expected options by modality",
        ),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ContrastivePretraining(**options)


@pytest.mark.parametrize(
    ("batch", "options", "text"),
    [
        ({"image": torch.zeros(2, 1, 16, 16)}, {}, r"keys \['image'\]; expected `first` and `second`: use Contrastive"),
        ((torch.zeros(2), torch.zeros(2)), {}, "keys of a tuple; expected `first` and `second`"),
        (
            {"first": {"image": torch.zeros(2, 1, 16, 16)}, "second": {"image": torch.zeros(3, 1, 16, 16)}},
            {},
            "the batch has 2 of `first` and 3 of `second`",
        ),
        (cases.batch(), {"mask_same": True}, "mask_same needs `group` or `label` among them"),
    ],
)
def test_a_wrong_batch_is_refused(batch: Any, options: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=text):
        loss_of(quiet(small(**options), monkeypatch), batch)


def test_pairs_need_both_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quiet(
        ContrastivePretraining(
            {"image": "resnet8", "text": "bag"}, in_channels=1, encoder_options={"text": {"vocab_size": 30}}
        ),
        monkeypatch,
    )
    with pytest.raises(ConfigError, match=r"keys \['first', 'index', 'second'\]; expected `image` and `text`"):
        loss_of(model, cases.batch())
