import optuna
import pytest

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps import SearchSpace, Sweep
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.study import PRUNERS, SAMPLERS, create_study, make_pruner, make_sampler, open_storage

SPACE = SearchSpace.from_dict(
    {"x": {"type": "float", "low": 0, "high": 1, "step": 0.5}, "n": {"type": "int", "low": 0, "high": 1}}
)
REQUIRED = {"percentile": {"percentile": 25.0}, "threshold": {"upper": 3.0}}


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"cmaes"}))
def test_samplers_suggest(name):
    study = optuna.create_study(sampler=make_sampler({"name": name, "seed": 0}, SPACE))
    points = [SPACE.suggest(study.ask()) for _ in range(3)]
    assert all(set(point) == {"x", "n"} for point in points)


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_pruners_are_made_with_their_arguments(name):
    assert type(make_pruner({"name": name, **REQUIRED.get(name, {})})) is PRUNERS[name]


def test_a_seed_moves_on_with_the_trials_that_are_there():
    def draw(told):
        study = optuna.create_study(sampler=make_sampler({"name": "random", "seed": 7}, SPACE, told))
        return study.ask().suggest_float("z", 0, 1)

    assert draw(0) == draw(0)
    assert draw(0) != draw(3)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"name": "tpee"}, "sampler: unknown name 'tpee'; did you mean 'tpe'"),
        ({"name": "tpe", "sed": 1}, "sampler tpe: unknown key 'sed'; did you mean 'seed'"),
        ({"name": "tpe", "n_startup_trials": "x"}, "sampler tpe: n_startup_trials must be int, got 'x'"),
        ({"name": "tpe", "n_ei_candidates": True}, "sampler tpe: n_ei_candidates must be int, got True"),
        ({"name": "tpe", "gamma": 3}, "sampler tpe: gamma can't be given in a sweep file"),
        ({"name": "nsga2", "population_size": 1}, "sampler nsga2: .*population_size"),
        ({"name": "grid", "search_space": {}}, "sampler grid: unknown key 'search_space'"),
    ],
)
def test_a_wrong_sampler_is_refused_with_the_file(content, entry, error):
    content["sampler"] = entry
    if entry["name"] == "grid":
        content["space"] = {"n": {"type": "int", "low": 0, "high": 1}}
    with pytest.raises(ConfigError, match=error):
        Sweep(SweepSpec.from_dict(content))


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"name": "medium"}, "pruner: unknown name 'medium'; did you mean 'median'"),
        ({"name": "median", "warmup": 1}, "pruner median: unknown key 'warmup'"),
        ({"name": "hyperband", "reduction_factor": 0}, "pruner hyperband: .*`reduction_factor` is 0"),
        ({"name": "hyperband", "max_resource": 2.5}, "pruner hyperband: max_resource must be str or int, got 2.5"),
        ({"name": "percentile"}, "pruner percentile: .*percentile"),
        ({"name": "median", "n_startup_trials": -1}, "pruner median: .*cannot be negative"),
    ],
)
def test_a_wrong_pruner_is_refused(entry, error):
    with pytest.raises(ConfigError, match=error):
        make_pruner(entry)


@pytest.mark.parametrize("place", ["{}/deep/study.journal", "sqlite:///{}/deep/study.db"])
def test_storages_make_their_folder_and_keep_the_study(tmp_path, place):
    place = place.format(tmp_path)
    made = create_study(open_storage(place), "s", ["minimize"], optuna.samplers.RandomSampler(), None)
    made.tell(made.ask(), 3.0)
    assert optuna.load_study(study_name="s", storage=open_storage(place)).best_value == 3.0


def test_a_name_that_is_taken_gets_a_number():
    storage = optuna.storages.InMemoryStorage()
    names = [create_study(storage, "s", ["minimize"], None, None).study_name for _ in range(3)]
    assert names == ["s", "s-2", "s-3"]


def test_a_wrong_storage_is_one_line_without_its_password():
    with pytest.raises(ConfigError, match=r"storage '\w+://db/x'") as caught:
        open_storage("postgresql://me:secret@db/x")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("installed", "given", "opened"),
    [
        ({"psycopg2", "psycopg"}, "postgresql://me@db/x", "postgresql+psycopg2://me@db/x"),
        ({"psycopg"}, "postgresql://me@db/x", "postgresql+psycopg://me@db/x"),
        (set(), "postgresql://me@db/x", "postgresql://me@db/x"),
        ({"psycopg2", "psycopg"}, "postgresql+psycopg://me@db/x", "postgresql+psycopg://me@db/x"),
        ({"psycopg2"}, "mysql://me@db/postgresql", "mysql://me@db/postgresql"),
    ],
)
def test_postgresql_is_opened_with_the_driver_that_is_installed(monkeypatch, installed, given, opened):
    urls = []
    monkeypatch.setattr("ds_lightning.sweeps.study.find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr("ds_lightning.sweeps.study.RDBStorage", lambda url, engine_kwargs: urls.append(url))
    open_storage(given)
    assert urls == [opened]


def test_a_driver_that_is_missing_is_named(monkeypatch):
    def missing(url, engine_kwargs):
        raise ModuleNotFoundError("No module named 'psycopg2'")

    monkeypatch.setattr("ds_lightning.sweeps.study.RDBStorage", missing)
    with pytest.raises(ConfigError, match=r"needs a driver: No module named 'psycopg2'; .*install psycopg2-binary"):
        open_storage("postgresql://me:secret@db/x")
