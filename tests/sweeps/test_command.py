import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import yaml

from ds_lightning.errors import ConfigError
from ds_lightning.presets import presets_root
from ds_lightning.sweeps.command import print_result, run_sweep_command
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.summary import SweepResult


def test_help_fits_a_screen_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from ds_lightning.sweeps.command import sweep_parser\n"
        "print(sweep_parser().format_help())\n"
        "assert not {'torch', 'optuna', 'mlflow', 'lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) <= 24
    assert "ds-lightning sweep sweeps/mnist5k.yaml" in done.stdout


def test_an_unknown_file_is_one_line():
    with pytest.raises(ConfigError, match=r"'sweeps/mnist6k.yaml' not found"):
        run_sweep_command(["sweeps/mnist6k.yaml"])


@pytest.mark.parametrize("preset", sorted(path.name for path in (presets_root() / "sweeps").glob("*.yaml")))
def test_every_preset_runs_from_any_folder(preset, store, tmp_path, monkeypatch, capsys):
    content = yaml.safe_load((presets_root() / "sweeps" / preset).read_text())
    content["base"]["overrides"].update(
        {"trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1, "trainer.max_epochs": 1}
    )
    (tmp_path / preset).write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    assert run_sweep_command([preset, "--trials", "1", "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert "1 complete" in out
    assert content["objective"]["metric"] in out
    best = next(line.split(": ", 1)[1] for line in out.splitlines() if line.startswith("configuration"))
    assert yaml.safe_load(Path(best).read_text())["trainer"]["max_epochs"] == 1
    assert f"ds-lightning fit --config {best}" in out
    assert f"ds-lightning ui --store {store}" in out


def test_without_a_complete_trial_it_says_so_and_how_to_go_on(content, capsys):
    result = SweepResult("s-1", [], "parent", {"FAIL": 2}, 130)
    print_result(result, SweepSpec.from_dict(content), None)
    out = capsys.readouterr().out
    assert "2 fail" in out
    assert "no trial was completed" in out
    assert "--study s-1" in out


def test_storage_on_the_command_line_wins_over_the_file(content, store, tmp_path):
    content |= {"name": "placed", "storage": str(tmp_path / "file.journal")}
    (tmp_path / "placed.yaml").write_text(yaml.safe_dump(content))
    url = f"sqlite:///{tmp_path / 'line.db'}"
    words = ["--trials", "1", "--store", str(store), "--storage", url, "--allow", "sweep_parts"]
    assert run_sweep_command([str(tmp_path / "placed.yaml"), *words]) == 0
    (name,) = optuna.get_all_study_names(url)
    assert [trial.state.name for trial in optuna.load_study(study_name=name, storage=url).trials] == ["COMPLETE"]
    assert not (tmp_path / "file.journal").exists()
