import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.packed_samples import PackWriter, is_pack, read_pack
from ds_lightning.errors import DataError


def sample(kinds, n):
    every = {
        "image": torch.full((1, 2, 2), n, dtype=torch.uint8),
        "audio": torch.randn(3, 1 + n % 4, generator=torch.Generator().manual_seed(n)),
        "text": torch.arange(1 + n % 3, dtype=torch.uint8),
    }
    return {kind: every[kind] for kind in kinds}


@settings(deadline=None, max_examples=40)
@given(
    chunks=st.lists(
        st.lists(st.sets(st.sampled_from(["image", "audio", "text"])), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_samples_come_back_from_memory_and_from_files(chunks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    samples, memory, files = [], PackWriter(), PackWriter(folder)
    for chunk in chunks:
        small = PackWriter()
        for kinds in chunk:
            samples.append(sample(kinds, len(samples)))
            small.add(samples[-1])
        columns = small.finish()
        memory.extend(columns, len(chunk))
        files.extend(columns, len(chunk))
    assert not is_pack(folder)
    files.write_index({"labels": [["a"]]})
    assert is_pack(folder)
    stored, index = read_pack(folder)
    assert index["labels"] == [["a"]]
    for columns in (memory.finish(), stored):
        for n, expected in enumerate(samples):
            for name, column in columns.items():
                found = column[n]
                assert (found is None) == (name not in expected)
                assert int(column.lengths[n]) == (expected[name].shape[-1] if name in expected else 0)
                if found is not None:
                    assert torch.equal(found, expected[name])
                    assert found.dtype == expected[name].dtype


def test_what_does_not_fit_and_what_is_damaged(tmp_path):
    writer = PackWriter()
    writer.add({"audio": torch.zeros(3, 4)})
    with pytest.raises(DataError, match=r"audio is torch.float32 of shape \(4, 'any'\); expected .* \(3, 'any'\)"):
        writer.add({"audio": torch.zeros(4, 4)})
    small, files = PackWriter(), PackWriter(tmp_path)
    small.add(sample(["audio"], 3))
    files.extend(small.finish(), 1)
    files.write_index({})
    (tmp_path / "audio.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"is damaged .*; remove it, and it is made anew"):
        read_pack(tmp_path)
