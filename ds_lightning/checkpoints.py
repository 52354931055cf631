"""Checkpoint files that survive a kill, a full disk and a power cut, and the newest one that is whole."""

import contextlib
import errno
import os
import pickle
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import psutil
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ds_lightning.checkpoint_reader import check_complete, read_outline
from ds_lightning.errors import DataError

_HOST = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())
_TEMPORARY = re.compile(r"\.durable\.([A-Za-z0-9_-]*)\.(\d+)\.[0-9a-f]{8}\.tmp")
_in_use: set[str] = set()  # names of this process's temporary files


class DurableCheckpointIO(CheckpointIO):
    """Writes each checkpoint so that a kill at any moment leaves the old file or the new one, whole.

    Saving: a temporary file in the same folder, fsync, rename onto the name, fsync of the folder. A save that fails
    leaves the earlier file untouched and removes its temporary file; what a killed process left is removed by the next
    save in that folder. Loading: every record's CRC-32 is compared, then `torch.load` with `weights_only=True`.
    Paths with a scheme (`s3://...`) go to Lightning's `TorchCheckpointIO`.

    Args:
        keep_previous: whether a file that is overwritten stays as `NAME-previous.EXT`.

    Example:
        >>> io = DurableCheckpointIO()
        >>> io.save_checkpoint({"global_step": 3}, "last.ckpt")  # doctest: +SKIP
    """

    def __init__(self, keep_previous: bool = False) -> None:
        self.keep_previous = keep_previous

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; when this returns, it is on the disk.

        Args:
            checkpoint: tensors and plain Python.
            path: the file; missing folders are made.
            storage_options: must be None, as for `TorchCheckpointIO`.

        Raises:
            OSError: when it can't be written; the earlier file is still there.
        """
        if _is_url(path) or storage_options is not None:
            TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        _make_folder(path.parent)
        _remove_stale(path.parent)
        with _temporary_file(path.parent) as temporary:
            with temporary.open("xb") as file:
                _write(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if self.keep_previous and path.is_file() and not path.is_symlink():
                _keep(path, previous_of(path))
            os.replace(temporary, path)
        _sync_folder(path.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint that is whole and holds tensors and plain Python only.

        Args:
            path: the file.
            map_location: as `torch.load` takes it; the default loads to the CPU.
            weights_only: only an explicit False lets pickled classes be imported and run.

        Raises:
            FileNotFoundError: when there is no such file.
            DataError: when it is torn, no checkpoint, or holds pickled classes; one line.
        """
        if _is_url(path):
            return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
        check_complete(path)
        safe = weights_only is not False
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=safe)
        except pickle.UnpicklingError as error:
            raise _refused(path, error) from error
        except (RuntimeError, EOFError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"checkpoint {path} can't be read: {reason}; use another one") from error
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, and the previous one that it left; a missing one is no error."""
        if _is_url(path):
            TorchCheckpointIO().remove_checkpoint(path)
            return
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            return
        path.unlink(missing_ok=True)
        if self.keep_previous:
            previous_of(path).unlink(missing_ok=True)


def previous_of(path: Path) -> Path:
    """Return where the overwritten version of a checkpoint stays: `last.ckpt` -> `last-previous.ckpt`."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest whole checkpoint of a folder.

    The order is by `global_step`, then by time of change. Only the file that is returned, and torn ones that come
    before it, are read through; of the others only the table of contents is.

    Args:
        folder: where the `*.ckpt` files are; subfolders are not searched.

    Returns:
        The file, or None when there is no whole one (or no such folder). A file that is torn, damaged or no
        checkpoint of Lightning's is passed over with a warning of one line.

    Example:
        >>> trainer.fit(model, ckpt_path=newest_checkpoint("checkpoints"))  # doctest: +SKIP
    """
    found: dict[tuple[int, int], tuple[int, float, Path]] = {}
    for path in sorted(Path(folder).glob("*.ckpt")):
        try:
            status = path.stat()
            # A link is another name of a file that may have been read already.
            if (status.st_dev, status.st_ino) not in found:
                found[status.st_dev, status.st_ino] = (_global_step(path), status.st_mtime, path)
        except (DataError, OSError) as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    for _, _, path in sorted(found.values(), reverse=True):
        try:
            check_complete(path)
        except (DataError, OSError) as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def _global_step(path: Path) -> int:
    content = read_outline(path).content
    step = content.get("global_step") if isinstance(content, dict) else None
    if not isinstance(step, int):
        raise DataError(f"{path} is no checkpoint of Lightning's: it has no global_step; move it elsewhere")
    return step


def _is_url(path: str | Path) -> bool:
    return "://" in str(path)


def _refused(path: str | Path, error: Exception) -> DataError:
    try:
        names = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError):
        names = ", ".join(read_outline(path).refused)
    what = f"it holds pickled {names}" if names else " ".join(str(error).split())[:200]
    return DataError(
        f"checkpoint {path} was refused without executing it: {what}; save tensors and plain Python only, or, "
        "if you trust whoever wrote it, load it with weights_only=False"
    )


def _write(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    watched = _Watched(file)
    crc = torch.serialization.get_crc32_options()
    # They are what tells a whole file from a damaged one.
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(checkpoint, cast("IO[bytes]", watched))
    except Exception as error:
        # torch's zip writer hides a full disk behind "unexpected pos".
        if watched.error is not None and watched.error is not error:
            raise watched.error from error
        raise
    finally:
        torch.serialization.set_crc32_options(crc)


class _Watched:
    """Remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None
        self.flush: Callable[[], None] = file.flush

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    path = folder / f".durable.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    _in_use.add(path.name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        _in_use.discard(path.name)


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of this machine's processes that are gone."""
    for path in folder.glob(".durable.*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or match[1] != _HOST or path.name in _in_use:
            continue
        pid = int(match[2])
        # Ours but not in use: of a process before us with our number, as in a restarted container.
        if pid == os.getpid() or not psutil.pid_exists(pid):
            path.unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """Give the file a second name, so that overwriting the first loses nothing."""
    with _temporary_file(path.parent) as link:
        try:
            os.link(path, link)
        except OSError:
            # No hard links here; between the two renames the previous file is the one that is whole.
            os.replace(path, previous)
        else:
            # Does nothing, and leaves `link`, when both are the same file already.
            os.replace(link, previous)


def _make_folder(folder: Path) -> None:
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and user-space file systems have no such call; there is nothing more to do on them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
