"""A real Hugging Face tokenizer, from a folder through the DataModule into a training step."""

import pytest
import torch
from multimodal_cases import trainer, write_csv
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from ds_lightning.datamodules import MultimodalManifest
from ds_lightning.datamodules.tokenizer_folder import FolderTokenizer
from ds_lightning.errors import ConfigError
from ds_lightning.modules import MultimodalFusion

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "it", "bark", "purr", "##s", "very", "loud", "##ly", "!"]
TEXTS = ["It barks!", "it purrs very loudly", "", "a bark", "very very very very loudly barks", "purrs, it!"]
LONGEST = 6


def bert_like(words=WORDS):
    """Splits words into pieces between two marks, and pads and cuts by itself, as a saved one of a model does."""
    tokenizer = Tokenizer(WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    marks = [(mark, words.index(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tokenizer"
    path.mkdir()
    tokenizer = bert_like()
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def manifest(folder):
    rows = [{"words": text, "age": n, "kind": "loud" if "loud" in text else "low"} for n, text in enumerate(TEXTS)]
    write_csv(folder / "texts.csv", rows)
    return str(folder / "texts.csv")


def data_of(folder, tokenizer, **options):
    words = {"modality": "text", "max_length": LONGEST, "tokenizer": str(tokenizer), "vocab_size": 3}
    schema = {"columns": {"words": words, "age": "table"}, "label": "kind"}
    path = manifest(folder)
    return MultimodalManifest(path, schema, val_path=path, batch_size=len(TEXTS), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_ids_are_those_of_the_tokenizer_itself(tmp_path, folder, workers):
    data = data_of(tmp_path, folder, num_workers=workers)
    data.setup()
    direct = bert_like()
    direct.enable_truncation(LONGEST)
    direct.enable_padding(pad_id=0)
    expected = [encoding.ids for encoding in direct.encode_batch([text for text in TEXTS if text])]
    (batch,) = data.val_dataloader()
    there = batch["present"][:, 0]
    assert there.tolist() == [text != "" for text in TEXTS]
    assert batch["text"][there].tolist() == expected
    assert not batch["text"][~there].any()
    assert data.vocab_size == len(WORDS), "what the schema says plays no part"
    # [CLS], four pieces and [SEP] of six pieces and more: cut within the marks.
    assert batch["text"][4].tolist() == [2, 8, 8, 8, 8, 3]
    assert batch["text"][0].tolist() == [2, 4, 5, 7, 11, 3]


def test_a_fusion_is_trained_with_it_and_padding_changes_nothing(tmp_path, folder):
    torch.manual_seed(0)
    data = data_of(tmp_path, folder)
    model = MultimodalFusion({"text": None, "table": None}, width=16, heads=2)
    run = trainer(max_epochs=1)
    run.fit(model, data)
    assert run.global_step == 1
    assert 0 < float(run.callback_metrics["train/loss"]) < 5
    assert model.hparams["encoder_options"]["text"]["vocab_size"] == len(WORDS)
    model.eval()
    (batch,) = data.val_dataloader()
    padded = {**batch, "text": torch.nn.functional.pad(batch["text"], (0, 5))}
    torch.testing.assert_close(model(batch), model(padded), rtol=0, atol=1e-6)
    # The words of a vocabulary would be in the state; those of the folder stay there.
    assert "vocabulary" not in data.state_dict()


def test_texts_of_which_nothing_is_left_are_padding(tmp_path):
    bare = bert_like()
    bare.post_processor = None
    bare.save(str(tmp_path / "tokenizer.json"))
    assert bare.encode("\u200b").ids == []
    tokenizer = FolderTokenizer(tmp_path)
    assert [tokenizer.encode(text, 4) for text in ("\u200b", "it barks")] == [[0], [4, 5, 7]]


def test_other_padding_is_refused_and_so_is_a_file_of_something_else(tmp_path):
    bert_like([*WORDS[1:], "[PAD]"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"no padding token with the number 0; expected one, as BERT's has$"):
        FolderTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"hello": 1}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json' is no tokenizer: [^\n]+$"):
        FolderTokenizer(tmp_path)
