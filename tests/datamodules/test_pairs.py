import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules import Pairs
from ds_lightning.errors import ConfigError, DataError


def columns(count=40, labels=False):
    """Each pixel and each word says which pair it is."""
    image = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    found = {"image": image, "text": [[n + 1] * (1 + n % 3) for n in range(count)]}
    return found | {"label": torch.arange(count) % 2} if labels else found


def ready(data):
    data.setup()
    return data


def rows(data):
    """Every batch of every split."""
    loaders = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}
    return {split: list(loaders[split]()) for split in data._parts}


@settings(deadline=None, max_examples=25)
@given(
    groups=st.lists(st.integers(0, 15), min_size=12, max_size=40).filter(lambda groups: len(set(groups)) >= 5),
    seed=st.integers(0, 100),
)
def test_no_group_is_in_two_splits_and_no_pair_is_lost(groups, seed):
    options = {"splits": (0.6, 0.2, 0.2), "batch_size": 4, "seed": seed, "drop_last": False}
    data = ready(Pairs(columns(len(groups)), groups=groups, **options))
    found = {split: [n for b in batches for n in b["index"].tolist()] for split, batches in rows(data).items()}
    assert set(found) == {"train", "val", "test"}
    assert sorted(n for numbers in found.values() for n in numbers) == list(range(len(groups)))
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not {groups[n] for n in found[one]} & {groups[n] for n in found[other]}
    assert found == {
        split: [n for b in batches for n in b["index"].tolist()]
        for split, batches in rows(ready(Pairs(columns(len(groups)), groups=groups, **options))).items()
    }


def test_the_batch():
    data = ready(Pairs(columns(labels=True), groups=[n // 2 for n in range(40)], batch_size=8, mean=(0.2,), std=(0.4,)))
    assert data.modalities == ("image", "text")
    for batch in data.train_dataloader():
        assert set(batch) == {"image", "text", "label", "index", "group"}
        assert batch["image"].dtype == torch.uint8
        assert batch["group"].dtype == torch.int64
        done = data.on_after_batch_transfer(batch, 0)
        for at, n in enumerate(batch["index"].tolist()):
            torch.testing.assert_close(done["image"][at], torch.full((3, 4, 4), (n / 255 - 0.2) / 0.4))
            text = [n + 1] * (1 + n % 3)
            assert batch["text"][at].tolist() == text + [0] * (batch["text"].shape[1] - len(text))
            assert int(batch["label"][at]) == n % 2
            assert int(batch["group"][at]) == n // 2
    assert data.dataset_info()["splits"] == {"train": 32, "val": 4, "test": 4}


def test_a_map_style_data_set_with_a_key_that_names_the_group():
    class Made(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, n):
            return {"series": torch.full((2, 5), float(n)), "table": torch.tensor([n, 1.0]), "maker": f"m{n % 10}"}

    data = ready(Pairs(Made(), groups="maker", batch_size=3))
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"series", "table", "index", "group"}
    assert torch.equal(batch["series"][:, 0, 0], batch["table"][:, 0])
    same = batch["index"][:, None] % 10 == batch["index"] % 10
    assert torch.equal(batch["group"][:, None] == batch["group"], same)
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["series"], batch["series"])


def test_floats_stay_and_groups_may_be_left_out():
    data = ready(
        Pairs({"image": torch.rand(20, 1, 2, 2) * 9, "audio": torch.rand(20, 7)}, batch_size=2, splits=(1, 0, 0))
    )
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "audio", "index"}
    assert data.on_after_batch_transfer(batch, 0) is batch
    assert data.val_dataloader() == []
    with pytest.raises(DataError, match="there are no pairs for test; give it a share in splits"):
        data.test_dataloader()


def test_each_epoch_has_another_order_that_follows_from_the_seed():
    def epochs(**options):
        loader = ready(Pairs(columns(), batch_size=8, **options)).train_dataloader()
        return [[n for batch in loader for n in batch["index"].tolist()] for _ in range(2)]

    first, second = epochs()
    assert first != second
    assert [first, second] == epochs()
    assert first != epochs(seed=1)[0]


def test_hyperparameters_are_primitives():
    data = Pairs(columns(), groups=[0] * 40)
    assert set(data.hparams) == set(inspect.signature(Pairs.__init__).parameters) - {"self", "data", "groups"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 1}, "batch_size is 1; expected an integer >= 2"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"splits": (0.5, 0.1, 0.1)}, r"splits is \[0.5, 0.1, 0.1\]; expected three shares >= 0 with sum 1"),
        ({"splits": (0.0, 0.5, 0.5)}, "splits is"),
        ({"std": (0.0,)}, r"mean is \[0.5\] and std \[0.0\]; expected as many numbers, std > 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Pairs(columns(), **arguments)


@pytest.mark.parametrize(
    ("data", "options", "text"),
    [
        ({"image": torch.zeros(3, 1, 2, 2), "text": [[1]]}, {}, "the columns have the lengths {'image': 3, 'text': 1}"),
        ({"image": torch.zeros(3, 1, 2, 2)}, {}, r"a sample has the keys \['image'\]; expected two of image, text"),
        (columns(), {"groups": [1, 2]}, "groups has 2 values; expected one for each of 40 samples"),
        (columns(), {"groups": [1] * 40}, "val gets none of 1 groups; give it a greater share in splits, or 0"),
        (columns(20), {}, "a process has 16 training pairs, too few for one batch of batch_size 64"),
        (columns() | {"text": [[]] * 40}, {"batch_size": 4}, "a text is no list of token ids"),
        (
            {"audio": [torch.zeros(1 + n) for n in range(40)], "text": [[1]] * 40},
            {"batch_size": 4},
            r"audio has the shapes \[.*\] in a batch; expected one shape",
        ),
    ],
)
def test_data_that_can_not_be_used_is_named(data, options, text):
    with pytest.raises(DataError, match=text):
        list(ready(Pairs(data, **options)).train_dataloader())


def test_nothing_before_setup():
    with pytest.raises(DataError, match="Pairs has no data yet; call setup"):
        Pairs(columns()).train_dataloader()
