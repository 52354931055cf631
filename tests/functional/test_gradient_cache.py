"""Micro-batched embeddings against a plain loop and against the whole batch at once."""

import copy
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_lightning.functional import cached_embeddings, nt_xent


def small_net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Tanh(), nn.Linear(6, 3)).double()


def step(embed, net, x):
    net.zero_grad()
    both = embed(x)
    loss = nt_xent(both[: len(x) // 2], both[len(x) // 2 :], 0.2)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters()]


@given(half=st.integers(2, 6), chunk_size=st.integers(1, 13))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_the_gradient_is_that_of_the_whole_batch(half, chunk_size):
    net = small_net(nn.LayerNorm(6))
    x = torch.randn(2 * half, 4, dtype=torch.float64)
    loss, grads = step(lambda x: cached_embeddings(net, x, chunk_size), net, x)
    whole_loss, whole = step(net, net, x)
    torch.testing.assert_close(loss, whole_loss, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(grads, whole, atol=1e-13, rtol=1e-11)


def test_dropout_and_batch_norm_are_those_of_a_plain_loop():
    net = small_net(nn.BatchNorm1d(6), nn.Dropout(0.4))
    plain = copy.deepcopy(net)
    x = torch.randn(10, 4, dtype=torch.float64)
    torch.manual_seed(3)
    cached = step(lambda x: cached_embeddings(net, x, 4), net, x)
    after = torch.rand(3)
    torch.manual_seed(3)
    loop = step(lambda x: torch.cat([plain(part) for part in x.split(4)]), plain, x)
    assert torch.equal(after, torch.rand(3))
    assert cached[0] == loop[0]
    assert all(torch.equal(a, b) for a, b in zip(cached[1], loop[1], strict=True))
    assert net[1].num_batches_tracked == 3
    for name, buffer in plain.named_buffers():
        assert torch.equal(net.get_buffer(name), buffer), name


def test_only_one_micro_batch_has_activations_alive():
    net = small_net()
    alive, most = [], []

    def remember(_module, _inputs, output):
        most.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(output))

    # What the Tanh returned is what the last layer keeps for its backward pass.
    net[1].register_forward_hook(remember)
    embeddings = cached_embeddings(net, torch.randn(12, 4, dtype=torch.float64), 3)
    assert [ref() for ref in alive] == [None] * 4
    embeddings.square().sum().backward()
    assert len(alive) == 8
    assert max(most) <= 1


def test_nothing_is_recomputed_where_it_need_not_be():
    net = small_net()
    calls = []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(6, 4, dtype=torch.float64)
    cached_embeddings(net, x, 6).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        value = cached_embeddings(net, x, 4)
    assert len(calls) == 3
    torch.testing.assert_close(value, net(x))


def test_a_method_knows_its_module_and_a_function_is_told():
    net = small_net(nn.BatchNorm1d(6))
    x = torch.randn(6, 4, dtype=torch.float64)
    cached_embeddings(net.forward, x, 3).sum().backward()
    assert net[1].num_batches_tracked == 2
    cached_embeddings(lambda x: net(x), x, 3, owner=net).sum().backward()
    assert net[1].num_batches_tracked == 4
    with pytest.raises(ValueError, match="network is function, not a module or a method of one; give its module as"):
        cached_embeddings(lambda x: net(x), x, 3)


def test_errors_name_the_argument():
    net = small_net()
    with pytest.raises(ValueError, match="chunk_size is 0; expected at least 1"):
        cached_embeddings(net, torch.ones(2, 4), 0)
    with pytest.raises(ValueError, match="x has no rows"):
        cached_embeddings(net, torch.ones(0, 4), 1)
