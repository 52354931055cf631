import sys
from types import SimpleNamespace

import pytest

from ds_lightning.datamodules.tokenizer_folder import FolderTokenizer
from ds_lightning.errors import ConfigError


class _Letters:
    """Stands in for tokenizers.Tokenizer: a number for each letter, between two marks."""

    def __init__(self, path):
        with open(path) as file:
            text = file.read()
        if not text.startswith("letters"):
            raise Exception("expected value\nat line 1")
        self.padding = int(text.split()[1])
        self.most = None

    def no_padding(self):
        pass

    def no_truncation(self):
        self.most = None

    def enable_truncation(self, most):
        self.most = most

    def token_to_id(self, token):
        return self.padding if token == "[PAD]" else None

    def get_vocab_size(self):
        return 128

    def encode(self, text):
        kept = text if self.most is None or self.most < 2 else text[: self.most - 2]
        return SimpleNamespace(ids=[1, *map(ord, kept), 2])


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=SimpleNamespace(from_file=_Letters)))


def folder(path, text):
    (path / "tokenizer.json").write_text(text)
    return path


def test_a_text_is_cut_within_its_marks_and_the_next_is_whole(package, tmp_path):
    tokenizer = FolderTokenizer(folder(tmp_path, "letters 0"))
    assert tokenizer.encode("abc", max_length=4) == [1, 97, 98, 2]
    assert tokenizer.encode("abc", max_length=1) == [1]
    assert tokenizer.encode("abc") == [1, 97, 98, 99, 2]
    assert len(tokenizer) == 128


def test_padding_must_be_0(package, tmp_path):
    with pytest.raises(ConfigError, match="no padding token with the number 0"):
        FolderTokenizer(folder(tmp_path, "letters 1"))


def test_a_broken_file_is_named_in_one_line(package, tmp_path):
    with pytest.raises(ConfigError, match=r"is no tokenizer: expected value at line 1$"):
        FolderTokenizer(folder(tmp_path, "{"))


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        FolderTokenizer(folder(tmp_path, "letters 0"))
