"""Two ranks with half of the batch each are one process with all of it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_lightning.functional import gather_rows

SCRIPT = Path(__file__).with_name("gathered_losses.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT)]
    started = [
        subprocess.Popen([*command, str(r), str(folder / "store"), str(folder / f"{r}.pt")], stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    return [torch.load(folder / f"{r}.pt") for r in range(2)]


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_losses_and_gradients_of_two_ranks_are_those_of_one(ranks, chunk_size):
    script = runpy.run_path(str(SCRIPT))
    net, views = script["problem"]()
    for name, loss in script["losses"](False).items():
        value, gradient = script["outcome"](net, loss, views, script["IDS"])
        (first, first_gradient), (second, second_gradient) = (rank[name, chunk_size] for rank in ranks)
        torch.testing.assert_close((first + second) / 2, value, atol=1e-13, rtol=1e-13, msg=name)
        assert torch.equal(first_gradient, second_gradient)
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(first_gradient, gradient, atol=1e-13, rtol=1e-12, msg=name)
        # Not the same because nothing was gathered: half a batch has another loss.
        half, _ = script["outcome"](net, loss, views[:, :4], script["IDS"][:4])
        assert abs(half - first) > 1e-3, name


def test_rows_come_in_the_order_of_the_ranks(ranks):
    for rank in ranks:
        assert rank["order"].tolist() == [0, 1, 10, 11]


def test_unequal_batches_are_refused_on_every_rank(ranks):
    for rank in ranks:
        assert rank["unequal"].startswith("the ranks hold [2, 3] rows; expected the same number on each")


def test_without_a_process_group_the_rows_come_back():
    x = torch.ones(2, 3)
    assert gather_rows(x) is x
