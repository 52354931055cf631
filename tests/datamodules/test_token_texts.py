import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.text_vocabulary import Vocabulary
from ds_lightning.datamodules.token_texts import TokenTexts


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(st.text("abc ", max_size=8), min_size=1, max_size=8),
    max_length=st.integers(1, 6),
    labelled=st.booleans(),
    data=st.data(),
)
def test_batches_are_padded_to_their_longest_text(texts, max_length, labelled, data):
    vocabulary = Vocabulary(["a", "b"], level="char")
    labels = torch.arange(len(texts)) if labelled else None
    indices = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=6))
    batch = TokenTexts(texts, labels, vocabulary, max_length).__getitems__(indices)
    numbers = {"a": 2, "b": 3}
    rows = [[numbers.get(sign, 1) for sign in texts[i]][:max_length] or [1] for i in indices]
    longest = max(map(len, rows))
    assert batch["text"].tolist() == [row + [0] * (longest - len(row)) for row in rows]
    assert batch["text"].dtype == torch.int64
    assert ("label" in batch) == labelled
    if labelled:
        assert batch["label"].tolist() == indices
