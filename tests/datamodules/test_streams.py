import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ds_lightning.datamodules.streams import EpochSampler, stratified_order


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(0, 1000),
    st.data(),
)
def test_every_stretch_of_a_stratified_order_has_each_class_in_its_share(counts, seed, data):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = stratified_order(labels, torch.Generator().manual_seed(seed))
    total = sum(counts)
    assert order.sort().values.tolist() == list(range(total))
    size = data.draw(st.integers(0, total))
    start = data.draw(st.integers(0, total - size))
    found = torch.bincount(labels[order[start : start + size]], minlength=len(counts))
    for count, got in zip(counts, found.tolist(), strict=True):
        assert abs(got - size * count / total) <= len(counts)  # a few borders may fall on either side
    if len(set(counts)) == 1 and size % len(counts) == 0 and start % len(counts) == 0:
        assert found.tolist() == [size // len(counts)] * len(counts)


def test_stratified_orders_differ_by_seed_and_are_not_sorted_inside_a_class():
    labels = torch.zeros(100, dtype=torch.int64)
    first, again, other = (stratified_order(labels, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(100))


def test_the_order_is_new_each_epoch_and_set_epoch_brings_it_back():
    sampler = EpochSampler(range(50), seed=3)
    epochs = [list(sampler) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    later = EpochSampler(range(50), seed=3)
    later.set_epoch(2)
    assert list(later) == epochs[2]
    assert list(EpochSampler(range(50), seed=4)) != epochs[0]


def test_replicas_share_one_order():
    halves = [list(EpochSampler(range(20), seed=1, num_replicas=2, rank=rank)) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == list(range(20))
    whole = list(EpochSampler(range(20), seed=1))
    assert [halves[0], halves[1]] == [whole[0::2], whole[1::2]]


def test_the_cell_holds_the_running_epoch():
    cell = torch.zeros((), dtype=torch.int64)
    loader = DataLoader(range(4), sampler=EpochSampler(range(4), seed=0, epoch_cell=cell))
    seen = []
    for _ in range(3):
        for _ in loader:
            seen.append(int(cell))
    assert seen == [0] * 4 + [1] * 4 + [2] * 4
