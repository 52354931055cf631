import math
import statistics
from typing import Any

import few_shot_cases as cases
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ds_lightning.errors import ConfigError
from ds_lightning.modules import MAML, FewShotModule, PrototypicalNetwork, TransferLearning
from ds_lightning.modules.few_shot import one_two_five

TINY = {"network_options": {"width": 4}}
METHODS = {
    "maml": lambda: MAML("conv4", inner_steps=2, **TINY),
    "prototypes": lambda: PrototypicalNetwork("conv4", **TINY),
    "head": lambda: TransferLearning("conv4", steps=2, **TINY),
    "all": lambda: TransferLearning("conv4", steps=2, finetune="all", **TINY),
}


class Fixed(FewShotModule):
    """Outputs that the batch brings, after 0 and 1 steps."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def episode_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        outputs = self.predictions(batch)[-1]
        return outputs.sum() * 0 + self.network.weight.sum() * 0, outputs

    def predictions(self, batch: Any) -> Tensor:
        assert torch.is_grad_enabled() or not self.trainer.evaluating
        assert not torch.is_inference_mode_enabled()
        last = batch["query"]["table"]
        assert not last.is_inference()
        return torch.stack([last.flip(-1), last])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_argument_changes_the_method(method: str, precision: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, data = METHODS[method](), cases.Patterned()
    best = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max")
    trainer = cases.trainer(tmp_path, precision=precision, callbacks=[best], inference_mode=True)
    trainer.fit(model, data)
    assert best.best_model_score == trainer.callback_metrics["val/accuracy"]
    assert {"train/loss", "train/accuracy"} <= set(trainer.callback_metrics)
    (tested,) = trainer.test(model, data, verbose=False)
    assert {"test/loss", "test/accuracy", "test/accuracy_interval", "test/episodes"} <= set(tested)
    assert tested["test/episodes"] == 4
    assert all(math.isfinite(value) for value in tested.values())
    predicted = torch.cat(trainer.predict(model, data))
    assert predicted.shape == (4, 9, 3)
    assert torch.allclose(predicted.sum(-1), torch.ones(4, 9), atol=1e-3)
    label = cases.batch(first=500)["query"]["label"]
    right = (predicted.argmax(-1) == label).float().mean(1)
    assert tested["test/accuracy"] == pytest.approx(right.mean().item(), abs=1e-6)


def episodes(tasks: int, **query: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(tasks):
        part = {"table": torch.randn(6, 3, generator=generator), **{key: make() for key, make in query.items()}}
        data.append({"support": part, "query": part})
    return data


def test_the_figures_are_those_over_single_episodes(tmp_path: Any) -> None:
    data = episodes(7, label=lambda: torch.randint(0, 3, (6,)))
    (found,) = cases.trainer(tmp_path).validate(Fixed(), DataLoader(data, batch_size=3), verbose=False)
    right, losses, before = [], [], []
    for task in data:
        logits, label = task["query"]["table"], task["query"]["label"]
        right.append((logits.argmax(1) == label).float().mean().item())
        before.append((logits.flip(1).argmax(1) == label).float().mean().item())
        losses.append(F.cross_entropy(logits, label).item())
    assert found["val/accuracy"] == pytest.approx(statistics.fmean(right), abs=1e-6)
    assert found["val/accuracy_interval"] == pytest.approx(1.96 * statistics.stdev(right) / math.sqrt(7), abs=1e-6)
    assert found["val/accuracy_after_0"] == pytest.approx(statistics.fmean(before), abs=1e-6)
    assert found["val/accuracy_after_1"] == found["val/accuracy"]
    assert found["val/loss"] == pytest.approx(statistics.fmean(losses), abs=1e-6)
    assert found["val/episodes"] == 7


def test_regression_has_the_squared_error(tmp_path: Any) -> None:
    data = episodes(5, target=lambda: torch.randn(6, 3))
    (found,) = cases.trainer(tmp_path).test(Fixed(), DataLoader(data, batch_size=2), verbose=False)
    errors = [((task["query"]["table"] - task["query"]["target"]) ** 2).mean().item() for task in data]
    assert found["test/mse"] == found["test/loss"] == pytest.approx(statistics.fmean(errors), abs=1e-6)
    assert found["test/mse_interval"] == pytest.approx(1.96 * statistics.stdev(errors) / math.sqrt(5), abs=1e-6)
    assert "test/accuracy" not in found


def test_a_target_that_would_be_broadcast_is_refused(tmp_path: Any) -> None:
    data = episodes(2, target=lambda: torch.randn(6, 1))
    with pytest.raises(ConfigError, match=r"outputs have the shape \(2, 6, 3\), the target \(2, 6, 1\)"):
        cases.trainer(tmp_path).test(Fixed(), DataLoader(data, batch_size=2), verbose=False)


def test_two_validations_do_not_add_up(tmp_path: Any) -> None:
    data = DataLoader(episodes(4, label=lambda: torch.zeros(6, dtype=torch.int64)), batch_size=2)
    model, trainer = Fixed(), cases.trainer(tmp_path, max_epochs=2)
    trainer.fit(model, data, data)
    assert trainer.callback_metrics["val/episodes"] == 4


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"image": torch.zeros(1), "label": torch.zeros(1)}, r"keys \['image', 'label'\]; expected `support`"),
        ((torch.zeros(1), torch.zeros(1)), "a tuple; expected `support`"),
        ({"support": {"image": 0}, "query": {"label": 0}}, r"support has the keys \['image'\]; expected `label`"),
    ],
)
def test_other_batches_are_refused(batch: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Fixed().training_step(batch, 0)


def test_more_ways_than_outputs_are_told(tmp_path: Any) -> None:
    model, data = METHODS["maml"](), cases.Patterned(test_ways=5)
    with pytest.raises(ConfigError, match="the tasks have 5 ways, the network was built for 3"):
        cases.trainer(tmp_path, num_sanity_val_steps=0).fit(model, data)


def test_without_ways_the_message_says_who_can_give_them(tmp_path: Any) -> None:
    loader = cases.Patterned().train_dataloader()
    with pytest.raises(ConfigError, match="ways is neither given nor known from the DataModule"):
        cases.trainer(tmp_path).fit(METHODS["maml"](), loader)
    with pytest.raises(ConfigError, match="in_channels is neither given nor known"):
        cases.trainer(tmp_path).fit(METHODS["prototypes"](), loader)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ways": 1}, "ways is 1; expected at least 2"),
        ({"image_size": 0}, "image_size is 0"),
        ({"in_channels": -1}, "in_channels is -1"),
        ({"lr_scheduler": "linear"}, "lr_scheduler is 'linear'; expected 'cosine'"),
        ({"ways": 2, "in_channels": 1, "image_size": 8}, "expected at least 16"),
        ({"ways": 2, "in_channels": 1, "image_size": 28, "network_options": {"norm": "x"}}, "network_options"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FewShotModule("conv4", **options)


def test_what_the_data_told_is_in_the_checkpoint(tmp_path: Any) -> None:
    trainer, model = cases.trainer(tmp_path), METHODS["maml"]()
    trainer.fit(model, cases.Patterned())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = MAML.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert (loaded.ways, loaded.in_channels, loaded.image_size) == (3, 1, cases.SIZE)
    x = cases.TEMPLATES
    assert torch.equal(loaded(x), model(x))


def test_the_series_of_steps() -> None:
    assert one_two_five(0) == (0,)
    assert one_two_five(1) == (0, 1)
    assert one_two_five(7) == (0, 1, 2, 5, 7)
    assert one_two_five(100) == (0, 1, 2, 5, 10, 20, 50, 100)


@pytest.mark.parametrize("method", METHODS)
def test_a_logger_gets_the_ways_of_model_and_data(tmp_path: Any, method: str) -> None:
    # Lightning refuses to log a number that the model and the data say differently, as None and 3.
    cases.trainer(tmp_path, logger=CSVLogger(tmp_path)).fit(METHODS[method](), cases.Patterned())
    logged = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert logged["ways"] == 3
