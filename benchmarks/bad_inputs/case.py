"""One bad input, and what must come of it: one line, in time, within memory, with earlier results untouched."""

import contextlib
import gc
import hashlib
import os
import re
import resource
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from time_limit import TooLong, time_limit

from ds_lightning.cli import main
from ds_lightning.errors import ConfigError, DataError

SECONDS = 30
MEBIBYTES = 600
LONGEST = 1500
# A collection takes 0.3 s beside all that is imported: as long as a case.
_COLLECT_EVERY = 20
SMALL_FIT = """
model: {class_path: Classifier, init_args: {network: resnet8, network_options: {width: 2}}}
data: {class_path: MNIST5k, init_args: {batch_size: 20, train_size: 40, val_fraction: 0.01}}
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false, enable_model_summary: false}
"""
SMALL_SWEEP = """
base: {config: [small.yaml], overrides: {trainer.limit_val_batches: 1}}
space: {model.label_smoothing: {type: float, low: 0.0, high: 0.1}}
objective: {metric: val/loss, direction: minimize}
trials: 1
"""


@dataclass(frozen=True)
class Case:
    """A bad input.

    Args:
        name: unique; `door/what`.
        says: what the message must contain: it names the thing.
        make: writes the input into the folder that it gets, and returns command-line words, or a call of the
            Python interface that has to raise.
        fine: the input is good after all, and `make`'s call returns what is wrong with the result, or None.
    """

    name: str
    says: str
    make: Callable[["Place", Path], list[str] | Callable[[], Any]]
    fine: bool = False

    @property
    def door(self) -> str:
        """The part of the corpus."""
        return self.name.partition("/")[0]


@dataclass
class Outcome:
    """What came of a case; good when nothing is wrong."""

    name: str
    message: str
    seconds: float
    mebibytes: float
    wrong: list[str] = field(default_factory=list)


class Place:
    """A folder with a good run, its checkpoint and (unless `study` is off) a study, beside which inputs are tried."""

    def __init__(self, folder: Path, study: bool = True) -> None:
        self.folder = folder
        (folder / "small.yaml").write_text(SMALL_FIT)
        (folder / "sweep.yaml").write_text(SMALL_SWEEP)
        with self._inside(), _captured() as said:
            codes = [main(["fit", "--config=small.yaml"]), main(["sweep", "sweep.yaml"]) if study else 0]
        assert codes == [0, 0], said()
        self.checkpoint = next((folder / "mlruns" / "checkpoints").glob("*/*/checkpoints/last.ckpt"))
        self.journal = next((folder / "mlruns" / "optuna").glob("*.journal")) if study else None
        self.run_ids = [row[0] for row in self._query("SELECT run_uuid FROM runs")]
        self._before = self._good()
        self._count = 0

    def run(self, case: Case) -> Outcome:
        """Try one input."""
        self._count += 1
        folder = self.folder / f"case{self._count}"
        folder.mkdir()
        before = _peak()
        began = time.perf_counter()
        outcome = Outcome(case.name, "", 0.0, 0.0)
        with self._inside(), _captured() as said, time_limit(SECONDS):
            try:
                given = case.make(self, folder)
                began = time.perf_counter()
                self._give(case, given, outcome, said)
            except TooLong:
                outcome.wrong.append(f"hung for {SECONDS} s")
        text = said()
        outcome.seconds = round(time.perf_counter() - began, 3)
        outcome.mebibytes = round((_peak() - before) / 1024, 1)
        if outcome.mebibytes > MEBIBYTES:
            outcome.wrong.append(f"took {outcome.mebibytes} MiB")
        if "Traceback" in text:
            outcome.wrong.append(f"traceback: {text[-1500:]}")
        if (self.folder / "EXECUTED").exists():
            (self.folder / "EXECUTED").unlink()
            outcome.wrong.append("code of the input was executed")
        if self._good() != self._before:
            outcome.wrong.append("an earlier result changed")
            self._before = self._good()
        if self._count % _COLLECT_EVERY == 0:
            gc.collect()
        return outcome

    def _give(self, case: Case, given: Any, outcome: Outcome, said: Callable[[], str]) -> None:
        if isinstance(given, list):
            code = main(given)
            if code not in (1, 2):
                outcome.wrong.append(f"exit code {code}")
            lines = [line for line in said().splitlines() if line.startswith("ds-lightning")]
            if len(lines) != 1:
                outcome.wrong.append(f"{len(lines)} lines of error")
            outcome.message = lines[-1] if lines else ""
        else:
            try:
                result = given()
            except (ConfigError, DataError, ValueError, FileNotFoundError) as error:
                outcome.message = f"{type(error).__name__}: {error}"
            except Exception as error:
                outcome.message = str(error)
                outcome.wrong.append(f"raised {type(error).__name__}")
            else:
                if result is not None or not case.fine:
                    outcome.wrong.append(f"no error, but {result!r}")
        if case.fine:
            if outcome.message:
                outcome.wrong.append("a good input was refused")
            return
        if "\n" in outcome.message or len(outcome.message) > LONGEST:
            outcome.wrong.append("more than one line, or a very long one")
        if case.says not in outcome.message:
            outcome.wrong.append(f"does not say {case.says!r}")
        if re.search(r"<class '|object at 0x|KeyError: |AttributeError: |IndexError: |TypeError: ", outcome.message):
            outcome.wrong.append("speaks of Python's inside")

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(before)

    def _query(self, question: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.folder / "mlruns" / "mlflow.db")) as database:
            return sorted(database.execute(question).fetchall(), key=repr)

    def _good(self) -> dict[str, Any]:
        """Everything of the good runs: rows, checkpoints, artifacts, and the study's journal."""
        ids = ", ".join(f"'{run}'" for run in self.run_ids)
        state: dict[str, Any] = {
            table: self._query(f"SELECT * FROM {table} WHERE run_uuid IN ({ids})")
            for table in ("runs", "metrics", "params", "tags")
        }
        for path in sorted((self.folder / "mlruns").rglob("*")):
            mine = any(run in path.parts for run in self.run_ids) or path == self.journal
            if mine and path.is_file():
                state[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return state


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Capture both streams, also what is written past Python."""
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        stream = os.fdopen(os.dup(file.fileno()), "w", buffering=1)
        text = ""

        def said() -> str:
            if stream.closed:
                return text
            stream.flush()
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), size, 0).decode("utf-8", "replace")

        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), warnings.catch_warnings():
                yield said
        finally:
            text = said()
            stream.close()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
