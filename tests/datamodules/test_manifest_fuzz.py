"""A part of what benchmarks/manifest_fuzz.py tries: each broken manifest is a clear error, a counted skip or loads."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from broken_manifests import KINDS, SUFFIXES, Breaker, Broken, judge


@pytest.fixture(scope="module")
def breaker(tmp_path_factory):
    return Breaker(tmp_path_factory.mktemp("broken"), seed=1)


def test_each_broken_manifest_is_a_clear_error_a_counted_skip_or_loads(breaker):
    outcomes: Counter[str] = Counter()
    tried = set()
    wrong = []
    for number in range(2 * len(KINDS) * len(SUFFIXES)):
        broken = breaker.manifest(number)
        tried.add((broken.kinds[0], broken.path.suffix))
        verdict = judge(broken, breaker.good, ("raise", "skip")[number // 24])
        outcomes[verdict.outcome] += 1
        if verdict.outcome == "wrong":
            wrong.append((number, broken.kinds, verdict.message))
    assert not wrong
    assert len(tried) == len(KINDS) * len(SUFFIXES)
    assert min(outcomes["error"], outcomes["skipped"], outcomes["clean"]) > 0


def test_the_judge_sees_what_goes_unnoticed(breaker):
    path = breaker.folder / "fine.jsonl"
    path.write_bytes(breaker.good.read_bytes())
    fine = {"path": path, "kinds": [], "rows": 4}
    assert judge(Broken(**fine), breaker.good, "skip").outcome == "clean"
    for claim, message in (
        ({"must": {2}}, "lines [2] can't be used, and are"),
        ({"refused": True}, "a column is missing"),
        ({"rows": 5}, "4 samples come from 5 rows"),
        ({"strange": True}, "without a warning"),
    ):
        verdict = judge(Broken(**{**fine, **claim}), breaker.good, "skip")
        assert verdict.outcome == "wrong"
        assert message in verdict.message
    # A row that is broken, and of which nothing is known: it should not have been left out.
    path.write_text(path.read_text().replace('"photo": "a', '"photo": "b', 1))
    found = judge(Broken(**fine), breaker.good, "skip")
    assert (found.outcome, found.skipped) == ("wrong", 1)
    assert "lines [1] are skipped, and nothing is wrong with them" in found.message
