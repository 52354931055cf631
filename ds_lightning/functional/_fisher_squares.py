"""Sums over the samples of squared per-sample gradients, one closed form for each kind of layer.

Every function takes the layer's input `a` and the gradient `g` of the summed loss by its output, sample axis first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CPU_BLOCK = 2**20  # numbers of temporary storage at a time: 4 MiB of float32 stay in the cache
CUDA_BLOCK = 2**24

Rule = Callable[[Any, Tensor, Tensor], Tensor]  # (layer, a, g) -> like the parameter


def linear_weight(layer: nn.Linear, a: Tensor, g: Tensor) -> Tensor:
    """Sum over the samples of `(sum over positions of g a^T)^2`, (out, in); a is (B, ..., in), g (B, ..., out)."""
    a = a.reshape(len(a), 1, -1, a.shape[-1]).transpose(2, 3)
    g = g.reshape(len(g), 1, -1, g.shape[-1]).transpose(2, 3)
    total = g.new_zeros(1, g.shape[2], a.shape[2])
    for part in _blocks(g, g.shape[2] * a.shape[2], g.shape[2] + a.shape[2]):
        _add_squared_products(total, g[part], a[part])
    return total[0]


def linear_bias(layer: nn.Linear, a: Tensor, g: Tensor) -> Tensor:
    """Sum over the samples of `(sum over positions of g)^2`, (out,)."""
    return g.reshape(len(g), -1, g.shape[-1]).sum(1).square_().sum(0)


def conv_weight(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, g: Tensor) -> Tensor:
    """Sum over the samples of the squared weight gradient; a is (B, in, *space), g (B, out, *space)."""
    groups, kernel = layer.groups, layer.kernel_size
    _, inputs, *window = layer.weight.shape
    columns = inputs * kernel_volume(window)
    g = g.reshape(len(g), groups, layer.out_channels // groups, -1)
    space = [
        (size + left + right - d * (k - 1) - 1) // s + 1
        for size, (left, right), k, s, d in zip(
            a.shape[2:], _paddings(layer), kernel, layer.stride, layer.dilation, strict=True
        )
    ]
    total = g.new_zeros(groups, g.shape[2], columns)
    per_sample = layer.out_channels * columns + groups * columns * g.shape[3]
    for part in _blocks(g, per_sample, layer.out_channels + groups * columns):
        x = _padded(layer, a[part])
        steps = x.stride()[2:]
        patches = x.as_strided(
            (len(x), groups, inputs, *window, *space),
            (
                x.stride(0),
                x.stride(1) * inputs,
                x.stride(1),
                *(step * d for step, d in zip(steps, layer.dilation, strict=True)),
                *(step * s for step, s in zip(steps, layer.stride, strict=True)),
            ),
            x.storage_offset(),
        )
        _add_squared_products(total, g[part], patches.reshape(len(x), groups, columns, -1))
    return total.reshape(layer.weight.shape)


def channel_bias(layer: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Sum over the samples of `(sum over space of g)^2`, (C,); g is (B, C, *space)."""
    return g.flatten(2).sum(2).square_().sum(0) if g.ndim > 2 else g.square().sum(0)


