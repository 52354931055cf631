"""Which checkpoint is the best, and its way into the run's artifacts."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient


class BestCheckpoint:
    """Remember the callbacks that save, and upload one file at the end."""

    def __init__(self) -> None:
        self._callbacks: list[ModelCheckpoint] = []
        self._uploaded: tuple[str, float] | None = None

    def watch(self, callback: ModelCheckpoint) -> None:
        """Remember a callback."""
        if all(known is not callback for known in self._callbacks):
            self._callbacks.append(callback)

    def find(self) -> tuple[Path | None, dict[str, str]]:
        """Return the best checkpoint (the last, when none is called best) and the tags that say so."""
        # A callback that watches a metric knows the best; others only know the last.
        for callback in sorted(self._callbacks, key=lambda callback: callback.monitor is None):
            path = callback.best_model_path or callback.last_model_path
            if path and Path(path).exists():
                tags = {"checkpoint.best": str(path)}
                if callback.monitor is not None and callback.best_model_score is not None:
                    tags["checkpoint.monitor"] = callback.monitor
                    tags["checkpoint.score"] = f"{float(callback.best_model_score):.8g}"
                return Path(path), tags
        return None, {}

    def upload(self, client: "MlflowClient", run: str, path: Path) -> None:
        """Copy a checkpoint (a file, or the folder of a sharded one) to `checkpoints/`, once."""
        version = (str(path), path.stat().st_mtime)
        if version == self._uploaded:
            return
        if path.is_dir():
            client.log_artifacts(run, str(path), f"checkpoints/{path.name}")
        else:
            client.log_artifact(run, str(path), "checkpoints")
        self._uploaded = version
