from hypothesis import given
from hypothesis import strategies as st

from ds_lightning.tracking.undelivered import Undelivered

STEPS = st.lists(
    st.sampled_from(["add a", "add b", "pop first", "pop last", "send", "arrive", "come back"]), max_size=40
)


def test_metrics_of_a_reopened_run_are_seen():
    calls = Undelivered()
    calls.add({"run": "a", "rows": []})
    assert not calls.any_resumed()
    calls.add({"run": "a", "rows": [], "resumed": "x"})
    assert calls.any_resumed()
    calls.pop(1)
    assert not calls.any_resumed()


@given(STEPS)
def test_each_call_is_in_one_of_three_places(steps):
    """Beside three plain lists."""
    calls, here, going, there = Undelivered(), [], [], []
    for number, step in enumerate(steps):
        known = there + going + here
        if step.startswith("add"):
            call = {"run": step[-1], "rows": [0] * (number % 3)}
            calls.add(call)
            here.append(call)
        elif step.startswith("pop") and known:
            call = known[0 if step == "pop first" else -1]
            assert calls.pop(call["id"]) is call
            assert calls.pop(call["id"]) is None
            for place in (here, going, there):
                place[:] = [other for other in place if other is not call]
        elif step == "send" and not going:
            assert calls.send() == here
            here, going = [], here
        elif step == "arrive":
            calls.arrived(going)
            there, going = there + going, []
        elif step == "come back":
            calls.come_back()
            here, going, there = there + going + here, [], []
        known = there + going + here
        assert calls.of(None) == known
        assert calls.of("a") == [call for call in known if call["run"] == "a"]
        assert calls.rows == sum(len(call["rows"]) for call in known)
        assert calls.any_sent(None) == bool(there + going)
        assert calls.any_sent("b") == any(call["run"] == "b" for call in there + going)
        for upto in range(calls.next + 1):
            assert calls.all_arrived(upto) == (not any(call["id"] < upto for call in going + here))
