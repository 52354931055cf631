"""A part of the corpus of benchmarks/bad_inputs, in this process; `reliability.py corpus` runs all of it."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bad_inputs import Place, corpus

# One of so many: a case costs up to a second. The whole corpus has the figure in docs/errors.md.
STRIDE = {"configs": 29, "sweeps": 21, "checkpoints": 7, "images": 4}
ALWAYS = ("checkpoints/fit two optimizers", "checkpoints/fit malicious", "sweeps/space out of the module's range")


def test_the_corpus_has_two_hundred_different_bad_inputs() -> None:
    cases = corpus()
    counts = Counter(case.door for case in cases if not case.fine)
    assert len({case.name for case in cases}) == len(cases)
    assert sum(counts.values()) >= 200
    assert [case.name for case in corpus(1)] != [case.name for case in cases], "cuts depend on the seed"


def test_each_bad_input_is_one_line_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Place(tmp_path, study=False)
    tried: Counter[str] = Counter()
    wrong = []
    everything = corpus()
    chosen = [case for case in everything if case.name in ALWAYS]
    for door, stride in STRIDE.items():
        chosen += [case for case in everything if case.door == door and case.name not in ALWAYS][::stride]
    for case in chosen:
        outcome = place.run(case)
        tried[case.door] += 1
        if outcome.wrong:
            wrong.append((case.name, outcome.wrong, outcome.message))
    assert not wrong, "\n".join(map(str, wrong))
    assert tried.keys() == STRIDE.keys()
    assert tried.total() >= 40
