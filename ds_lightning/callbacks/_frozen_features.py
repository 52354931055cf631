"""Features of labelled samples from a module as it is, in eval mode and without gradients."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import as_batch, input_of

from ._eval_mode import eval_mode
from ._strategies import SHARDED
from ._tasks import in_order, in_stage


class Labelled(NamedTuple):
    """Samples in the loaders' order, the same on all ranks; `shown` are the inputs, where they were asked for."""

    features: Tensor
    label: Tensor
    shown: Tensor | None


class LabelledSource:
    """Where a callback finds labelled samples: a DataModule of its own, or the trainer's `labelled_loaders()`.

    Args:
        owner: the callback's name, for messages.
        data: a DataModule with labels in its training and validation batches, or None.
    """

    def __init__(self, owner: str, data: pl.LightningDataModule | None) -> None:
        self._owner = owner
        self._data = data
        self._ready = False

    def setup(self, trainer: pl.Trainer) -> None:
        """Read the DataModule of the callback's own, once.

        Raises:
            ConfigError: when there are no labelled samples anywhere.
        """
        if self._data is None:
            found = getattr(trainer, "datamodule", None)
            for name in ("labelled_loaders", "plain"):
                if not callable(getattr(found, name, None)):
                    raise ConfigError(
                        f"{self._owner} needs labelled samples; expected a DataModule with `labelled_loaders()` and "
                        f"`plain(batch)`, such as ContrastiveViews, got {type(found).__name__}: give {self._owner} "
                        "data=, a DataModule whose training and validation batches have labels"
                    )
        elif not self._ready:
            if trainer.local_rank == 0:
                self._data.prepare_data()
            trainer.strategy.barrier("labelled samples")
            self._data.setup("fit")
            self._ready = True

    def loaders(self, trainer: pl.Trainer) -> tuple[Iterable[Any], Iterable[Any]]:
        """Return the batches to learn from and those to be judged by, in an order that is always the same."""
        if self._data is None:
            found: Any = trainer.datamodule  # type: ignore[attr-defined]
            train, held = found.labelled_loaders()
            return train, held
        return in_order(self._data.train_dataloader(), None), in_order(self._data.val_dataloader(), None)

    def prepared(self, trainer: pl.Trainer, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """Return a batch on the device as the network wants it: normalised, not augmented."""
        data: Any = self._data
        if data is None:
            batch = trainer.datamodule.plain(move_data_to_device(batch, device))  # type: ignore[attr-defined]
        else:
            with in_stage(trainer, RunningStage.VALIDATING):
                batch = data.on_before_batch_transfer(batch, 0)
                batch = data.transfer_batch_to_device(batch, device, 0)
                batch = data.on_after_batch_transfer(batch, 0)
        try:
            found = as_batch(trainer.precision_plugin.convert_input(batch))
            input_of(found)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self._owner} can't read the labelled samples: {error}") from error
        label = found.get("label")
        if label is None or label.dim() != 1 or label.is_floating_point():
            got = "none" if label is None else f"{label.dtype} of shape {tuple(label.shape)}"
            raise ConfigError(f"{self._owner} needs class indices (B,) in `label`; the batch has {got}")
        return found

    def read(
        self, trainer: pl.Trainer, module: pl.LightningModule, loader: Iterable[Any], features: str, *, show: int = 0
    ) -> Labelled:
        """Return the features of a loader's samples; those with a negative label are left out.

        Args:
            trainer: its ranks share the batches.
            module: goes to eval mode and back; the generators stay as they were.
            loader: of `loaders()`.
            features: see `feature_reader`.
            show: the most samples, whose inputs are kept too; 0 takes all samples and keeps no input.

        Raises:
            ConfigError: when there is no sample, or batches or features of another form.
        """
        # Sharded weights are gathered in a forward pass, which therefore is the same on all ranks.
        together = isinstance(trainer.strategy, SHARDED)
        parts: list[Tensor] = []
        labels: list[Tensor] = []
        shown: list[Tensor] = []
        left = show
        read = feature_reader(module, features, self._owner)
        most = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
        with (
            isolate_rng(),
            eval_mode(module),
            torch.inference_mode(False),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
        ):
            for number, raw in enumerate(islice(loader, most)):
                batch = self.prepared(trainer, raw, module.device)
                given, label = input_of(batch), batch["label"]
                mine = number % trainer.world_size == trainer.global_rank
                # The first batch tells every rank how many features there are.
                if mine or together or not parts:
                    found = read(given)
                    part = found if mine else torch.zeros_like(found)
                else:
                    part = parts[0].new_zeros(len(label), parts[0].shape[1])
                parts.append(part)
                labels.append(label)
                if show:
                    shown.append(given[:left].float().cpu() if given.is_floating_point() else given[:left].cpu())
                    left -= len(label)
                    if left <= 0:
                        break
            if not parts:
                raise ConfigError(f"{self._owner} got no labelled samples: the loader is empty")
            table = torch.cat(parts)
            if trainer.world_size > 1:
                table = trainer.strategy.reduce(table, reduce_op="sum")
            label = torch.cat(labels)
            if show:
                table, label = table[:show], label[:show]
            known = label >= 0
            if not bool(known.any()):
                raise ConfigError(f"{self._owner} got no labelled samples: every label is negative")
            # Of texts of several lengths there is no table.
            even = len({part.shape[1:] for part in shown}) == 1
            return Labelled(table[known], label[known], torch.cat(shown)[known.cpu()] if even else None)


def feature_reader(module: pl.LightningModule, features: str, owner: str) -> Callable[[Tensor], Tensor]:
    """Return a function from inputs to features (B, D), float32.

    Args:
        module: anything.
        features: a method's name, which is called with the input; or a submodule's, dots allowed, whose output is taken
            while the module itself runs. Maps (B, D, H, W) are averaged over their places.
        owner: the callback's name, for messages.

    Raises:
        ConfigError: when there is none of that name, it isn't run, or gives something else.
    """
    part: Any = module
    for name in features.split("."):
        part = getattr(part, name, None)
    if not callable(part):
        names = ", ".join(name for name, _ in module.named_children()) or "none"
        raise ConfigError(
            f"{owner} reads features from {features!r}, which {type(module).__name__} does not have; expected a method "
            f"that gives (B, D), or a submodule (there are {names}): set features="
        )

    def called(given: Tensor) -> Any:
        return part(given)

    def watched(given: Tensor) -> Any:
        seen: list[Any] = []
        handle = part.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            module(given)
        finally:
            handle.remove()
        if not seen:
            raise ConfigError(f"{owner} reads features from {features!r}, which {type(module).__name__} does not run")
        return seen[-1]

    run = watched if isinstance(part, nn.Module) and part is not module else called

    def read(given: Tensor) -> Tensor:
        found = run(given)
        if isinstance(found, Tensor) and found.dim() == 4:
            found = found.mean(dim=(2, 3))
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(given):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"{features!r} gave {got}; {owner} expected features ({len(given)}, D)")
        return found.float()

    return read
