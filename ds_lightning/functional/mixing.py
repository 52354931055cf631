"""MixUp and CutMix with a weight and a partner for each sample."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# What one working buffer may take on the CPU. About half a core's L2 cache: fresh pages and main memory are
# what mixing costs there, so the partner's pixels should never leave the cache.
BLOCK_BYTES = 1 << 20

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mixup(x: Tensor, lam: Tensor, index: Tensor, *, inplace: bool = False) -> Tensor:
    """Blend each sample with its partner: `lam * x + (1 - lam) * x[index]` (MixUp, arXiv 1710.09412).

    Where `lam` is 1 the result is the original, not a rounded one (for finite values; a zero may lose its
    sign). Gradients flow when `x` requires them; `inplace` is then ignored.

    Args:
        x: inputs or features, shape (B, ...), floating.
        lam: the share of the original sample, shape (B,), floating, in [0, 1].
        index: the partner of each sample, shape (B,), int64, in [0, B).
        inplace: write into `x` (for a contiguous `x` on the CPU about 1 MiB of extra memory) instead of into
            one fresh tensor. Without it `x` is never changed.

    Returns:
        The mixed tensor, with the shape and dtype of `x`.

    Raises:
        ValueError: a wrong shape, dtype or device. Values are checked on the CPU only, because a check on a
            GPU would make the host wait for it.

    Example:
        >>> x = torch.tensor([[0.0], [8.0]])
        >>> mixup(x, torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
        tensor([[2.],
                [8.]])
    """
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected a floating dtype: convert or normalise before mixup")
    _check_pairs(x, lam, index)
    weight = lam.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    if x.requires_grad and torch.is_grad_enabled():
        return torch.lerp(x[index], x, weight)
    if inplace and x.device.type == "cpu" and x.is_contiguous():
        _mixup_blocks(x.view(x.shape[0], math.prod(x.shape[1:])), weight.view(-1, 1), index)
        return x
    partner = x.index_select(0, index)
    return torch.lerp(partner, x, weight, out=x if inplace else partner)


def cutmix(
    x: Tensor,
    lam: Tensor,
    index: Tensor,
    *,
    center: Tensor | None = None,
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Paste a box of each sample's partner into it (CutMix, arXiv 1905.04899).

    The box has sides `floor(H * sqrt(1 - lam))` and `floor(W * sqrt(1 - lam))`, a uniform centre, and is
    clipped at the border, so that the share that is kept differs from `lam`: train with the returned one.

    Args:
        x: images, shape (B, C, H, W), floating or uint8.
        lam: the wanted share of the original sample, shape (B,), floating, in [0, 1].
        index: the partner of each sample, shape (B,), int64, in [0, B). Any map, not only a permutation.
        center: the boxes' centres (row, column) as fractions in [0, 1), shape (B, 2); drawn when None.
        generator: what draws them; None is torch's global one on the CPU.
        inplace: write into `x` (about 2 MiB of extra memory on the CPU) instead of into one fresh tensor.
            Without it `x` is never changed. Ignored when `x` requires gradients.

    Returns:
        The mixed images, and the exact share of the original in each, shape (B,), float32.

    Raises:
        ValueError: a wrong shape, dtype or device. Values are checked on the CPU only, because a check on a
            GPU would make the host wait for it.

    Example:
        >>> x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
        >>> lam, center = torch.tensor([0.75, 1.0]), torch.full((2, 2), 0.5)
        >>> mixed, share = cutmix(x, lam, torch.tensor([1, 0]), center=center)
        >>> mixed.mean(dim=(1, 2, 3)), share
        (tensor([0.2500, 1.0000]), tensor([0.7500, 1.0000]))
    """
    _check_images(x)
    _check_pairs(x, lam, index)
    batch, _, height, width = x.shape
    if center is None:
        device = torch.device("cpu") if generator is None else generator.device
        center = torch.rand(batch, 2, generator=generator, device=device).to(x.device, non_blocking=True)
    elif center.shape != (batch, 2) or not center.is_floating_point() or center.device != x.device:
        raise ValueError(
            f"center has shape {tuple(center.shape)}, {center.dtype}, on {center.device}; "
            f"expected ({batch}, 2), floating, on {x.device}"
        )
    elif center.device.type == "cpu" and not ((center >= 0) & (center < 1)).all():
        raise ValueError(f"center is in [{center.min():g}, {center.max():g}]; expected [0, 1)")
    boxes, share = cutmix_boxes(lam, center, height, width)
    return paste_boxes(x, index, boxes, inplace=inplace), share


def cutmix_boxes(lam: Tensor, center: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Choose CutMix's boxes; on the CPU this is much faster than a GPU's thirty small kernels.

    Args:
        lam: the wanted share of the original, shape (B,), in [0, 1].
        center: (row, column) as fractions in [0, 1), shape (B, 2).
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        The boxes (top, bottom, left, right), ends excluded, shape (B, 4), int64; and the share of the image
        outside of each, shape (B,), float32.
    """
    side = torch.sqrt(1 - lam.float())
    edges: list[Tensor] = []
    for axis, size in enumerate((height, width)):
        length = (size * side).long()
        first = (size * center[:, axis].float()).long() - length // 2
        edges += [first.clamp(min=0), (first + length).clamp(max=size)]
    top, bottom, left, right = edges
    kept = (height * width - (bottom - top) * (right - left)).float()
    # A GPU divides by a Python number through its reciprocal, which rounds otherwise than the CPU.
    return torch.stack(edges, dim=1), kept / torch.full_like(kept, height * width)


def paste_boxes(x: Tensor, index: Tensor, boxes: Tensor, *, inplace: bool = False) -> Tensor:
    """Replace each image's box by its partner's pixels.

    Args:
        x: images, shape (B, C, H, W), floating or uint8.
        index: the partner of each sample, shape (B,), int64.
        boxes: (top, bottom, left, right), ends excluded, shape (B, 4), int64.
        inplace: write into `x`. Ignored when `x` requires gradients.

    Returns:
        The mixed images, bit for bit what a loop over the samples gives.
    """
    _check_images(x)
    if boxes.shape != (x.shape[0], 4):
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}; expected ({x.shape[0]}, 4)")
    in_rows = _inside(boxes[:, 0:2], x.shape[2])
    in_columns = _inside(boxes[:, 2:4], x.shape[3])
    with_gradient = x.requires_grad and torch.is_grad_enabled()
    if x.device.type == "cpu" and not with_gradient:
        mixed = x if inplace else x.clone()
        _paste_blocks(mixed.view(_INTEGER_OF_SIZE[x.itemsize]), index, in_rows, in_columns)
        return mixed
    mask = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    partner = x.index_select(0, index)
    if with_gradient:
        return torch.where(mask, partner, x)
    return torch.where(mask, partner, x, out=x if inplace else partner)


def mixed_mean(of_label: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of a quantity of each sample (B,), of a mixed batch weighted by lambda over both labels.

    Args:
        of_label: gives the quantity (B,) for labels.
        batch: has `label`, and when it is mixed `label_mixed` and `mix`.
    """
    value = of_label(batch["label"])
    if "mix" in batch:
        mix = batch["mix"].to(value.dtype)
        value = mix * value + (1 - mix) * of_label(batch["label_mixed"])
    return value.mean()


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise ValueError(f"x has shape {tuple(x.shape)}, {x.dtype}; expected (B, C, H, W), floating or uint8")


def _check_pairs(x: Tensor, lam: Tensor, index: Tensor) -> None:
    batch = x.shape[0] if x.ndim else 0
    for name, tensor, kind, right in (
        ("lam", lam, "floating", lam.is_floating_point()),
        ("index", index, "int64", index.dtype == torch.int64),
    ):
        if tensor.shape != (batch,) or not right or tensor.device != x.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}; "
                f"expected ({batch},), {kind}, on {x.device}"
            )
    if x.device.type == "cpu" and batch:
        if not ((lam >= 0) & (lam <= 1)).all():
            raise ValueError(f"lam is in [{lam.min():g}, {lam.max():g}]; expected [0, 1]")
        if not ((index >= 0) & (index < batch)).all():
            raise ValueError(f"index is in [{index.min()}, {index.max()}]; expected [0, {batch})")


