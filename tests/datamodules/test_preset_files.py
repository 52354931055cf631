from pathlib import Path

import jsonargparse
import lightning.pytorch as L
import pytest

PRESETS = Path(__file__).parents[2] / "datamodules"


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_preset_builds_its_class(path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    config = parser.parse_path(path)
    data = parser.instantiate(config).data
    table = (PRESETS / "README.md").read_text()
    row = next(line for line in table.splitlines() if f"`{path.name}`" in line)
    assert f"`{type(data).__name__}`" in row
    assert f"`{config.data.class_path}`" in row
    assert path.read_text().startswith("# ")
