import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from multimodal_cases import SCHEMA, SumsOfInputs, trainer, write_rows

from ds_lightning.callbacks import ExactResume
from ds_lightning.datamodules import MultimodalManifest


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "a")


def parts(manifest, **options):
    torch.manual_seed(0)
    data = MultimodalManifest(str(manifest), **{"schema": SCHEMA, "batch_size": 5, "val_fraction": 0.25, **options})
    return SumsOfInputs(), data


def test_training_batches_are_mixed_and_others_are_not(manifest):
    model, data = parts(manifest, mix="mixup", test_path=str(manifest), mix_alpha=1.0)
    fit = trainer(max_epochs=1)
    fit.fit(model, data)
    train = [batch for batch in model.seen if "mix" in batch]
    assert len(train) == 4
    assert len(model.seen) == 6
    assert all("partner" not in batch for batch in model.seen)
    assert ((train[0]["mix"] > 0) & (train[0]["mix"] < 1)).any()
    assert all(batch["image"].dtype == torch.float32 for batch in model.seen)
    model.seen.clear()
    fit.test(model, data, verbose=False)
    assert len(model.seen) == 5
    assert all("mix" not in batch for batch in model.seen)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [4, 6])
def test_a_fit_that_is_killed_goes_on_as_one_that_was_not(manifest, tmp_path, steps, workers):
    options = {"mix": "mixup", "num_workers": workers, "seed": 1}
    model, data = parts(manifest, **options)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)
    fit = trainer(max_epochs=3, callbacks=[ExactResume(seed=0), saved], enable_checkpointing=True)
    fit.fit(model, data)

    loaded = torch.load(tmp_path / f"step={steps}.ckpt", weights_only=True)
    assert loaded["MultimodalManifest"]["vocabulary"] == ["one", "two", "three", "four"]

    again, data = parts(manifest, **options)
    torch.manual_seed(9)
    fit = trainer(max_epochs=3, callbacks=[ExactResume(seed=0)])
    fit.fit(again, data, ckpt_path=tmp_path / f"step={steps}.ckpt", weights_only=True)
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_test_from_a_checkpoint_reads_as_the_training_did(manifest, tmp_path):
    model, data = parts(manifest)
    fit = trainer(max_epochs=1)
    fit.fit(model, data)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    # Other rows have other words, other means, and no missing number.
    other = tmp_path / "b"
    other.mkdir()
    (other / "b.csv").write_text("photo,words,clip,age,income,y\n,two five,,100,3,bird\n,five,,7,1,cat\n" * 1)
    fresh, data = parts(other / "b.csv", val_path=str(other / "b.csv"), test_path=str(manifest))
    trainer().test(fresh, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    expected, data = parts(manifest, test_path=str(manifest))
    trainer().test(expected, data, verbose=False)
    assert len(fresh.seen) == len(expected.seen) == 5
    for one, two in zip(fresh.seen, expected.seen, strict=True):
        for name in two:
            torch.testing.assert_close(one[name], two[name])


def test_batches_to_overfit_are_of_full_size(manifest):
    model, data = parts(manifest)
    trainer(max_epochs=2, overfit_batches=2).fit(model, data)
    assert [len(batch["label"]) for batch in model.seen] == [5, 5, 5, 1] * 2
    # Both epochs have the same samples.
    torch.testing.assert_close(model.seen[0]["table"], model.seen[4]["table"])
