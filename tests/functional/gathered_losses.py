"""One rank of test_gathering: python gathered_losses.py RANK STORE OUT."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_lightning.functional import cached_embeddings, gather_rows, info_nce, nt_xent

IDS = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])
QUEUE = torch.linspace(-1, 1, 15, dtype=torch.float64).sin().view(5, 3)


def losses(gather):
    """Each loss of two views and the ids of their samples."""
    return {
        "nt_xent": lambda a, b, ids: nt_xent(a, b, 0.2, gather=gather),
        "nt_xent, masked and hard": lambda a, b, ids: nt_xent(a, b, 0.2, same=ids, hardness=0.5, gather=gather),
        "info_nce": lambda a, b, ids: info_nce(a, b, 0.2, QUEUE, gather=gather, same=ids, queue_same=IDS[:5]),
        "clip": lambda a, b, ids: info_nce(a, b, 0.2, symmetric=True, gather=gather, chunk_size=3),
    }


class Embedded(nn.Module):
    """A network whose batch goes through in micro-batches of three, or at once."""

    def __init__(self, net, chunk_size=None):
        super().__init__()
        self.net, self.chunk_size = net, chunk_size

    def forward(self, x):
        return self.net(x) if self.chunk_size is None else cached_embeddings(self.net, x, self.chunk_size)


def problem():
    """A network and two views of eight samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return net, torch.randn(2, 8, 4, dtype=torch.float64)


def outcome(net, loss, views, ids):
    """The loss and the gradient of all weights."""
    net.zero_grad()
    both = net(views.flatten(0, 1)).unflatten(0, views.shape[:2])
    value = loss(both[0], both[1], ids)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def main(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net, views = problem()
    mine = slice(4 * rank, 4 * rank + 4)
    result = {}
    for chunk_size in (None, 3):
        model = DistributedDataParallel(Embedded(net, chunk_size))
        for name, loss in losses(True).items():
            result[name, chunk_size] = outcome(model, loss, views[:, mine], IDS[mine])
    result["order"] = gather_rows(torch.arange(2.0) + 10 * rank)
    try:
        gather_rows(torch.ones(2 + rank, 3))
    except ValueError as error:
        result["unequal"] = str(error)
    torch.save(result, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
