import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from squares import Squares, ready
from view_cases import same

from ds_lightning.callbacks import ExactResume
from ds_lightning.datamodules import ContrastiveViews


class Twin(L.LightningModule):
    """Keeps what it saw, and a weight that depends on both views and on dropout."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(36, 3)
        self.seen = {"train": [], "val": []}

    def training_step(self, batch, index):
        self.seen["train"].append(batch)
        first, second = (self.layer(batch[view]["image"].flatten(1)) for view in ("first", "second"))
        return torch.dropout(first - second, 0.2, True).square().mean()

    def validation_step(self, batch, index):
        self.seen["val"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def model():
    torch.manual_seed(0)
    return Twin()


def trainer(folder, **arguments):
    arguments.setdefault("enable_checkpointing", bool(arguments.get("callbacks")))
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_validation_has_the_same_views_in_each_epoch_and_training_has_others(tmp_path):
    twin = model()
    trainer(tmp_path, max_epochs=2).fit(twin, ContrastiveViews(Squares(), batch_size=18, drop_last=False))
    sanity, first, second = twin.seen["val"]
    assert same(sanity, first)
    assert same(first, second)
    seen = [
        {
            int(n): image
            for batch in twin.seen["train"][k : k + 3]
            for n, image in zip(batch["index"], batch["first"]["image"], strict=True)
        }
        for k in (0, 3)
    ]
    assert seen[0].keys() == seen[1].keys() == set(range(54))
    assert list(seen[0]) != list(seen[1])
    # The images are even, so one that keeps its brightness twice looks the same.
    assert sum(torch.equal(seen[0][n], seen[1][n]) for n in seen[0]) < 10


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    def fitted(*callbacks, seed=0, resume=None):
        twin = model()
        run = trainer(tmp_path, max_epochs=3, callbacks=[ExactResume(), *callbacks])
        torch.manual_seed(seed)
        data = ContrastiveViews(Squares(), batch_size=18, blur=0.5, color=1.0, seed=5)
        run.fit(twin, data, ckpt_path=resume, weights_only=True)
        return twin

    whole = fitted(ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    assert len(whole.seen["train"]) == 9
    for step in (3, 4):
        path = tmp_path / f"step={step}.ckpt"
        assert torch.load(path, weights_only=True)["ContrastiveViews"] == {"data": {}}
        resumed = fitted(seed=77, resume=path)
        for expected, got in zip(whole.seen["train"][step:], resumed.seen["train"], strict=True):
            assert same(expected, got)
        assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_half_precision_is_made_after_the_views(tmp_path):
    full, half = model(), model()
    trainer(tmp_path, max_epochs=1).fit(full, ContrastiveViews(Squares(), batch_size=18))
    trainer(tmp_path, max_epochs=1, precision="bf16-true").fit(half, ContrastiveViews(Squares(), batch_size=18))
    for expected, got in zip(full.seen["train"], half.seen["train"], strict=True):
        assert got["second"]["image"].dtype == torch.bfloat16
        assert torch.equal(got["second"]["image"], expected["second"]["image"].bfloat16())


def test_ranks_share_the_samples_and_have_other_views(tmp_path, monkeypatch):
    found = []
    for rank in (0, 1):
        data = ready(ContrastiveViews(Squares(), batch_size=27))
        data.trainer = trainer(tmp_path, max_epochs=1)
        monkeypatch.setattr(type(data.trainer), "distributed_sampler_kwargs", {"num_replicas": 2, "rank": rank})
        found.append(next(iter(data.train_dataloader())))
    assert sorted(torch.cat([batch["index"] for batch in found]).tolist()) == list(range(54))
    assert found[0]["seed"] != found[1]["seed"]
