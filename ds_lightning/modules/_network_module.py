"""What every module shares whose network may be given by name and fitted to the data."""

from pathlib import Path
from typing import Any, Self

from lightning.pytorch import LightningModule
from torch import nn

from ds_lightning.checkpoint_check import check_loadable, does_not_fit
from ds_lightning.errors import ConfigError
from ds_lightning.networks.by_name import TEXT_NETWORKS, backbone
from ds_lightning.networks.pruning_plan import apply_plan, plan_in, save_plan


class NetworkModule(LightningModule):
    """A LightningModule that asks the DataModule for what it was not told, and loads with one-line errors."""

    in_channels: int | None
    image_size: int | None

    @classmethod
    def load_from_checkpoint(  # noqa: D417
        cls, checkpoint_path: Any, map_location: Any = None, *others: Any, **more: Any
    ) -> Self:
        """Load as Lightning does, with one line that names the file when it can't be.

        Args:
            checkpoint_path: file or URL; the other arguments are Lightning's.

        Raises:
            DataError: when the file is torn, holds pickled classes, is no checkpoint, or is another network's.
        """
        local = isinstance(checkpoint_path, str | Path) and "://" not in str(checkpoint_path)
        if local:
            check_loadable(checkpoint_path, trusted=more.get("weights_only") is False)
        try:
            return super().load_from_checkpoint(checkpoint_path, map_location, *others, **more)
        except RuntimeError as error:
            found = does_not_fit(checkpoint_path, error)
            if found is None:
                raise
            raise found from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lose the channels that the checkpoint's network has lost, before its weights are loaded."""
        if (plan := plan_in(checkpoint)) is not None:
            apply_plan(self, plan)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in which channels the network has lost."""
        save_plan(checkpoint, self)

    @staticmethod
    def _check(in_channels: int | None, image_size: int | None, lr_scheduler: Any) -> None:
        """Refuse arguments that are outside their range."""
        for name, value in (("in_channels", in_channels), ("image_size", image_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1, or nothing to take the DataModule's")
        if isinstance(lr_scheduler, str) and lr_scheduler != "cosine":
            raise ConfigError(f"lr_scheduler is {lr_scheduler!r}; expected 'cosine', a scheduler or nothing")

    def _from_data(self, name: str, *, wanted: str | None = None, required: bool = True) -> Any:
        # Outside a Trainer, reading self.trainer raises.
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        value = getattr(datamodule, name, None)
        if value is None and required:
            raise ConfigError(
                f"{wanted or name} is neither given nor known from the DataModule ({type(datamodule).__name__}); "
                f"give it to {type(self).__name__}, or set `{name}` on the DataModule in its setup"
            )
        return value

    def _image_shape(self, in_channels: int | None, image_size: int | None) -> tuple[int, int | None]:
        """Return the channels and the size of the images, from the DataModule where they are not given."""
        if in_channels is None or image_size is None:
            shape = self._from_data("input_shape", wanted="in_channels", required=in_channels is None)
            in_channels = in_channels or shape[0]
            image_size = image_size or (shape[1] if shape else None)
        return in_channels, image_size

    def _network_by_name(
        self, name: str, num_outputs: int, options: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return a network, and its options with what the DataModule added: a text network's vocabulary.

        Takes the images' channels and size from the DataModule where they are not given.
        """
        if name in TEXT_NETWORKS:
            if "vocab_size" not in options:
                options = {**options, "vocab_size": self._from_data("vocab_size")}
            return named_network(name, num_outputs, 1, None, options), options
        self.in_channels, self.image_size = self._image_shape(self.in_channels, self.image_size)
        return named_network(name, num_outputs, self.in_channels, self.image_size, options), options


def needs_no_data(network: str | nn.Module | None, options: dict[str, Any], in_channels: int | None) -> bool:
    """Return whether a network is there, or can be built by name without asking the DataModule.

    Args:
        network: a name, a module, or None for a name that is not known yet.
        options: the user's, for a network given by name.
        in_channels: channels of the images, where they are given.
    """
    if isinstance(network, str):
        return "vocab_size" in options if network in TEXT_NETWORKS else in_channels is not None
    return network is not None


def named_network(
    name: str, num_outputs: int, in_channels: int, image_size: int | None, options: dict[str, Any]
) -> nn.Module:
    """Build a network by name, and say so when its options do not fit.

    Args:
        name: as for `backbone`.
        num_outputs: as `num_classes` of `backbone`.
        in_channels: channels of the images.
        image_size: height and width in pixels, where it is known.
        options: the user's `network_options`.

    Raises:
        ConfigError: on an unknown name, or options that the network refuses.
    """
    try:
        return backbone(name, num_classes=num_outputs, in_channels=in_channels, image_size=image_size, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError) or not options:
            raise
        raise ConfigError(f"network_options {options} do not fit {name!r}: {error}") from error
