"""MixUp and CutMix for a whole batch, with the labels kept apart."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ds_lightning.errors import NoEffectWarning
from ds_lightning.functional.batch import as_batch
from ds_lightning.functional.mixing import cutmix_boxes, mixup, paste_boxes
from ds_lightning.functional.seeds import derived_seed


def sample_beta(alpha: float, size: int, generator: torch.Generator) -> Tensor:
    """Draw from Beta(alpha, alpha), for any alpha > 0.

    Two gamma variates are drawn at alpha + 1 and scaled down by `U^(1/alpha)` in the logarithm (Marsaglia and
    Tsang, 2000), because at a small alpha the variates themselves underflow to 0 / 0.

    Args:
        alpha: > 0. 1 is the uniform distribution; below 1 most weights are near 0 or 1.
        size: how many.
        generator: on the CPU.

    Returns:
        Shape (size,), float64, in [0, 1].
    """
    if alpha == 1:
        return torch.rand(size, generator=generator, dtype=torch.float64)
    shape = torch.full((size, 2), alpha + 1, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = 1 - torch.rand(size, 2, generator=generator, dtype=torch.float64)  # (0, 1]
    logs = gamma.log() + uniform.log() / alpha
    return torch.sigmoid(logs[:, 0] - logs[:, 1])


class BatchMixer:
    """Mixes the images of a batch by MixUp or CutMix, one weight and one partner for each sample.

    A mixed batch has the partner's label as `label_mixed` and the share of the original in each image as `mix`
    (B, float32), next to `label`, which stays. The labels are never blended: train with
    `mix * loss(label) + (1 - mix) * loss(label_mixed)`. Partners are a random permutation of the batch.

    Random numbers are drawn on the CPU, from a seed that depends on `seed`, `rank` and the number of batches
    mixed so far: a run on a GPU mixes what a run on the CPU does, ranks mix differently, and that one number is
    the whole state. A batch of one can't be mixed: it gets `mix` = 1, and a `NoEffectWarning` once.

    Args:
        mixup_alpha: MixUp draws its weights from Beta(alpha, alpha); 0 turns it off (arXiv 1710.09412: 0.2 to
            0.4 for ImageNet, 1 for CIFAR).
        cutmix_alpha: the same for CutMix (arXiv 1905.04899: 1). With both on, a fair coin decides for each
            batch.
        mix_probability: the chance of each sample to be mixed, in [0, 1]; the others have `mix` = 1.
        seed: of the random numbers.
        rank: the process's number among those that share the data.

    Raises:
        ValueError: an argument out of its range, or both alphas 0.

    Example:
        >>> mixer = BatchMixer(mixup_alpha=0.2, seed=1)
        >>> batch = {"image": torch.rand(4, 3, 8, 8), "label": torch.tensor([0, 1, 2, 3])}
        >>> sorted(mixer(batch))
        ['image', 'label', 'label_mixed', 'mix']
    """

    def __init__(
        self,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_probability: float = 1.0,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        check_mixing(mixup_alpha, cutmix_alpha, mix_probability)
        if mixup_alpha == cutmix_alpha == 0:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0: nothing would be mixed; set one above 0")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.mix_probability = mix_probability
        self.seed = seed
        self.rank = rank
        self.batches = 0
        self._warned = False

    def __call__(self, batch: Any, *, inplace: bool = False) -> dict[str, Tensor]:
        """Return the mixed batch as a new dictionary.

        Args:
            batch: a dictionary with `image` (B, C, H, W) and `label` (B, ...), or a pair of the two. CutMix
                takes uint8 images too.
            inplace: the images' memory may be overwritten, which is several times faster on a CPU.
        """
        mixed = as_batch(batch)
        image, label = mixed["image"], mixed["label"]
        size = image.shape[0]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "mixing", self.rank, self.batches))
        self.batches += 1
        if size < 2:
            self._warn_no_partner()
            return mixed | {"label_mixed": label.clone(), "mix": torch.ones(size, device=image.device)}

        use_cutmix = self.cutmix_alpha > 0
        if use_cutmix and self.mixup_alpha > 0:
            use_cutmix = bool(torch.rand((), generator=generator) < 0.5)
        lam = sample_beta(self.cutmix_alpha if use_cutmix else self.mixup_alpha, size, generator).float()
        if self.mix_probability < 1:
            lam[torch.rand(size, generator=generator) >= self.mix_probability] = 1.0
        index = _to(image.device, torch.randperm(size, generator=generator))
        if use_cutmix:
            center = torch.rand(size, 2, generator=generator)
            boxes, lam = cutmix_boxes(lam, center, *image.shape[-2:])
            mixed["image"] = paste_boxes(image, index, _to(image.device, boxes), inplace=inplace)
        lam = _to(image.device, lam)
        if not use_cutmix:
            mixed["image"] = mixup(image, lam, index, inplace=inplace)
        return mixed | {"label_mixed": label.index_select(0, index), "mix": lam}

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches mixed so far: with the seed it fixes all later numbers, on every rank."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of `state`."""
        self.batches = int(state["batches"])

    def _warn_no_partner(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a batch of one sample has no partner and was not mixed; use batch_size >= 2, or "
                "drop_last=True if it is the epoch's last batch",
                NoEffectWarning,
                stacklevel=3,
            )


def check_mixing(mixup_alpha: float, cutmix_alpha: float, mix_probability: float) -> None:
    """Raise a ValueError that names the argument which is out of its range."""
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ValueError(f"{name} is {alpha}; expected a finite number >= 0 (0 turns it off)")
    if not 0 <= mix_probability <= 1:
        raise ValueError(f"mix_probability is {mix_probability}; expected a number in [0, 1]")


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    # From pageable memory the copy would make the host wait.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
