"""Whether training still stands at the step of its last checkpoint."""

import weakref

from lightning.pytorch import Trainer


class SavedStep:
    """Tell what a fit that goes on from the last checkpoint won't log again.

    Lightning logs a part of it when the checkpoint is on the disk: the step's own metrics, a validation after it, the
    epoch. All comes before the next optimizer step.
    """

    def __init__(self) -> None:
        self._trainer: weakref.ref[Trainer] | None = None
        self._step: int | None = None

    def watch(self, trainer: Trainer | None) -> None:
        """Ask this Trainer from now on; None: there is none, and nothing is told."""
        self._trainer, self._step = None if trainer is None else weakref.ref(trainer), None

    def note(self) -> None:
        """Take the step of now for that of the checkpoint."""
        self._step = self._now()

    def is_now(self) -> bool:
        """Tell whether no optimizer step came after the checkpoint."""
        # Asked with every metric: the Trainer is asked only while the answer may be yes.
        if self._step is not None and self._now() != self._step:
            self._step = None
        return self._step is not None

    def _now(self) -> int | None:
        trainer = None if self._trainer is None else self._trainer()
        return None if trainer is None else trainer.global_step
