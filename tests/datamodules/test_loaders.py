import torch

from ds_lightning.datamodules.loaders import batch_loader, training_order


class Numbers:
    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return {"number": torch.tensor(indices)}


def test_the_order_follows_from_seed_and_epoch_and_is_told_to_the_cell():
    cell = torch.zeros((), dtype=torch.int64)

    def epochs(seed):
        sampler = training_order(Numbers(), None, seed, cell)
        loader = batch_loader(Numbers(), 4, seed=seed, sampler=sampler)
        return [[n for batch in loader for n in batch["number"].tolist()] for _ in range(3)]

    found = epochs(1)
    assert int(cell) == 2
    assert all(sorted(epoch) == list(range(10)) for epoch in found)
    assert found[0] != found[1] != found[2]
    assert found == epochs(1)
    assert found != epochs(2)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    batches = list(batch_loader(Numbers(), 4, seed=0, drop_last=True))
    assert [batch["number"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(torch.get_rng_state(), state)
