import pytest

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps.spec import Objective, SweepSpec

TWO = [{"metric": "a", "direction": "minimize"}, {"metric": "b", "direction": "maximize"}]


def test_defaults(content):
    spec = SweepSpec.from_dict(content, name="file-stem")
    assert (spec.name, spec.experiment) == ("file-stem", "file-stem")
    assert spec.objectives == (Objective("val/loss", "minimize", "last", "global_step"),)
    assert (spec.trials, spec.timeout, spec.storage, spec.prunes) == (None, None, None, False)
    content["name"] = "named"
    assert SweepSpec.from_dict(content, name="file-stem").experiment == "named"


def test_from_yaml_reads_numbers_as_the_training_configuration_does(tmp_path):
    file = tmp_path / "rates.yaml"
    file.write_text(
        "base: {config: a.yaml, overrides: {model.lr: 1e-3}}\n"
        "space: {model.x: {type: float, low: 1e-4, high: 1e0, log: true}}\n"
        "objective: {metric: val/loss, direction: minimize}\n"
        "pruner: median\ntrials: 3\ntimeout: 60\n"
    )
    spec = SweepSpec.from_yaml(file)
    assert spec.name == "rates"
    assert spec.folder == tmp_path
    assert spec.configs == ("a.yaml",)
    assert spec.overrides == {"model.lr": 0.001}
    assert spec.space.dimensions["model.x"].arguments == {"low": 1e-4, "high": 1.0, "log": True}
    assert spec.pruner == {"name": "median"}
    assert (spec.trials, spec.timeout) == (3, 60.0)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("trials: 3\ntrials: 4\n", "key 'trials' is there twice"),
        ("a: [1, 2", "is no YAML"),
        ("- 1", "sweep file '.*': it holds a list; expected keys such as `base:`"),
        ("", "it holds nothing"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, error):
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=error) as caught:
        SweepSpec.from_yaml(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml' can't be read: No such file"):
        SweepSpec.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"smapler": "tpe"}, "unknown key 'smapler'; did you mean 'sampler'"),
        ({"base": {"configs": []}}, "base: unknown key 'configs'; did you mean 'config'"),
        ({"base": {"config": [3]}}, "config must be a file or a list of files"),
        ({"base": {"overrides": {"model.x": 1}}}, "model.x is both in base.overrides and in the space"),
        ({"objective": []}, "objective is empty"),
        ({"objective": {"metric": "a"}}, "direction must be minimize or maximize, got None"),
        ({"objective": {"metric": "a", "direction": "min"}}, "direction must be .* got 'min'"),
        ({"objective": {"direction": "minimize"}}, "metric must be the name of a logged metric, got None"),
        ({"objective": {**TWO[0], "value": "mean"}}, "value must be last or best, got 'mean'"),
        ({"objective": {**TWO[0], "step": "epoch"}}, "step must be global_step or validation"),
        ({"objective": TWO, "pruner": {"name": "median"}}, "pruner 'median' can't work with 2 objectives"),
        ({"objective": [{**TWO[0], "value": "best"}, TWO[1]]}, "value `best` works with one objective only"),
        ({"objective": [TWO[0], TWO[0]]}, "metric 'a' is there twice"),
        ({"sampler": {"seed": 3}}, "sampler: `name` is missing"),
        ({"trials": 0}, "trials must be an integer of at least 1, got 0"),
        ({"trials": True}, "trials must be an integer of at least 1, got True"),
        ({"timeout": -1}, "timeout must be a number of seconds above 0, got -1"),
        ({"name": "a/b"}, "it names files"),
        ({"storage": 3}, "storage must be text, got 3"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must be a number of seconds >= 0, or null for never, got -1"),
        ({"checkpoint_seconds": "60"}, "checkpoint_seconds must be a number of seconds >= 0, .* got '60'"),
        ({"checkpoint_seconds": True}, "checkpoint_seconds must be .* got True"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds must be .* got nan"),
        ({"keep_checkpoints": "yes"}, "keep_checkpoints must be true or false, got 'yes'"),
        ({"keep_checkpoints": 1}, "keep_checkpoints must be true or false, got 1"),
    ],
)
def test_a_wrong_file_is_one_clear_line(content, changes, error):
    with pytest.raises(ConfigError, match=error) as caught:
        SweepSpec.from_dict({**content, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["base", "space", "objective"])
def test_what_can_not_be_left_out(content, key):
    del content[key]
    with pytest.raises(ConfigError, match=f"`{key}` is missing"):
        SweepSpec.from_dict(content)


def test_retries_are_counted_from_zero(content):
    assert SweepSpec.from_dict(content).max_retries == 2
    assert SweepSpec.from_dict({**content, "max_retries": 0}).max_retries == 0
    with pytest.raises(ConfigError, match="max_retries must be an integer of at least 0, got -1"):
        SweepSpec.from_dict({**content, "max_retries": -1})


@pytest.mark.parametrize("seconds", [None, 0, 2.5])
def test_how_often_trials_are_saved(content, seconds):
    assert SweepSpec.from_dict(content).checkpoint_seconds == 60
    assert SweepSpec.from_dict({**content, "checkpoint_seconds": seconds}).checkpoint_seconds == seconds
    assert SweepSpec.from_dict(content).keep_checkpoints is False
    assert SweepSpec.from_dict({**content, "keep_checkpoints": True}).keep_checkpoints is True
