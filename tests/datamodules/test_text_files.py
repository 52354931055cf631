import inspect

import lightning.pytorch as L
import pytest
import torch

from ds_lightning.datamodules import TextFiles
from ds_lightning.errors import ConfigError, DataError

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")


def texts_file(folder, count=60, name="train.tsv", extra=""):
    rows = [f"{WORDS[n % 5]} number {n}{extra}\t{('bad', 'good', 'ugly')[n % 3]}" for n in range(count)]
    path = folder / name
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return str(path)


def ready(data):
    data.setup()
    return data


class Reader(L.LightningModule):
    """Keeps the ids that it saw, and a weight that depends on them and on dropout."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(200, 4)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch)
        return torch.dropout(self.embedding(batch["text"]), 0.2, True).square().mean()

    def predict_step(self, batch, index):
        return batch["text"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, epochs):
    return L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def model():
    torch.manual_seed(0)
    return Reader()


def test_texts_are_split_by_class_and_come_back_as_they_were(tmp_path):
    data = ready(TextFiles(texts_file(tmp_path), batch_size=7, val_fraction=0.2, seed=1))
    assert data.class_names == ["bad", "good", "ugly"]
    assert data.num_classes == 3
    seen = {}
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        for batch in loader:
            for row, label in zip(batch["text"], batch["label"].tolist(), strict=True):
                seen[data.vocabulary.decode(row.tolist())] = (split, data.class_names[label])
    assert len(seen) == 60
    assert [list(seen.values()).count(("val", name)) for name in data.class_names] == [4, 4, 4]
    for n in range(60):
        assert seen[f"{WORDS[n % 5]} number {n}"][1] == ("bad", "good", "ugly")[n % 3]
    assert data.dataset_info()["splits"] == {"train": 48, "val": 12, "test": 0}


def test_the_vocabulary_is_the_same_for_any_seed_and_number_of_labels(tmp_path):
    path = texts_file(tmp_path)
    words = [
        ready(TextFiles(path, seed=seed, train_size=size)).vocabulary.words
        for seed, size in ((0, None), (1, 3), (2, 9))
    ]
    assert words[0] == words[1] == words[2]
    assert words[0][:6] == ["number", *sorted(WORDS)]
    small = ready(TextFiles(path, vocab_size=4))
    assert small.vocabulary.words == ["number", "alpha"]
    assert max(int(batch["text"].max()) for batch in small.train_dataloader()) == 3
    assert len(small.splits["train"]) == 54


def test_files_of_their_own_for_validation_and_test(tmp_path):
    paths = [texts_file(tmp_path, count, name) for count, name in ((30, "a.tsv"), (9, "b.tsv"), (6, "c.tsv"))]
    data = ready(TextFiles(*paths))
    assert data.dataset_info()["splits"] == {"train": 30, "val": 9, "test": 6}
    assert len(next(iter(data.predict_dataloader()))["text"]) == 6


def test_without_labels(tmp_path):
    data = ready(TextFiles(texts_file(tmp_path), label_column=None))
    assert (data.class_names, data.num_classes) == ([], 0)
    assert set(next(iter(data.train_dataloader()))) == {"text"}


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{n} text\n" for n in (10, 9, 1) * 5))
    assert ready(TextFiles(str(path))).class_names == ["1", "9", "10"]


def test_the_digest_knows_the_content(tmp_path):
    first = ready(TextFiles(texts_file(tmp_path))).dataset_info()["digest"]
    other = ready(TextFiles(texts_file(tmp_path, extra="!"))).dataset_info()["digest"]
    assert len(first) == 16
    assert first != other


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    path = texts_file(tmp_path)
    whole, first, second = model(), model(), model()
    torch.manual_seed(1)
    trainer(tmp_path, 3).fit(whole, TextFiles(path, batch_size=16))
    torch.manual_seed(1)
    run = trainer(tmp_path, 2)
    run.fit(first, TextFiles(path, batch_size=16))
    run.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.get_rng_state()
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert set(saved["TextFiles"]) == {"vocabulary", "level", "lower"}
    torch.set_rng_state(state)
    trainer(tmp_path, 3).fit(second, TextFiles(path, batch_size=16), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    for expected, got in zip(whole.seen, first.seen + second.seen, strict=True):
        assert all(torch.equal(expected[key], got[key]) for key in ("text", "label"))
    assert torch.equal(whole.embedding.weight, second.embedding.weight)
    assert not torch.equal(whole.seen[0]["label"], whole.seen[4]["label"])


def test_prediction_reads_with_the_checkpoints_words(tmp_path):
    path = texts_file(tmp_path)
    run, first = trainer(tmp_path, 1), TextFiles(path)
    run.fit(model(), first)
    run.save_checkpoint(tmp_path / "one.ckpt")
    (tmp_path / "other.tsv").write_text("text\tlabel\nomega alpha alpha omega omega\tbad\nnumber omega\tgood\n" * 5)
    test = str(tmp_path / "test.tsv")
    (tmp_path / "test.tsv").write_text("text\tlabel\nnumber alpha omega\tbad\n")
    wanted = [[first.vocabulary.words.index(word) + 2 for word in ("number", "alpha")] + [1]]
    data = TextFiles(str(tmp_path / "other.tsv"), test=test)
    found = trainer(tmp_path, 1).predict(model(), data, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert found[0].tolist() == wanted
    # A new fit on another file, with the words of the checkpoint.
    data = ready(TextFiles(str(tmp_path / "other.tsv"), test=test, vocabulary=str(tmp_path / "one.ckpt")))
    assert next(iter(data.test_dataloader()))["text"].tolist() == wanted


def test_a_checkpoint_of_another_kind_of_tokens_is_refused(tmp_path):
    state = ready(TextFiles(texts_file(tmp_path), level="char")).state_dict()
    with pytest.raises(ConfigError, match="level is 'word', and the checkpoint was trained with 'char'"):
        ready(TextFiles(texts_file(tmp_path))).load_state_dict(state)
    state = ready(TextFiles(texts_file(tmp_path))).state_dict()
    with pytest.raises(ConfigError, match="words, and vocab_size is 5; expected at least"):
        ready(TextFiles(texts_file(tmp_path), vocab_size=5)).load_state_dict(state)


def test_workers_give_the_same_batches(tmp_path):
    path = texts_file(tmp_path)
    here, there = (
        [batch["text"] for batch in ready(TextFiles(path, batch_size=30, num_workers=n)).train_dataloader()]
        for n in (0, 1)
    )
    assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


def test_hyperparameters_are_all_arguments(tmp_path):
    data = TextFiles(texts_file(tmp_path), seed=3)
    assert set(data.hparams) == set(inspect.signature(TextFiles.__init__).parameters) - {"self"}


def test_nothing_before_setup():
    with pytest.raises(DataError, match="TextFiles has no data yet; call setup"):
        TextFiles("a.csv").train_dataloader()
    with pytest.raises(DataError, match="TextFiles has no vocabulary yet"):
        TextFiles("a.csv").state_dict()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected an integer >= 1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"vocab_size": 2}, "vocab_size is 2; expected an integer >= 3"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"val_fraction": 1.0}, r"val_fraction is 1.0; expected a number in \(0, 1\)"),
        ({"train_size": 0}, "train_size is 0; expected an integer >= 1, or null"),
        ({"level": "byte"}, "level is 'byte'; expected word or char"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        TextFiles("a.csv", **arguments)


def test_splits_that_can_not_be_made_are_named(tmp_path):
    path = texts_file(tmp_path)
    with pytest.raises(ConfigError, match=r"val_fraction is 0.001, which leaves 0 of 60 texts"):
        ready(TextFiles(path, val_fraction=0.001))
    with pytest.raises(ConfigError, match="train_size is 55; expected 3 to 54 texts"):
        ready(TextFiles(path, train_size=55))
    with pytest.raises(DataError, match="TextFiles has no test texts; give test a file"):
        ready(TextFiles(path)).test_dataloader()
    (tmp_path / "test.tsv").write_text("text\tlabel\na\tnew\n")
    with pytest.raises(
        DataError, match=r"test.tsv has the label 'new', which the training texts lack; expected one of"
    ):
        ready(TextFiles(path, test=str(tmp_path / "test.tsv")))
