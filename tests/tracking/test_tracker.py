import copy
import json
import pickle

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from stub_server import StubServer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tracking_helpers import rows_of

from ds_lightning.errors import ConfigError
from ds_lightning.tracking import MLflowTracker
from ds_lightning.tracking.store import connect, experiment_id

PNG = b"\x89PNG\r\n\x1a\n"


class Plain(LightningModule):
    """Knows nothing of us."""

    def __init__(self, lr=0.1, net=None):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self.layer(x), y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"train/a": loss * 2, "train/index": float(index), "train/nan": float("nan")})
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self.layer(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class RandomData(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.randn(4), index % 2


def loader(size=32):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 4, generator=generator), torch.arange(size) % 2
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(logger, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(logger=logger, **{"max_epochs": 2, "log_every_n_steps": 1, **quiet, **kwargs})


def tracker(root, **kwargs):
    return MLflowTracker("x", store=root, **{"system_metrics": False, **kwargs})


def test_same_rows_as_lightnings_logger_and_everything_else_of_a_plain_module(store, root):
    experiment_id(store, "x")
    seed_everything(1)
    reference = MLFlowLogger("x", tracking_uri=store.uri)
    trainer(reference, enable_checkpointing=False).fit(Plain(), loader(), loader())

    seed_everything(1)
    ours = tracker(root, run_name="mine", tags={"team": "a"}, parent_run_id=reference.run_id, system_metrics=True)
    best = ModelCheckpoint(monitor="val/loss")
    trainer(ours, callbacks=[best]).fit(Plain(0.1, {"width": 8, "act": {"name": "relu"}}), loader(), loader())

    rows = [row for row in rows_of(store, ours.run_id) if not row[0].startswith("system/")]
    assert rows == rows_of(store, reference.run_id)
    # 16 steps of 4 metrics (and the epoch), 2 epochs of 2 metrics (and the epoch).
    assert len(rows) == 16 * 4 + 2 * 2 + len([row for row in rows if row[0] == "epoch"])

    client = ours.experiment
    run = client.get_run(ours.run_id)
    assert (run.info.status, run.info.run_name, ours.name, ours.version) == (
        "FINISHED",
        "mine",
        run.info.experiment_id,
        run.info.run_id,
    )
    params = {"lr": "0.1", "net.width": "8", "net.act.name": "relu", "model.parameters": "58", "model.trainable": "58"}
    assert run.data.params == params
    tags = run.data.tags
    assert (tags["team"], tags["mlflow.parentRunId"]) == ("a", reference.run_id)
    assert (tags["checkpoint.best"], tags["checkpoint.monitor"]) == (best.best_model_path, "val/loss")
    assert float(tags["checkpoint.score"]) == pytest.approx(best.best_model_score.item(), rel=1e-6)

    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "TensorDataset"
    assert json.loads(dataset.dataset.profile)["splits"] == {"train": 32}
    assert dataset.tags[0].value == "training"

    artifacts = {
        info.path
        for folder in ("", "pictures", "checkpoints")
        for info in client.list_artifacts(run.info.run_id, folder)
    }
    name = best.best_model_path.rpartition("/")[2]
    assert artifacts == {
        "checkpoints",
        f"checkpoints/{name}",
        "environment.json",
        "model_summary.txt",
        "pictures",
        "pictures/learning_curves.png",
    }
    folder = root / "artifacts" / run.info.run_id / "artifacts"
    assert (folder / "pictures/learning_curves.png").read_bytes().startswith(PNG)
    assert "Dropout" in (folder / "model_summary.txt").read_text()
    # Checkpoints go below the store, and nothing into the working folder.
    expected = root / "checkpoints" / run.info.experiment_id / run.info.run_id / "checkpoints" / name
    assert str(expected) == best.best_model_path
    assert [path.name for path in root.parent.iterdir()] == ["store"]
    # Even a short run has a sample of the machine.
    assert "system/cpu_utilization_percentage" in run.data.metrics


def test_training_is_the_same_as_without_a_logger(root):
    def final(logger):
        seed_everything(3)
        model = Plain()
        trainer(logger, enable_checkpointing=False).fit(model, DataLoader(RandomData(), 4, shuffle=True), loader())
        return [parameter.clone() for parameter in model.parameters()]

    without = final(False)
    with_tracker = final(tracker(root))
    assert all(torch.equal(a, b) for a, b in zip(without, with_tracker, strict=True))


def test_a_second_fit_reopens_the_run_and_a_changed_parameter_is_a_tag(store, root):
    class Status(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.logger._run.outbox.flush(None, 10)
            self.seen = trainer.logger.experiment.get_run(trainer.logger.run_id).info.status

    ours, status = tracker(root), Status()
    for lr in (0.1, 0.2):
        trainer(ours, max_epochs=1, callbacks=[status], enable_checkpointing=False).fit(Plain(lr), loader())
        run = ours.experiment.get_run(ours.run_id)
        assert (status.seen, run.info.status) == ("RUNNING", "FINISHED")
    assert run.data.params["lr"] == "0.1"
    assert run.data.tags["changed.lr"] == "0.2"
    assert len([row for row in rows_of(store, ours.run_id) if row[0] == "train/a"]) == 16

    # A tracker of another process, given the run's id.
    again = tracker(root, run_id=ours.run_id)
    again.log_hyperparams({"lr": 0.3, "long": "x" * 6000, "width": 4})
    # Reading a run does not open it again; training does.
    assert again.experiment.get_run(ours.run_id).info.status == "FINISHED"
    again.log_graph(Plain())
    assert again._run.outbox.flush(None, 10)
    assert again.experiment.get_run(ours.run_id).info.status == "RUNNING"
    again.finalize("success")
    found = again.experiment.get_run(ours.run_id)
    assert (found.data.params["lr"], found.data.params["width"], len(found.data.params["long"])) == ("0.1", "4", 6000)
    assert found.data.tags["changed.lr"] == "0.3"
    assert found.info.status == "FINISHED"


def test_many_parameters_and_the_configuration(root):
    ours = tracker(root)
    config = {"model": {"class_path": "m.Net", "init_args": {"lr": 0.1, "drop": None, "kind": Plain}}, "seed": 1}
    ours.log_config(config)
    ours.log_hyperparams({f"p{i}": i for i in range(250)})
    ours.finalize()
    run = ours.experiment.get_run(ours.run_id)
    dotted = {"model.class_path": "m.Net", "model.init_args.lr": "0.1", "seed": "1"}
    assert run.data.params == {**dotted, **{f"p{i}": str(i) for i in range(250)}}
    text = (root / "artifacts" / ours.run_id / "artifacts" / "config.yaml").read_text()
    assert "drop: null" in text
    assert f"kind: {__name__}.Plain" in text


def test_status_of_a_failed_run_and_its_correction(root):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("broken")

    ours = tracker(root)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(ours, callbacks=[Fails()]).fit(Plain(), loader())
    client = ours.experiment
    failed = client.get_run(ours.run_id).info
    assert failed.status == "FAILED"
    ours.close("KILLED", {"optuna.state": "PRUNED"})
    run = client.get_run(ours.run_id)
    assert (run.info.status, run.data.tags["optuna.state"]) == ("KILLED", "PRUNED")
    assert run.info.end_time == failed.end_time
    with pytest.raises(ConfigError, match="status is 'PRUNED'; expected FINISHED, FAILED or KILLED"):
        ours.close("PRUNED")


def test_closing_a_run_that_never_trained(root):
    ours = tracker(root)
    ours.log_metrics({"a": 1.0})
    ours.close("FAILED", {"why": "memory"})
    run = ours.experiment.get_run(ours.run_id)
    assert (run.info.status, run.data.tags["why"], run.data.metrics) == ("FAILED", "memory", {"a": 1.0})


def test_a_datamodule_can_describe_its_data(root):
    class Described(LightningDataModule):
        def train_dataloader(self):
            return loader()

        def dataset_info(self):
            splits = {"train": 24, "val": 8}
            return {"name": "digits", "source": "https://example.org/d.zip", "digest": "abc", "splits": splits}

    ours = tracker(root)
    trainer(ours, max_epochs=1, enable_checkpointing=False).fit(Plain(), datamodule=Described())
    (found,) = ours.experiment.get_run(ours.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest, found.dataset.source_type) == ("digits", "abc", "http")
    assert json.loads(found.dataset.source) == {"url": "https://example.org/d.zip"}
    assert json.loads(found.dataset.profile) == {"splits": {"train": 24, "val": 8}, "num_rows": 24}


def test_a_broken_description_is_a_warning(root):
    class Broken(LightningDataModule):
        def train_dataloader(self):
            return loader()

        def dataset_info(self):
            raise KeyError("no manifest")

    ours = tracker(root)
    with pytest.warns(RuntimeWarning, match="dataset not logged .*no manifest"):
        trainer(ours, max_epochs=1, enable_checkpointing=False).fit(Plain(), datamodule=Broken())
    assert ours.experiment.get_run(ours.run_id).info.status == "FINISHED"


def test_a_server_that_dies_does_not_end_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = StubServer(str(tmp_path / "artifacts"))

    class Dies(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == 5:
                server.die()

    ours = MLflowTracker("x", store=server.uri, flush_timeout=1.0, system_metrics=False)
    fit = trainer(ours, callbacks=[Dies()])
    with pytest.warns(RuntimeWarning, match=r"were not written to MLflow .*f{32}\.jsonl"):
        fit.fit(Plain(), loader(), loader())
    assert fit.global_step == 16
    lines = (tmp_path / "mlruns" / "spool" / f"{'f' * 32}.jsonl").read_text().splitlines()
    kept = {(row["key"], row["step"]) for row in map(json.loads, lines)}
    sent = {(row["key"], row["step"]) for row in server.rows}
    everything = {
        (key, step) for key in ("train/a", "train/index", "train/nan", "train/loss_step") for step in range(16)
    }
    assert everything <= kept | sent
    assert {("train/a", 15), ("val/loss", 15)} <= kept
    calls = (tmp_path / "mlruns" / "spool" / f"{'f' * 32}.calls.jsonl").read_text().splitlines()
    assert json.loads(calls[-1])["status"] == "FINISHED"


@pytest.mark.parametrize("given", [{}, {"run_id": "0" * 32}])
def test_an_unreachable_server_is_an_error_at_the_start(given):
    with pytest.raises(ConfigError, match=r"server 'http://127\.0\.0\.1:9' does not answer"):
        trainer(MLflowTracker(store="http://127.0.0.1:9", **given)).fit(Plain(), loader())


def test_an_unknown_run_is_an_error_at_the_start(root):
    with pytest.raises(ConfigError, match=f"run {'0' * 32} can't be opened"):
        _ = tracker(root, run_id="0" * 32).experiment


def test_nothing_is_made_before_first_use(tmp_path):
    ours = MLflowTracker(store=tmp_path / "store")
    assert ours.save_dir == str(tmp_path / "store" / "checkpoints")
    ours.finalize()
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="experiment is empty"):
        MLflowTracker("")
    with pytest.raises(ConfigError, match="flush_timeout is 0; expected seconds > 0"):
        MLflowTracker(flush_timeout=0)


def test_a_pickled_copy_makes_the_run_of_its_origin(store, root):
    ours = tracker(root)
    # What ddp_spawn does: the copy trains in another process.
    there = pickle.loads(pickle.dumps(ours))
    there.log_metrics({"a": 1.0}, 3)
    there.finalize()
    assert ours.run_id == there.run_id
    assert ours.experiment.get_run(ours.run_id).info.status == "FINISHED"
    assert len(connect(store).search_runs([ours.experiment_id])) == 1
    # A deep copy, as one makes for another run, is independent; pickled in the middle it goes on.
    other = copy.deepcopy(tracker(root))
    assert other.run_id != ours.run_id
    assert pickle.loads(pickle.dumps(other)).run_id == other.run_id


def test_other_ranks_do_nothing(root, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    ours = tracker(root)
    ours.log_metrics({"a": 1.0})
    ours.log_hyperparams({"a": 1})
    ours.log_graph(Plain())
    ours.finalize()
    assert ours.run_id is None
    assert not (root / "checkpoints").exists()


def test_pictures(root):
    ours = tracker(root)
    ours.log_confusion_matrix(torch.tensor([[3, 1], [0, 4]]), ["cat", "dog"], "val")
    ours.finalize()
    folder = root / "artifacts" / ours.run_id / "artifacts"
    assert (folder / "pictures" / "confusion_matrix_val.png").read_bytes().startswith(PNG)
    assert json.loads((folder / "confusion_matrix_val.json").read_text())["matrix"] == [[3, 1], [0, 4]]


def test_plain_python_as_json(root):
    ours = tracker(root)
    with pytest.raises(ValueError, match="not JSON compliant"):
        ours.log_json({"share": float("nan")}, "broken")
    ours.log_json({"rows": [[0.5, 0.5], [1.0, 0.0]], "names": ["a", "b"]}, "attention/matrix")
    ours.finalize()
    (found,) = (root / "artifacts" / ours.run_id / "artifacts").rglob("*.json")
    assert json.loads(found.read_text()) == {"rows": [[0.5, 0.5], [1.0, 0.0]], "names": ["a", "b"]}
    assert found.name == "matrix.json"
