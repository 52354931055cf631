"""Where the shipped YAML files are: the repository's folders, or the copies inside an installed package."""

from pathlib import Path

from ds_lightning.errors import ConfigError

ROOMS = ("callbacks", "datamodules", "sweeps")


def presets_root() -> Path:
    """Return the folder that holds callbacks/, datamodules/ and sweeps/.

    In an editable install the copies under `_presets` may be stale, so a checkout's own folders come first.
    """
    package = Path(__file__).parent
    checkout = package.parent
    # A bare `callbacks` folder beside the package proves nothing: site-packages may hold somebody's package.
    if (checkout / "pyproject.toml").is_file() and all((checkout / room).is_dir() for room in ROOMS):
        return checkout
    return package / "_presets"


def list_presets() -> list[str]:
    """Return the names of all shipped presets, such as `callbacks/layer_lr.yaml`, sorted."""
    root = presets_root()
    return sorted(path.relative_to(root).as_posix() for room in ROOMS for path in (root / room).glob("*.yaml"))


def find_config(name: str | Path, folder: Path | None = None) -> Path:
    """Find a configuration file: relative to a folder, then to the working folder, then among the presets.

    Args:
        name: a path, or a preset's name such as `callbacks/layer_lr.yaml`.
        folder: the folder of the file that names it, looked at first.

    Raises:
        ConfigError: when there is no such file.

    Example:
        >>> find_config("callbacks/layer_lr.yaml").name
        'layer_lr.yaml'
    """
    bases = ([folder] if folder else []) + [Path(), presets_root()]
    for base in bases:
        candidate = base / name
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"configuration file {str(name)!r} not found here or among the presets; "
        "`ds-lightning presets` lists those that ship"
    )
