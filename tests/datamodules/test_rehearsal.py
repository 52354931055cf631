from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ds_lightning.datamodules.rehearsal import RehearsalSampler, reservoir


def test_each_sample_seen_is_in_the_memory_with_the_same_probability():
    sizes, size, draws = [5, 20, 15], 10, 4000
    counts = torch.zeros(40)
    for seed in range(draws):
        counts[reservoir(sizes, size, seed)] += 1
    probability = size / 40
    assert counts.sum() == draws * size
    # Five standard deviations of a binomial count.
    assert (counts - draws * probability).abs().max() < 5 * (draws * probability * (1 - probability)) ** 0.5


def test_two_samples_are_in_it_together_as_often_as_in_a_random_subset():
    draws = 4000
    together = sum({2, 7} <= set(reservoir([5, 5], 4, seed).tolist()) for seed in range(draws))
    probability = (4 / 10) * (3 / 9)
    assert abs(together - draws * probability) < 5 * (draws * probability * (1 - probability)) ** 0.5


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 99))
def test_what_has_left_the_memory_never_comes_back(sizes, size, seed):
    earlier: set[int] = set()
    for task in range(len(sizes) + 1):
        held = reservoir(sizes[:task], size, seed).tolist()
        seen = sum(sizes[:task])
        assert len(held) == len(set(held)) == min(size, seen)
        newest = range(sum(sizes[: max(task - 1, 0)]), seen)
        assert set(held) <= earlier | set(newest)
        earlier = set(held)


def test_the_memory_forgets_nothing_as_long_as_it_has_room():
    assert reservoir([3, 4], 7, 0).tolist() == list(range(7))


def sampler(replicas=1, rank=0, memory=range(10), size=3, extra=2, samples=range(100, 111)):
    return RehearsalSampler(
        samples,
        torch.tensor(list(memory), dtype=torch.int64),
        batch_size=size,
        memory_batch_size=extra,
        seed=5,
        num_replicas=replicas,
        rank=rank,
    )


def batches(chosen, drop_last=False):
    size = chosen.batch_size + chosen.memory_batch_size
    loader = DataLoader(range(200), batch_size=size, sampler=chosen, drop_last=drop_last)
    made = [batch.tolist() for batch in loader]
    assert len(made) == len(loader)
    return made


def test_each_batch_has_its_share_of_the_memory():
    made = batches(sampler())
    assert [sum(i >= 100 for i in batch) for batch in made] == [3, 3, 3, 2]
    assert [sum(i < 100 for i in batch) for batch in made] == [2, 2, 2, 2]
    assert sorted(i for batch in made for i in batch if i >= 100) == list(range(100, 111))
    assert all(batch == sorted(batch, key=lambda i: i < 100) for batch in made)
    assert len(batches(sampler(), drop_last=True)) == 3


def test_without_a_memory_it_shuffles_the_task():
    made = batches(sampler(memory=()))
    assert [len(batch) for batch in made] == [3, 3, 3, 2]
    assert sampler(memory=(4,)).memory_batch_size == 1


def test_the_memory_is_gone_through_evenly():
    chosen = sampler(samples=range(100, 160), memory=range(7), size=4, extra=5)
    counts = Counter(i for i in chosen if i < 100)
    assert sum(counts.values()) == 15 * 5
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_order_follows_from_the_epoch_alone():
    chosen, other = sampler(), sampler()
    first, second = list(chosen), list(chosen)
    other.set_epoch(1)
    assert first != second == list(other)
    assert [i for i in first if i < 100] != [i for i in second if i < 100]


@pytest.mark.parametrize("replicas", [2, 3])
def test_ranks_share_the_task_and_the_draws(replicas):
    shares = [list(sampler(replicas, rank, memory=range(60), samples=range(100, 112))) for rank in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    everything = [i for share in shares for i in share]
    assert sorted(i for i in everything if i >= 100) == list(range(100, 112))
    drawn = [i for i in everything if i < 100]
    assert len(set(drawn)) == len(drawn) == replicas * -(-12 // replicas // 3) * 2
