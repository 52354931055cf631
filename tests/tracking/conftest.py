import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_lightning.tracking import Store
from ds_lightning.tracking.outbox import Outbox
from ds_lightning.tracking.store import connect, locate


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables: making them takes 2 to 4 s."""
    root = tmp_path_factory.mktemp("template")
    connect(locate(root))
    return root / "mlflow.db"


@pytest.fixture
def store(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "store"
    root.mkdir()
    shutil.copy(template, root)
    return locate(root)


@pytest.fixture
def box(store: Store) -> Iterator[Outbox]:
    made = Outbox(store.uri, store.spool)
    yield made
    made.close()


@pytest.fixture
def root(store: Store) -> Path:
    """The store's folder."""
    return store.checkpoints.parent
