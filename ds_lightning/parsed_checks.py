"""What a parsed configuration says that can't work, and that Lightning would find out much later or never."""

from typing import Any

from ds_lightning.checkpoint_check import check_loadable
from ds_lightning.errors import ConfigError

_NO_CALLBACK = ("lightning.Callback", "lightning.pytorch.Callback", "lightning.pytorch.callbacks.Callback")
# What Lightning takes in the place of a checkpoint's path.
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


def check_parsed(config: Any) -> None:
    """Check the seed, a few of the Trainer's options, and the checkpoint that a subcommand is to start from.

    Args:
        config: as the parser gives it; with a subcommand its options are below its name.

    Raises:
        ConfigError: an option that can't work.
        DataError: a checkpoint that can't be loaded.
    """
    chosen = config.get("subcommand")
    options = config[chosen] if chosen else config
    _check_values(options)
    path = options.get("ckpt_path")
    if chosen and path and "://" not in str(path) and str(path).partition(":")[0] not in _CHECKPOINT_WORDS:
        check_loadable(path, training=chosen == "fit", trusted=options.get("weights_only") is False)


def _check_values(options: Any) -> None:
    seed = options.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything is {seed}; expected an integer in [0, 2**32)")
    trainer = options.get("trainer")
    every = trainer.get("accumulate_grad_batches")
    if isinstance(every, int) and every < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches is {every}; expected an integer >= 1")
    callbacks = trainer.get("callbacks")
    for position, entry in enumerate(callbacks if isinstance(callbacks, list) else []):
        # The parser puts the base class in the place of a missing one: it would do nothing.
        if hasattr(entry, "get") and str(entry.get("class_path") or "lightning.Callback") in _NO_CALLBACK:
            raise ConfigError(f"trainer.callbacks: entry {position} has no class_path; expected the callback's class")
