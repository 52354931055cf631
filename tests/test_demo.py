"""The demo from outside, and its runs in the MLflow UI as a person sees them."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

SCRIPT = Path(sys.executable).with_name("ds-lightning")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "mlruns"


@pytest.fixture(scope="module")
def printed(store: Path) -> str:
    words = [SCRIPT, "demo", "--epochs", "1", "--trials", "3", "--store", store]
    done = subprocess.run(words, cwd=store.parent, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def runs(store: Path) -> dict[str, Run]:
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {run.info.run_name: run for run in found}


def test_it_prints_a_table_the_best_trial_a_picture_and_the_next_command(printed: str, store: Path) -> None:
    for name in ("plain", "mixed", "mixed + layer_lr"):
        assert re.search(rf"^│ {re.escape(name)} +│ +0\.\d{{4}} │ +(\d+|-) │ +\d+ │$", printed, re.M), printed
    (picture,) = re.findall(r"^picture: (\S+\.png)$", printed, re.M)
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    (best,) = re.findall(r"^train it: ds-lightning fit --config (\S+)$", printed, re.M)
    assert yaml.safe_load(Path(best).read_text())["model"]["class_path"].endswith("Classifier")
    assert f"ds-lightning ui --store {store}" in printed.splitlines()[-1]
    assert [path.name for path in store.parent.iterdir()] == ["mlruns"], "all of it is under the store"


def test_everything_is_in_mlflow(printed: str, store: Path) -> None:
    found = runs(store)
    trials = [run for run in found.values() if run.info.run_name.startswith("trial-")]
    assert len(trials) == 3
    parents = {run.data.tags["mlflow.parentRunId"] for run in trials}
    assert len(parents) == 1
    assert all(run.info.status in ("FINISHED", "KILLED") for run in found.values())
    for name in ("plain", "mixed", "mixed + layer_lr"):
        run = found[name]
        (value,) = re.findall(rf"^│ {re.escape(name)} +│ +(0\.\d{{4}}) ", printed, re.M)
        history = MlflowClient(f"sqlite:///{store / 'mlflow.db'}").get_metric_history(run.info.run_id, "val/accuracy")
        assert max(metric.value for metric in history) == pytest.approx(float(value), abs=1e-4)
    assert any(key.startswith("layer_lr/") for key in found["mixed + layer_lr"].data.metrics)
    assert not any(key.startswith("layer_lr/") for key in found["mixed"].data.metrics)


@pytest.fixture
def address(printed: str, store: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ui = subprocess.Popen([SCRIPT, "ui", "--port", str(port), "--store", store], stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                assert ui.poll() is None, "the UI ended"
                time.sleep(0.5)
        yield url
    finally:
        ui.terminate()
        ui.wait(20)


def page(url: str, profile: Path) -> str:
    """What a person's browser shows, as HTML."""
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--window-size=1900,1000"]
    flags += ["--virtual-time-budget=20000", f"--user-data-dir={profile}", "--dump-dom"]
    return subprocess.run([BROWSER, *flags, url], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(
    BROWSER is None and not os.environ.get("DS_LIGHTNING_NEED_BROWSER"), reason="needs Chromium or Chrome"
)
def test_the_ui_shows_the_runs_the_nested_trials_and_their_comparison(
    address: str, store: Path, tmp_path: Path
) -> None:
    found = runs(store)
    trial = next(run for name, run in found.items() if name.startswith("trial-"))
    parent = next(run for run in found.values() if run.info.run_id == trial.data.tags["mlflow.parentRunId"])

    def table(experiment: str) -> str:
        return page(f"{address}/#/experiments/{experiment}/runs?workflowType=machine_learning", tmp_path / experiment)

    demo = table(found["plain"].info.experiment_id)
    for name in ("plain", "mixed", "mixed + layer_lr"):
        assert f">{name}<" in demo
    sweep = table(parent.info.experiment_id)
    assert f">{parent.info.run_name}<" in sweep
    # Nested runs are folded under their parent, which has the button that unfolds them.
    assert ">trial-0<" not in sweep
    assert 'type="button"' in sweep.split(f">{parent.info.run_name}<")[0].rpartition('role="row"')[2]

    pair = [found["plain"].info, found["mixed + layer_lr"].info]
    chosen = quote(str([info.run_id for info in pair]).replace("'", '"').replace(" ", ""))
    experiments = quote(f'["{pair[0].experiment_id}"]')
    compare = page(f"{address}/#/compare-runs?runs={chosen}&experiments={experiments}", tmp_path / "compare")
    assert "Comparing 2 Runs from 1 Experiment" in compare
    assert "plain" in compare
    assert "mixed + layer_lr" in compare
