import json

import numpy as np
import pytest
import torch

from ds_lightning.datamodules.series_values import read_series


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_a_list_and_a_table_give_the_same_series(tmp_path, channels):
    values = np.random.default_rng(0).normal(size=(channels, 7))
    np.save(tmp_path / "a.npy", values)
    np.savetxt(tmp_path / "plain.csv", values.T, delimiter=",")
    np.savetxt(tmp_path / "headed.csv", values.T, delimiter=",", header="x,y,z"[: 2 * channels - 1], comments="")
    wanted = torch.from_numpy(values[:, :5].astype(np.float32))
    for source in (*sorted(tmp_path.iterdir()), values.tolist(), json.dumps(values.tolist())):
        torch.testing.assert_close(read_series(source, channels, 5), wanted, atol=0, rtol=0)


def test_one_channel_needs_no_axis(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4, dtype=np.int16))
    assert read_series(tmp_path / "a.npy", 1, 9).tolist() == [[0, 1, 2, 3]]
    assert read_series("[1, 2.5]", 1, 9).tolist() == [[1, 2.5]]


def test_blank_lines_are_no_steps(tmp_path):
    (tmp_path / "a.csv").write_text("\n1,2\n\n3,4\n\n5,6\n")
    assert read_series(tmp_path / "a.csv", 2, 2).tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1, 2", "Expecting"),
        ("[]", "no steps"),
        ([[], []], "no steps"),
        ([], r"shape \(0,\); expected \(2, steps\)"),
        ([[1, 2], [3]], "different lengths"),
        ([[1, 2]], r"shape \(1, 2\); expected \(2, steps\) \(transpose it\?\)"),
        ([[1, None], [2, 3]], "holds None"),
        ([["1"], ["2"]], "holds '1'"),
        ([[True], [False]], "holds True"),
        ([[[1]], [[2]]], r"holds \[1\]"),
        ([[1, 2], [3, float("nan")]], "at step 1"),
        ([[1e300], [1]], "too large at step 0"),
        ({"a": 1}, "is a dict"),
        (3.5, "is a float"),
    ],
)
def test_lists_that_are_no_series(value, words):
    with pytest.raises(ValueError, match=words):
        read_series(value, 1 if value == "[]" else 2, 9)


def test_files_that_are_no_series(tmp_path):
    np.save(tmp_path / "whole.npy", np.zeros((2, 100)))
    whole = (tmp_path / "whole.npy").read_bytes()
    np.savez(tmp_path / "a.npz", np.zeros((2, 3)))
    cases = {
        "cut.npy": (whole[:500], "can't be read"),
        "head.npy": (whole[:60], "can't be read"),
        "archive.npy": ((tmp_path / "a.npz").read_bytes(), "an archive"),
        "nothing.npy": (b"", "can't be read"),
        "a.txt": (b"1,2", "expected .npy or .csv"),
        "words.csv": (b"x,y\na,b\n", "line 2"),
        "mixed.csv": (b"1,b\n2,3\n", "line 1"),
        "two.csv": (b"x,y\nx,y\n1,2\n", "line 2"),
        "ragged.csv": (b"1,2\n3\n", "line 2 has 1 columns; expected 2"),
        "empty.csv": (b"", "no steps"),
        "nan.csv": (b"1,2\n3,nan\n", "at step 1"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_series(tmp_path / name, 2, 9)
    for name, array in {"text": np.array([["a"], ["b"]]), "complex": np.zeros((2, 1), complex)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match="expected numbers"):
            read_series(tmp_path / f"{name}.npy", 2, 9)
    np.save(tmp_path / "object.npy", np.array([[None], [None]]), allow_pickle=True)
    np.save(tmp_path / "none.npy", np.zeros((2, 0)))
    for name, words in (("object", "can't be read"), ("none", "can't be read|no steps")):
        with pytest.raises(ValueError, match=words):
            read_series(tmp_path / f"{name}.npy", 2, 9)
