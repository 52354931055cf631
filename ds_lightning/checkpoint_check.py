"""Whether a checkpoint can be loaded at all, found out without running anything of it."""

from pathlib import Path

from ds_lightning.checkpoint_reader import check_complete, read_outline
from ds_lightning.errors import DataError

_WEIGHTS = ("state_dict", "pytorch-lightning_version")
_TRAINING = ("loops", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def check_loadable(path: str | Path, *, training: bool = False, trusted: bool = False) -> None:
    """Refuse a file that is torn, holds pickled classes, or lacks what a Lightning checkpoint has.

    Args:
        path: the file.
        training: whether a fit is to go on from it, which takes more than weights.
        trusted: whether pickled classes are welcome (`weights_only=False`).

    Raises:
        FileNotFoundError: when there is no such file.
        DataError: names the file and what is wrong with it; one line.
    """
    check_complete(path)
    outline = read_outline(path)
    if trusted:
        return
    if outline.refused:
        raise DataError(
            f"checkpoint {path} was refused without executing it: it holds pickled {', '.join(outline.refused)}; "
            "save tensors and plain Python only, or, if you trust whoever wrote it, load it with weights_only=False"
        )
    content = outline.content
    if not isinstance(content, dict):
        raise DataError(f"{path} is no checkpoint of Lightning's: it holds no dictionary; expected one with state_dict")
    missing = [key for key in (*_WEIGHTS, *(_TRAINING if training else ())) if key not in content]
    if missing:
        only = training and not any(key in missing for key in _WEIGHTS)
        raise DataError(
            f"checkpoint {path} lacks {', '.join(missing)}; "
            + ("it can be validated, but no fit can go on from it" if only else "expected a checkpoint of Lightning's")
        )
    loops = content.get("loops")
    if training and not (isinstance(loops, dict) and isinstance(loops.get("fit_loop"), dict)):
        raise DataError(f"checkpoint {path} has no counters of the fit in its loops; no fit can go on from it")


def does_not_fit(path: str | Path, error: RuntimeError) -> DataError | None:
    """Say in one line that a checkpoint is another network's; None when the error is about something else."""
    head, *lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not head.startswith("Error(s) in loading state_dict for "):
        return None
    name = head.removeprefix("Error(s) in loading state_dict for ").rstrip(":")
    first = lines[0][:200].rstrip(".") if lines else "it has other tensors"
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return DataError(f"checkpoint {path} does not fit {name}: {first}{more}; give the options that it was trained with")