def _inside(edges: Tensor, size: int) -> Tensor:
    """Which of `size` positions lie between the edges (B, 2): (B, size)."""
    position = torch.arange(size, device=edges.device)
    return (position >= edges[:, :1]) & (position < edges[:, 1:])


def _mixup_blocks(x: Tensor, weight: Tensor, index: Tensor) -> None:
    """Blend (B, N) in place, some columns of all samples at a time, so that no partner is written too early."""
    step = max(1, BLOCK_BYTES // max(1, x.shape[0] * x.itemsize))
    for start in range(0, x.shape[1], step):
        block = x[:, start : start + step]
        torch.lerp(block.index_select(0, index), block, weight, out=block)


def _paste_blocks(x: Tensor, index: Tensor, in_rows: Tensor, in_columns: Tensor) -> None:
    """Paste boxes in place, some rows of one channel of all samples at a time.

    `x ^= (x ^ partner) & mask` on the bits is the same as `torch.where`, whose CPU kernel is slower.
    """
    batch, channels, height, width = x.shape
    step = max(1, BLOCK_BYTES // max(1, batch * width * x.itemsize))
    rows, columns = in_rows.to(x.dtype).neg_(), in_columns.to(x.dtype).neg_()
    for top in range(0, height, step):
        mask = rows[:, top : top + step, None] & columns[:, None, :]
        for channel in range(channels):
            block = x[:, channel, top : top + step]
            difference = block.index_select(0, index).bitwise_xor_(block).bitwise_and_(mask)
            block.bitwise_xor_(difference)
