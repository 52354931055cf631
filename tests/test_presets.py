import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ds_lightning.cli import main
from ds_lightning.errors import ConfigError
from ds_lightning.presets import find_config, list_presets, presets_root

REPOSITORY = Path(__file__).parent.parent


def test_the_checkouts_own_folders_come_first() -> None:
    assert presets_root() == REPOSITORY


def test_every_yaml_file_is_listed_and_readable() -> None:
    found = sorted(
        p.relative_to(REPOSITORY).as_posix()
        for room in ("callbacks", "datamodules", "sweeps")
        for p in (REPOSITORY / room).glob("*.yaml")
    )
    assert list_presets() == found
    assert {"callbacks/layer_lr.yaml", "datamodules/mnist5k.yaml", "sweeps/mnist5k.yaml"} <= set(found)
    for name in found:
        text = find_config(name).read_text()
        assert text.startswith("# "), f"{name} says on its first line what it is"
        assert isinstance(yaml.safe_load(text), dict)


def test_nearest_first_then_here_then_the_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "callbacks/layer_lr.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == REPOSITORY / name
    for folder in (tmp_path, tmp_path / "nearer"):
        (folder / "callbacks").mkdir(parents=True)
        (folder / name).write_text("here: true")
    assert find_config(name) == Path(name)
    assert find_config(name, tmp_path / "nearer") == tmp_path / "nearer" / name


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'callbacks/nothing.yaml' not found.*`ds-lightning presets` lists"):
        find_config("callbacks/nothing.yaml")


def test_the_command_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_presets()
    assert all(len(line.split()) > 3 for line in lines), "each says what it is"
    assert main(["presets", "callbacks/layer_lr.yaml"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "callbacks/layer_lr.yaml").read_text()


def test_the_wheel_carries_the_presets_and_works_elsewhere(tmp_path: Path) -> None:
    # The wheel unpacked beside nothing else: no checkout to fall back on.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    code = (
        "import ds_lightning, sys; from ds_lightning.cli import main; print(ds_lightning.__file__); main(['presets'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    where, *lines = done.stdout.splitlines()
    assert where.startswith(str(site))
    assert [line.split()[0] for line in lines] == list_presets()
    tops = {path.name for path in site.iterdir()}
    assert tops == {"ds_lightning", next(t for t in tops if t.endswith(".dist-info"))}, "nothing generic on top"
