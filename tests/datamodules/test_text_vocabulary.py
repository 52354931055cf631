import pytest
import torch

from ds_lightning.datamodules.text_vocabulary import (
    Vocabulary,
    check_words,
    most_common,
    read_vocabulary,
    tokens_of,
)
from ds_lightning.errors import ConfigError, DataError


def test_tokens():
    assert tokens_of("It's 3 o'clock!", "word", lower=True) == ["it", "'", "s", "3", "o", "'", "clock", "!"]
    assert tokens_of("Ab c", "char", lower=False) == ["A", "b", " ", "c"]


def test_the_most_common_first_and_ties_by_the_alphabet():
    assert most_common(["b a b", "c a b"], 2, "word", True) == ["b", "a"]
    assert most_common(["z y x"], 9, "word", True) == ["x", "y", "z"]


def test_numbers_and_back():
    words = Vocabulary(["the", "cat"])
    assert len(words) == 4
    assert words.encode("The cat, the dog") == [2, 3, 1, 2, 1]
    assert words.encode("The cat, the dog", max_length=2) == [2, 3]
    assert words.encode("  ") == [1]
    assert words.decode([2, 3, 1, 0, 0]) == "the cat ?"
    assert Vocabulary(["a", "b"], level="char").decode([3, 2]) == "ba"


def test_read_from_a_file_and_from_checkpoints(tmp_path):
    (tmp_path / "words.txt").write_text("the\ncat\n")
    assert read_vocabulary(tmp_path / "words.txt") == ["the", "cat"]
    for number, state in enumerate(
        ({"TextFiles": {"vocabulary": ["a"]}}, {"ContrastiveViews": {"data": {"vocabulary": ["a"]}}})
    ):
        path = tmp_path / f"{number}.ckpt"
        torch.save({"state_dict": {"weight": torch.zeros(2)}, "epoch": 1, **state}, path)
        assert read_vocabulary(path) == ["a"]
    torch.save({"state_dict": {}}, tmp_path / "none.ckpt")
    with pytest.raises(DataError, match=r"none.ckpt has no vocabulary; expected a checkpoint"):
        read_vocabulary(tmp_path / "none.ckpt")
    with pytest.raises(DataError, match=r"absent.ckpt is not there"):
        read_vocabulary(tmp_path / "absent.ckpt")


def test_words_that_do_not_fit_are_refused():
    check_words(["a", "b"], 4)
    with pytest.raises(ConfigError, match="has 2 words, and vocab_size is 3; expected at least 4"):
        check_words(["a", "b"], 3)
    with pytest.raises(ConfigError, match="has the word 'a' twice"):
        check_words(["a", "b", "a"], 9)
