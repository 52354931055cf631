import pytest
import torch

from ds_lightning.functional import as_batch, input_of, restrict
from ds_lightning.functional.batch import labelled_batch

X, Y = torch.randn(3, 2), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"table": X, "label": Y}])
def test_pairs_and_dictionaries_become_the_same(batch: object) -> None:
    result = as_batch(batch, modality="table")
    assert result.keys() == {"table", "label"}
    assert result["table"] is X
    assert result["label"] is Y


@pytest.mark.parametrize("batch", [X, (X,), [X]])
def test_inputs_without_labels(batch: object) -> None:
    assert list(as_batch(batch)) == ["image"]


def test_the_callers_dictionary_stays_his() -> None:
    mine = {"image": X}
    as_batch(mine)["label"] = Y
    assert mine.keys() == {"image"}


@pytest.mark.parametrize("batch", ["text", (X, Y, Y), (), (X, "label"), 3])
def test_other_forms_are_refused(batch: object) -> None:
    with pytest.raises(TypeError, match="expected a dictionary of tensors, a pair"):
        as_batch(batch)


def test_the_one_input() -> None:
    assert input_of({"label": Y, "series": X}) is X
    with pytest.raises(ValueError, match=r"\['image', 'label', 'text'\]; expected exactly one"):
        input_of({"image": X, "text": X, "label": Y})
    with pytest.raises(ValueError, match="exactly one"):
        input_of({"label": Y})


def test_outputs_that_are_not_allowed_are_at_minus_infinity() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    allowed = torch.tensor([[True, False, True, False], [True] * 4, [False, False, False, True]])
    got = restrict(logits, {"allowed": allowed})
    for row in range(3):
        for column in range(4):
            assert got[row, column] == (logits[row, column] if allowed[row, column] else float("-inf"))
    got.logsumexp(1).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~allowed] == 0).all()
    assert torch.equal(got[1], logits[1])


def test_without_allowed_the_logits_stay() -> None:
    assert restrict(X, {"label": Y}) is X


@pytest.mark.parametrize("allowed", [torch.ones(3, 4), torch.ones(3, 3).bool(), torch.ones(4).bool()])
def test_allowed_of_another_shape_or_type_is_refused(allowed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected torch\.bool of the logits' shape"):
        restrict(torch.zeros(3, 4), {"allowed": allowed})


def test_labels_are_class_indices() -> None:
    assert labelled_batch((X, Y))["label"] is Y
    for batch, said in (
        ({"image": X}, r"keys \['image'\]; expected `label`"),
        ({"image": X, "label": torch.rand(3, 2)}, r"label has the shape \(3, 2\)"),
        ({"image": X, "label": torch.rand(3)}, "torch.float32; expected class indices"),
        ({"image": X, "label": Y, "label_mixed": torch.rand(3)}, "label_mixed has the shape"),
    ):
        with pytest.raises(ValueError, match=said):
            labelled_batch(batch)
