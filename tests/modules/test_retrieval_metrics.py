import socket
from functools import partial
from pathlib import Path
from typing import Any

import contrastive_cases as cases
import lightning as L
import pytest
import torch
from torch import multiprocessing
from torch.utils.data import Subset

from ds_lightning.modules import ContrastivePretraining
from ds_lightning.modules.retrieval_metrics import RetrievalRecall


def test_recall_over_batches_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(23, 5, generator=generator)
    second = first + torch.randn(23, 5, generator=generator)
    metric = RetrievalRecall(ks=(1, 5, 100))
    for part in range(0, 23, 6):
        metric.update(first[part : part + 6], second[part : part + 6])
    found = metric.compute()
    # 100 is more than there are.
    assert set(found) == {"recall_at_1", "recall_at_1_reverse", "recall_at_5", "recall_at_5_reverse"}
    for way, query, key in (("", first, second), ("_reverse", second, first)):
        ranks = []
        for row in range(23):
            similar = [float(torch.cosine_similarity(query[row], other, dim=0)) for other in key]
            ranks.append(sum(value > similar[row] for value in similar))
        for k in (1, 5):
            right = sum(rank < k for rank in ranks) / 23
            assert float(found[f"recall_at_{k}{way}"]) == pytest.approx(right, abs=1e-6)


def test_only_the_first_pairs_are_kept_until_the_reset() -> None:
    metric = RetrievalRecall(ks=(1,), limit=3)
    wrong = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    metric.update(torch.eye(2), torch.eye(2))
    metric.update(torch.eye(2), wrong.flip(1))
    assert sum(len(rows) for rows in metric.first) == 3
    metric.reset()
    metric.update(torch.eye(2), torch.eye(2))
    assert metric.compute()["recall_at_1"] == 1.0


def rows_of_a_set() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(17, 4, generator=generator)
    return first, first + torch.randn(17, 4, generator=generator)


SHARES = [[range(9), range(9, 17)], [range(0, 17, 3), range(0)], [range(0), range(0)]]


def found_in(shares: list[Any]) -> dict[str, torch.Tensor]:
    first, second = rows_of_a_set()
    metric = RetrievalRecall(ks=(1, 5))
    for share in shares:
        if share:
            metric.update(first[list(share)], second[list(share)])
    return metric.compute()


def measure(rank: int, port: int, root: Path) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save([found_in([shares[rank]]) for shares in SHARES], root / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_ranks_of_unequal_length_find_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # needs no new import
    port = free_port()
    processes = [context.Process(target=measure, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = [found_in(shares) for shares in SHARES]
    assert len(expected[0]) == 4
    assert expected[2] == {}
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == expected


class Keeps(L.Callback):
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "recall" in name}
        torch.save(figures, Path(trainer.default_root_dir) / f"{trainer.world_size}-{trainer.global_rank}.pt")


# It begins in a narrow cone, which is no collapse.
@pytest.mark.filterwarnings("error::ds_lightning.errors.CollapseWarning")
@pytest.mark.parametrize("pairs", [32, 29])
def test_a_validation_of_two_ranks_finds_what_one_does(pairs: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"image": {"width": 8}, "text": {"width": 16, "dropout": 0.0, "vocab_size": 30}}
    model = ContrastivePretraining(
        {"image": "resnet8", "text": "bag"},
        encoder_options=options,
        in_channels=1,
        projector=(16,),
        optimizer=partial(torch.optim.Adam, lr=0.01),
    )
    data = cases.Viewed(Subset(cases.ImagesAndTexts(), range(pairs)), batch_size=8)
    cases.trainer(tmp_path, max_epochs=24).fit(model, data)
    for ranks in ({}, {"strategy": "ddp_fork", "devices": 2}):
        cases.trainer(tmp_path, callbacks=[Keeps()], **ranks).validate(model, data, verbose=False)
    one = torch.load(tmp_path / "1-0.pt")
    assert 0.05 < one["val/recall_at_1"] < 1
    for rank in (0, 1):
        # 29 of two ranks are 30, one of which is there twice.
        assert torch.load(tmp_path / f"2-{rank}.pt") == pytest.approx(one, abs=1e-6)
