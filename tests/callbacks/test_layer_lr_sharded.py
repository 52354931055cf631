"""fully_shard over two ranks equals one process."""

import multiprocessing
import os
import socket
from functools import partial

import pytest
import torch
from layer_lr_cases import RULE, SGD_MOMENTUM, User, images, same_state, trainer_of
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Subset

from ds_lightning.callbacks import DynamicLayerLR

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps|fork).*",
    "ignore::ds_lightning.errors.NoEffectWarning",
)

NEW = (1.0,) * 4


class Double(User):
    """In float64, so that the order of sums is not seen."""

    def __init__(self, make, scale):
        super().__init__(make, norm=partial(nn.GroupNorm, 2))
        self.net[0] = nn.Conv2d(1, 4, 3, bias=False)  # a bias would hide that its size does not count
        self.double()
        self.net[1].weight.data.copy_(torch.tensor(scale))

    def loss(self, batch):
        return super().loss((batch[0].double(), batch[1]))


class Sharded(Double):
    """Half of each batch of 4 a rank; net.7 has 3 rows for two ranks, net.0 has 4 and net.4 8."""

    def train_dataloader(self):
        data, rank = images().dataset, self.trainer.global_rank
        return DataLoader(Subset(data, range(rank, len(data), 2)), batch_size=2)

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net[4], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fit_sharded(rank, port, folder, make, options, scale):
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    module, callback = Sharded(make, scale), DynamicLayerLR(**options)
    trainer_of(callback, strategy=strategy, devices=2, use_distributed_sampler=False).fit(module)
    parameters = [p.full_tensor().detach() for p in module.parameters()]
    assert module.net[4].weight.to_local().shape == (4, 144)
    torch.save((callback.state_dict(), parameters), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("make", "options", "scale"),
    [
        (partial(SGD_MOMENTUM, weight_decay=0.1), {"rule": "trust", **RULE}, NEW),
        (AdamW, {"rule": "article", "every": 1}, NEW),
        (SGD_MOMENTUM, {}, NEW),
        (SGD_MOMENTUM, {}, (1.0, 1.0, 2.0, 2.0)),  # trained, but alike in each half
    ],
    ids=["trust", "article", "default", "fine-tuning"],
)
@pytest.mark.timeout(200)
def test_two_shards_equal_one_process(make, options, scale, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # needs no new import of Lightning
    ranks = [context.Process(target=fit_sharded, args=(r, port, tmp_path, make, options, scale)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
    assert [process.exitcode for process in ranks] == [0, 0]
    (zero, weights), (one, others) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert same_state(zero, one)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))

    single, callback = Double(make, scale), DynamicLayerLR(**options)
    trainer_of(callback).fit(single, images())
    (got,), (want,) = zero["optimizers"], callback.state_dict()["optimizers"]
    assert got["steps"] == want["steps"] == 30
    assert got["layers"]["names"] == want["layers"]["names"]
    assert got["layers"]["multipliers"] == pytest.approx(want["layers"]["multipliers"], rel=1e-6)
    if scale != NEW:
        assert set(got["layers"]["multipliers"]) == {1.0}
    elif options.get("rule") != "article":
        assert max(abs(m - 1) for m in got["layers"]["multipliers"]) > 0.1
    for a, b in zip(weights, single.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)
