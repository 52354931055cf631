import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.functional.continual import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    largest_drop,
)

NAN = math.nan
# Worked out by hand below.
R = torch.tensor([[0.90, 0.20, 0.10], [0.40, 0.80, 0.30], [0.60, 0.95, 0.70]], dtype=torch.float64)
UNTRAINED = torch.tensor([0.10, 0.10, 0.20], dtype=torch.float64)


def test_a_matrix_worked_out_by_hand():
    assert average_accuracy(R) == pytest.approx((0.60 + 0.95 + 0.70) / 3)
    assert forgetting(R) == pytest.approx(((0.90 - 0.60) + (0.80 - 0.95)) / 2)
    assert backward_transfer(R) == pytest.approx(((0.60 - 0.90) + (0.95 - 0.80)) / 2)
    assert forward_transfer(R, UNTRAINED) == pytest.approx(((0.20 - 0.10) + (0.30 - 0.20)) / 2)
    assert largest_drop(R) == pytest.approx(0.90 - 0.40)  # task 0 comes back later: 0.90 - 0.60 would miss it


def test_the_best_accuracy_may_be_from_before_the_task_was_trained():
    matrix = torch.tensor([[0.9, 0.8], [0.9, 0.7]], dtype=torch.float64)
    assert largest_drop(matrix) == 0.0  # task 1 is no old task at any time
    longer = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.7, 0.1], [0.9, 0.6, 0.5]], dtype=torch.float64)
    assert forgetting(longer) == pytest.approx((0.0 + 0.8 - 0.6) / 2)
    assert largest_drop(longer) == pytest.approx(0.8 - 0.6)


def test_tasks_that_only_get_better_have_negative_forgetting_and_no_drop():
    matrix = torch.tensor([[0.5, 0.1], [0.6, 0.9]], dtype=torch.float64)
    assert forgetting(matrix) == pytest.approx(-0.1)
    assert largest_drop(matrix) == 0.0


def test_an_unfinished_stream_counts_the_finished_tasks():
    matrix = R.clone()
    matrix[2] = NAN
    assert average_accuracy(matrix) == pytest.approx((0.40 + 0.80) / 2)
    assert forgetting(matrix) == pytest.approx(0.50)
    assert backward_transfer(matrix) == pytest.approx(-0.50)
    assert forward_transfer(matrix, UNTRAINED) == pytest.approx(0.10)
    assert largest_drop(matrix) == pytest.approx(0.50)


def test_entries_above_the_diagonal_may_be_missing_except_for_forward_transfer():
    matrix = R.clone()
    matrix[0, 1] = matrix[0, 2] = matrix[1, 2] = NAN
    assert forgetting(matrix) == pytest.approx(forgetting(R))
    assert largest_drop(matrix) == pytest.approx(largest_drop(R))
    with pytest.raises(ValueError, match="right before it; one is missing"):
        forward_transfer(matrix, UNTRAINED)


@pytest.mark.parametrize("figure", [forgetting, backward_transfer, largest_drop])
def test_one_task_has_no_old_ones(figure):
    matrix = torch.full((3, 3), NAN)
    matrix[0] = 0.5
    assert average_accuracy(matrix) == 0.5
    with pytest.raises(ValueError, match="1 finished rows; expected at least 2"):
        figure(matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:2], r"shape \(2, 3\); expected \(T, T\)"),
        (lambda m: m[0], r"shape \(3,\)"),
        (lambda m: m * NAN, "0 finished rows"),
        (lambda m: m.index_fill(0, torch.tensor(1), NAN), r"matrix\[1, 0\] is nan; expected an accuracy"),
        (lambda m: m.clone().index_put_((torch.tensor(2), torch.tensor(0)), torch.tensor(NAN).double()), r"\[2, 0\]"),
        (lambda m: m.clone().index_put_((torch.tensor(0), torch.tensor(2)), torch.tensor(math.inf).double()), "is inf"),
    ],
)
def test_what_cannot_be_a_matrix_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        average_accuracy(change(R))


def test_the_untrained_row_has_one_entry_a_task():
    with pytest.raises(ValueError, match=r"untrained has shape \(2,\); expected \(3,\)"):
        forward_transfer(R, UNTRAINED[:2])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_equal_to_plain_loops(data):
    tasks = data.draw(st.integers(2, 6))
    done = data.draw(st.integers(2, tasks))
    share = st.floats(0, 1, width=32)
    rows = [[data.draw(share) if i < done else NAN for _ in range(tasks)] for i in range(tasks)]
    start = [data.draw(share) for _ in range(tasks)]
    k = done - 1
    total = forgot = back = ahead = drop = 0.0
    for j in range(done):
        total += rows[k][j]
    for j in range(k):
        forgot += max(rows[i][j] for i in range(k)) - rows[k][j]
        back += rows[k][j] - rows[j][j]
        ahead += rows[j][j + 1] - start[j + 1]
        for i in range(j + 1, done):
            for earlier in range(i):
                drop = max(drop, rows[earlier][j] - rows[i][j])
    matrix = torch.tensor(rows, dtype=torch.float64)
    untouched = matrix.clone()
    assert average_accuracy(matrix) == pytest.approx(total / done, abs=1e-12)
    assert forgetting(matrix) == pytest.approx(forgot / k, abs=1e-12)
    assert backward_transfer(matrix) == pytest.approx(back / k, abs=1e-12)
    assert forward_transfer(matrix, torch.tensor(start, dtype=torch.float64)) == pytest.approx(ahead / k, abs=1e-12)
    assert largest_drop(matrix) == pytest.approx(drop, abs=1e-12)
    assert torch.equal(matrix.nan_to_num(nan=-1), untouched.nan_to_num(nan=-1))
