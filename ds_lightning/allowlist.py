"""Which packages a configuration may name classes and functions of; everything else is refused before its import."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from ds_lightning.errors import ConfigError

PACKAGES = (
    "ds_lightning",
    "torch",
    "torchvision",
    "torchaudio",
    "torchmetrics",
    "timm",
    "lightning",
    "pytorch_lightning",
    "albumentations",
)

# What runs or loads code at somebody's word, inside packages that are allowed.
_DENIED = (
    "*",
    "torch.hub",
    "torch.load",
    "torch.serialization",
    "torch.jit.load",
    "torch.package",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torchvision.datasets.utils",
    "albumentations.load",
    "albumentations.core.serialization",
)
_REFUSED = re.compile(r"Importing '([^']+)' is not allowed")
_KEY = re.compile(r"""[Kk]ey ['"]([^'"]+)['"]""")
_allowed: list[str] = []


def allow_packages(packages: Iterable[str] = ()) -> None:
    """Let configurations name classes of these packages too, from now on and in this process.

    Also puts the list in force. It is kept by jsonargparse, which looks every dotted path up in it before the import,
    and again by the module in which the object is defined (`torch.os.system` is defined in `posix`).

    Args:
        packages: names such as `my_module`; `package.part` allows that part alone.

    Raises:
        ConfigError: a name that is no package's.

    Example:
        >>> allow_packages(["my_module"])
    """
    from jsonargparse import set_parsing_settings

    fresh = list(packages)
    for name in fresh:
        whole = isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
        if not whole or name.split(".")[0] == "jsonargparse":
            raise ConfigError(f"--allow {name!r} can't be allowed; expected a package's name, such as my_module")
    _allowed.extend(name for name in fresh if name not in _allowed)
    # What the user allows comes last: `--allow torch.hub` means it.
    set_parsing_settings(import_path_denylist=list(_DENIED), import_path_allowlist=[*PACKAGES, *_allowed])


def allowed_packages() -> list[str]:
    """Return what was allowed beyond PACKAGES, for another process."""
    return list(_allowed)


def split_allowed(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take each `--allow PACKAGE` out of command-line words.

    A configuration file has no such key: it can't allow itself.

    Returns:
        The other words, and the packages.

    Raises:
        ConfigError: when the package is missing.
    """
    rest, packages = [], []
    following = iter(words)
    for word in following:
        if word == "--allow":
            package = next(following, None)
            if package is None or package.startswith("-"):
                raise ConfigError("--allow needs the name of a package, such as --allow my_module")
            packages.append(package)
        elif word.startswith("--allow="):
            packages.append(word.removeprefix("--allow="))
        else:
            rest.append(word)
    return rest, packages


def refusal(error: BaseException) -> str | None:
    """Say in one line what was refused; None when the error is about something else."""
    text = " ".join(str(error).split())
    found = _REFUSED.search(text)
    if found is None:
        return None
    path = found[1]
    key = _KEY.search(text)
    where = f"{key[1]}: " if key else ""
    return (
        f"{where}class path {path!r} is not of an allowed package ({', '.join(PACKAGES)}); if you trust it, "
        f"add --allow {_to_allow(path)}"
    )


@contextmanager
def one_line_refusals() -> Iterator[None]:
    """Turn a refusal inside into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        text = refusal(error)
        if text is None:
            raise
        raise ConfigError(text) from error


def _to_allow(path: str) -> str:
    package = path.split(".")[0]
    # The package is allowed and this part of it is not: naming the package again would change nothing.
    return path if package in (*PACKAGES, *_allowed) else package