def batch_norm_weight(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    """BatchNorm that uses its running statistics: each sample is normalised by itself, (C,)."""
    shape = (1, -1) + (1,) * (a.ndim - 2)
    centred = (a - layer.running_mean.to(a.dtype).view(shape)).mul_(g)
    scale = torch.rsqrt(layer.running_var.to(a.dtype) + layer.eps)
    summed = centred.flatten(2).sum(2) if a.ndim > 2 else centred
    squares: Tensor = summed.mul_(scale).square_().sum(0)
    return squares


def group_norm_weight(layer: nn.GroupNorm, a: Tensor, g: Tensor) -> Tensor:
    """GroupNorm, (C,)."""
    return channel_bias(layer, a, F.group_norm(a, layer.num_groups, eps=layer.eps).mul_(g))


def instance_norm_weight(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    """InstanceNorm by the input's or the running statistics, (C,)."""
    if layer.track_running_stats:
        return batch_norm_weight(layer, a, g)
    return channel_bias(layer, a, F.instance_norm(a, eps=layer.eps).mul_(g))


def layer_norm_weight(layer: nn.LayerNorm, a: Tensor, g: Tensor) -> Tensor:
    """LayerNorm, shaped like `normalized_shape`."""
    shape = list(layer.normalized_shape)
    return layer_norm_bias(layer, a, F.layer_norm(a, shape, eps=layer.eps).mul_(g))


def layer_norm_bias(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    """Sum over the samples of `(sum over positions of g)^2`, shaped like `normalized_shape`."""
    return g.reshape(len(g), -1, *layer.normalized_shape).sum(1).square_().sum(0)


def rms_norm_weight(layer: nn.RMSNorm, a: Tensor, g: Tensor) -> Tensor:
    """RMSNorm, shaped like `normalized_shape`."""
    # eps=None means the epsilon of the input's own type, which `a` may no longer have.
    eps = torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps
    return layer_norm_bias(layer, a, F.rms_norm(a, list(layer.normalized_shape), eps=eps).mul(g))


def embedding_weight(layer: nn.Embedding, a: Tensor, g: Tensor) -> Tensor:
    """Sum over the samples of `(sum over a token's places of g)^2`, (V, D); a is (B, ...), g (B, ..., D)."""
    ids = a.reshape(len(a), -1)
    sample = torch.arange(len(a), device=a.device).unsqueeze(1)
    pairs, place = torch.unique(sample * layer.num_embeddings + ids, return_inverse=True)
    summed = g.new_zeros(len(pairs), layer.embedding_dim)
    summed.index_add_(0, place.flatten(), g.reshape(-1, layer.embedding_dim))
    total = g.new_zeros(layer.num_embeddings, layer.embedding_dim)
    total.index_add_(0, pairs % layer.num_embeddings, summed.square_())
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0  # autograd gives the padding no gradient
    return total


CONVOLUTION: dict[str, Rule] = {"weight": conv_weight, "bias": channel_bias}
BATCH_NORM: dict[str, Rule] = {"weight": batch_norm_weight, "bias": channel_bias}
INSTANCE_NORM: dict[str, Rule] = {"weight": instance_norm_weight, "bias": channel_bias}
RULES: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: {"weight": linear_weight, "bias": linear_bias},
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
    nn.SyncBatchNorm: BATCH_NORM,
    nn.InstanceNorm1d: INSTANCE_NORM,
    nn.InstanceNorm2d: INSTANCE_NORM,
    nn.InstanceNorm3d: INSTANCE_NORM,
    nn.GroupNorm: {"weight": group_norm_weight, "bias": channel_bias},
    nn.LayerNorm: {"weight": layer_norm_weight, "bias": layer_norm_bias},
    nn.RMSNorm: {"weight": rms_norm_weight},
    nn.Embedding: {"weight": embedding_weight},
}


def rules_of(layer: nn.Module) -> dict[str, Rule]:
    """Return the closed forms for a layer's parameters; empty where there is none.

    The type must match exactly: a subclass may compute something else.
    """
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return {}
    return RULES.get(type(layer), {})


def _add_squared_products(total: Tensor, g: Tensor, a: Tensor) -> None:
    """Add the sum over b of `(g[b] @ a[b]^T)^2` to total (G, O, K); g is (B, G, O, L), a (B, G, K, L).

    With few positions L the square is written out as a sum over pairs of positions, which is one matrix product over
    samples and pairs and never builds the gradients of single samples.
    """
    samples, groups, _, length = g.shape
    if length <= _most_pairs(g):
        left, right = g.permute(3, 1, 0, 2), a.permute(3, 1, 0, 2)  # (L, G, B, O or K)
        if length == 1:
            left, right = left.square(), right.square()
        else:
            first, second = torch.triu_indices(length, length, device=g.device)
            twice = (1 + (first != second)).to(g.dtype).view(-1, 1, 1, 1)
            left, right = left.contiguous(), right.contiguous()
            left = left[first].mul_(left[second]).mul_(twice)
            right = right[first].mul_(right[second])
        left = left.transpose(0, 1).reshape(groups, -1, g.shape[2])
        right = right.transpose(0, 1).reshape(groups, -1, a.shape[2])
        total.baddbmm_(left.transpose(1, 2), right)
        if length > 1:
            total.clamp_(min=0)  # rounding can leave a tiny negative number
        return
    products = torch.matmul(g, a.transpose(2, 3))
    if samples == 1:
        total.addcmul_(products[0], products[0])
    else:
        total.add_(products.square_().sum(0))


def _most_pairs(g: Tensor) -> int:
    """Positions up to which the sum over pairs is the faster way (measured: benchmarks/fisher.py)."""
    return 12 if g.is_cuda else 4


def _blocks(g: Tensor, direct: int, in_pairs: int) -> list[slice]:
    """Cut the samples into blocks of bounded temporary storage, given the numbers a sample needs either way."""
    length = g.shape[3]
    needed = in_pairs * length * (length + 1) // 2 if length <= _most_pairs(g) else direct
    size = max(1, (CUDA_BLOCK if g.is_cuda else CPU_BLOCK) // max(1, needed))
    return [slice(i, i + size) for i in range(0, len(g), size)]


def kernel_volume(window: list[int]) -> int:
    """Return the number of weights of one input channel."""
    volume = 1
    for size in window:
        volume *= size
    return volume


def _paddings(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Return the padding before and after each axis."""
    if layer.padding == "same":
        extra = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(e // 2, e - e // 2) for e in extra]
    if isinstance(layer.padding, str):
        return [(0, 0)] * len(layer.kernel_size)
    return [(p, p) for p in layer.padding]


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor) -> Tensor:
    """Pad the input as the layer does."""
    sizes = [size for pair in reversed(_paddings(layer)) for size in pair]
    if not any(sizes):
        return a
    return F.pad(a, sizes, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
