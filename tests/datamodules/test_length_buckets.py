import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.length_buckets import LengthBuckets, relative_lengths


def all_ranks(lengths, replicas, **options):
    ranks = [LengthBuckets(lengths, num_replicas=replicas, rank=rank, **options) for rank in range(replicas)]
    return ranks, [list(rank) for rank in ranks]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    replicas=st.integers(1, 4),
    drop_last=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_sample_comes_and_all_ranks_step_together(lengths, batch_size, replicas, drop_last, seed):
    options = {"batch_size": batch_size, "seed": seed, "drop_last": drop_last}
    ranks, batches = all_ranks(torch.tensor(lengths), replicas, **options)
    together = batch_size * replicas
    count = len(lengths) // together if drop_last else -(-len(lengths) // together)
    assert [len(rank) for rank in ranks] == [len(found) for found in batches] == [count] * replicas
    for of_ranks in zip(*batches, strict=True):
        assert len({len(batch) for batch in of_ranks}) == 1
        assert 1 <= len(of_ranks[0]) <= batch_size
    found = [n for rank in batches for batch in rank for n in batch]
    if drop_last:
        assert len(set(found)) == len(found) == count * together
    else:
        # None is lost; fewer come twice than there are processes.
        assert set(found) == set(range(len(lengths)))
        assert len(found) - len(lengths) < replicas
    # Two processes take what one would have in batches twice as large.
    alone = list(LengthBuckets(torch.tensor(lengths), batch_size=together, seed=seed, drop_last=drop_last))
    if len(lengths) % replicas == 0:
        joined = [sorted(n for batch in of_ranks for n in batch) for of_ranks in zip(*batches, strict=True)]
        assert joined == [sorted(batch) for batch in alone]


def test_there_is_little_padding_and_the_order_is_another_each_epoch():
    lengths = torch.randint(1, 1000, (2000,), generator=torch.Generator().manual_seed(0))
    order = LengthBuckets(lengths, batch_size=20, seed=3)
    first, second = list(order), list(order)
    assert first != second

    def waste(batches):
        padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
        return 1 - int(lengths.sum()) / padded

    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(1)).split(20)
    assert waste(shuffled) > 0.45
    assert max(waste(first), waste(second)) < 0.05
    # Not from short to long: the batches themselves come in any order.
    sizes = torch.tensor([float(lengths[batch].float().mean()) for batch in first])
    assert abs(torch.corrcoef(torch.stack([sizes, torch.arange(100.0)]))[0, 1]) < 0.3
    order.set_epoch(0)
    assert list(order) == first


def test_the_workers_are_told_the_epoch():
    cell = torch.zeros((), dtype=torch.int64)
    order = LengthBuckets(torch.arange(1, 9), batch_size=2, seed=0, epoch_cell=cell)
    order.set_epoch(5)
    iter(order)
    assert int(cell) == 5
    iter(order)
    assert int(cell) == 6


def test_absent_modalities_do_not_come_together():
    lengths = relative_lengths({"audio": torch.tensor([10, 0, 30]), "text": torch.tensor([4, 4, 4])})
    assert lengths.tolist() == [10 / 30, 20 / 30, 1.0]
    both = relative_lengths({"audio": torch.tensor([10, 0, 30]), "text": torch.tensor([4, 2, 0])})
    torch.testing.assert_close(both, torch.tensor([10 / 30 + 1, 20 / 30 + 0.5, 1 + 0.75], dtype=torch.float64))
    assert relative_lengths({"audio": torch.tensor([7, 0, 7]), "text": torch.zeros(3)}) is None
