import pytest
import torch

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
