import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_lightning.errors import ConfigError
from ds_lightning.tracking import Store, default_store
from ds_lightning.tracking.store import connect, experiment_id, locate


def test_a_folder_becomes_a_store_that_git_does_not_see(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    store = default_store()
    root = tmp_path / "mlruns"
    assert store == Store(f"sqlite:///{root}/mlflow.db", str(root / "artifacts"), root / "checkpoints")
    assert (root / ".gitignore").read_text() == "*\n!.gitignore\n"
    assert store.spool == root / "spool"

    (root / ".gitignore").write_text("mine\n")
    default_store()
    assert (root / ".gitignore").read_text() == "mine\n"


def test_the_environment_is_read_when_called_and_a_folder_wins_over_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert default_store() == Store("http://tracking.example:5000", None, tmp_path / "mlruns" / "checkpoints")
    assert default_store("here").uri == f"sqlite:///{tmp_path}/here/mlflow.db"
    assert not (tmp_path / "mlruns").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert default_store().uri == f"sqlite:///{tmp_path}/mlruns/mlflow.db"


def test_locate_makes_nothing(tmp_path):
    locate(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_four_processes_at_once_on_an_empty_folder(tmp_path):
    code = """
import sys
from ds_lightning.tracking.store import locate
from ds_lightning.tracking.runs import open_run
run = open_run(locate(sys.argv[1]), "together")
print(run.experiment_id, run.run_id)
"""
    command = [sys.executable, "-W", "default", "-c", code, str(tmp_path / "store")]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(4)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0, 0], outputs
    pairs = [out.split() for out, _ in outputs]
    assert len({experiment for experiment, _ in pairs}) == 1
    assert len({run for _, run in pairs}) == 4
    noise = "".join(err for _, err in outputs)
    assert not re.search("alembic|Creating initial|SADeprecationWarning|not found", noise), noise


def test_experiment_is_found_again(store):
    first = experiment_id(store, "digits")
    assert experiment_id(store, "digits") == first != experiment_id(store, "letters")
    location = connect(store).get_experiment(first).artifact_location
    assert location == store.artifact_location


def test_a_deleted_experiment_is_named_with_the_way_back(store):
    number = experiment_id(store, "gone")
    connect(store).delete_experiment(number)
    with pytest.raises(ConfigError, match=rf"'gone' was deleted.*mlflow experiments restore --experiment-id {number}"):
        experiment_id(store, "gone")
    connect(store).restore_experiment(number)
    assert experiment_id(store, "gone") == number


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("htp://host", "no tracking store at 'htp://host'"),
        ("http://127.0.0.1:9", "server 'http://127.0.0.1:9' does not answer"),
        ("http://me:secret@127.0.0.1:9", r"server 'http://me:\*\*\*@127.0.0.1:9'"),
        ("postgresql://me:secret@127.0.0.1:9/x", r"no tracking store at 'postgresql://me:\*\*\*@"),
    ],
)
def test_a_wrong_uri_is_named(uri, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # MLflow tries a database ten times with growing pauses.
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_MAX_RETRIES", "1")
    with pytest.raises(ConfigError, match=text) as caught:
        connect(locate(uri))
    assert "secret" not in str(caught.value)


def test_a_file_store_is_refused_with_the_folder_to_give():
    with pytest.raises(ConfigError, match=r"no longer writes to plain files.*store: \./runs"):
        locate("file:./runs")


def test_the_writer_imports_neither_torch_nor_lightning():
    code = (
        "import sys, ds_lightning.tracking.writer, ds_lightning.tracking.runs\n"
        "print([name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ), cwd=Path("/")
    )
    assert done.stdout.strip() == "[]"
