"""MixUp for batches of several modalities: one weight and one partner a sample, for all of them."""

import warnings

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.functional.mixing import mixup
from ds_lightning.functional.seeds import derived_seed

from .mixer import sample_beta

Batch = dict[str, Tensor]
_PARTNER = "partner"


class MultimodalMixer:
    """Mixes all modalities of a sample with the same partner, by the same weight (MixUp, arXiv 1710.09412).

    Partners are a random permutation among the samples of a batch that have the same modalities, so nothing absent is
    blended; a sample alone in that has `mix` = 1. Images, tables, audio and series are blended. Words can't be: a text
    is that of the sample with the larger share. So are the masks of audio and series: what is blended keeps the length
    of the sample with the larger share, and where the partner is shorter it is blended with zeros, which are the mean.
    A mixed batch has `label_mixed` and `mix` (B,) beside `label`, as `BatchMixer` makes them.

    Random numbers are drawn on the CPU, from the seed, the rank and the number of batches so far, which is the state.

    Args:
        alpha: of Beta(alpha, alpha), > 0.
        seed: of the random numbers.
        rank: the process's number among those that share the data.

    Raises:
        ConfigError: alpha out of its range.

    Example:
        >>> mixer = MultimodalMixer(alpha=0.2)
        >>> batch = {"image": torch.rand(4, 1, 8, 8), "table": torch.rand(4, 2), "label": torch.arange(4)}
        >>> mixed = mixer.mix(mixer.draw({**batch, "present": torch.ones(4, 2, dtype=torch.bool)}))
        >>> sorted(mixed)
        ['image', 'label', 'label_mixed', 'mix', 'present', 'table']
    """

    def __init__(self, alpha: float = 0.2, seed: int = 0, rank: int = 0) -> None:
        if not 0 < alpha < float("inf"):
            raise ConfigError(f"mix_alpha is {alpha}; expected a number > 0")
        self.alpha = alpha
        self.seed = seed
        self.rank = rank
        self.batches = 0
        self._warned = False

    def draw(self, batch: Batch) -> Batch:
        """Add `mix` and `partner` (B,) to a batch on the CPU, where to look at `present` makes nothing wait.

        Args:
            batch: with `present` (B, modalities) bool.
        """
        present = batch["present"]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "mixing", self.rank, self.batches))
        self.batches += 1
        kinds = torch.unique(present, dim=0, return_inverse=True)[1]
        partner = torch.arange(len(present))
        for kind in range(int(kinds.max()) + 1):
            same = (kinds == kind).nonzero()[:, 0]
            partner[same] = same[torch.randperm(len(same), generator=generator)]
        mix = sample_beta(self.alpha, len(present), generator).float()
        if int(kinds.max()) + 1 == len(kinds) and not self._warned:
            self._warned = True
            warnings.warn(
                f"a batch of {len(present)} samples, of which no two have the same modalities, was not mixed; use a "
                "larger batch_size, or drop_last=True if it is the epoch's last batch",
                NoEffectWarning,
                stacklevel=2,
            )
        mix[partner == torch.arange(len(present))] = 1.0
        return {**batch, "mix": mix, _PARTNER: partner}

    def mix(self, batch: Batch) -> Batch:
        """Return the mixed batch, from what `draw` has given, on any device."""
        batch = dict(batch)
        partner, share = batch.pop(_PARTNER), batch["mix"]
        larger = torch.where(share >= 0.5, torch.arange(len(partner), device=partner.device), partner)
        for name in ("image", "table", "audio", "series"):
            if name in batch:
                batch[name] = mixup(batch[name], share, partner)
        if "text" in batch:
            batch["text"] = batch["text"][larger]
        for name in ("audio", "series"):
            if f"{name}_mask" in batch:
                mask = batch[f"{name}_mask"] = batch[f"{name}_mask"][larger]
                batch[name] = torch.where(mask[:, None], batch[name], 0)
        return {**batch, "label_mixed": batch["label"][partner]}

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches so far."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of `state`."""
        self.batches = int(state["batches"])
