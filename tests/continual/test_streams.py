"""Streams of requests against a simulation that anyone can follow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.continual.streams import Forget, Learn, TaskStream, parse_request
from aihwkit_lora.errors import ConfigurationError

UNITS = "abcdef"
requests = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.lists(st.sampled_from(UNITS), min_size=1, max_size=3)),
        st.tuples(st.just("forget"), st.lists(st.sampled_from(UNITS), min_size=1, max_size=1)),
    ),
    min_size=1,
    max_size=8,
)


def simulate(steps):
    """Serve requests with two lists; None where one of them makes no sense."""
    learnt, forgotten, names, phases = [], [], [], []
    for verb, units in steps:
        if verb == "learn":
            name = "+".join(units)
            if len(set(units)) < len(units) or set(units) & set(learnt + names) or name in names:
                return None
            learnt, names = learnt + units, [*names, name]
        else:
            if units[0] not in learnt or units[0] in forgotten:
                return None
            forgotten = forgotten + units
        kept = [unit for unit in learnt if unit not in forgotten]
        phases.append((learnt, forgotten, kept, units))
    return phases


@given(requests)
def test_a_stream_says_what_a_simulation_says(steps):
    lines = [f"{verb} {' '.join(units)}" for verb, units in steps]
    expected = simulate(steps)
    if expected is None:
        with pytest.raises(ConfigurationError):
            TaskStream.parse(lines)
        return
    phases = list(TaskStream.parse(lines))
    found = [
        (list(p.learnt_so_far), list(p.forgotten_so_far), list(p.kept), list(p.units))
        for p in phases
    ]
    assert found == expected
    assert [p.index for p in phases] == list(range(len(steps)))
    assert all(set(p.old) == set(p.kept) - set(p.units) for p in phases)
    assert [p.learns for p in phases] == [verb == "learn" for verb, _ in steps]
    assert len({p.request.adapter for p in phases}) == len(steps)


def test_forgetting_a_task_forgets_all_that_is_left_of_it():
    staff = Learn(name="staff", units=("0", "1", "2"))
    stream = TaskStream((staff, Forget(name="1"), Learn(name="3"), Forget(name="staff")))
    last = list(stream)[-1]
    assert last.units == ("0", "2")
    assert last.forgotten_so_far == ("1", "0", "2")
    assert last.kept == ("3",)


def test_requests_read_back_as_they_are_written():
    stream = TaskStream.parse(["learn 0 1", " ", "forget 1", "learn 2"])
    assert str(stream) == "learn 0+1 (0, 1); forget 1; learn 2"
    assert len(stream) == 3
    assert stream == TaskStream(stream.requests)
    assert [request.adapter for request in stream.requests] == ["learn-0+1", "forget-1", "learn-2"]
    assert parse_request(str(Learn(name="2"))) == Learn(name="2")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "at least one request, got none"),
        (["learn 1", "forgett 1"], r"line 2: expected .*, got 'forgett 1'. Did you mean 'forget'"),
        (["learn 1", "", "learn"], r"line 3: expected 'learn UNIT \.\.\.' or .*, got 'learn'\.$"),
        (["learn 1", "forget 1 2"], r"line 2: .* 'forget NAME', got 'forget 1 2'"),
        (["learn 1", "forget"], "line 2: .*got 'forget'"),
        (["forget 1"], r"request 1 \(forget 1\): expected something learnt before, got '1'"),
        (["learn anna", "forget ana"], r"got 'ana'\. Did you mean 'anna'"),
        (["learn 1", "forget 1", "forget 1"], r"request 3 .*still known, got '1'.*already"),
        (["learn 1", "forget 1", "learn 1"], r"request 3 .*not been learnt before, got 1"),
        (["learn 1 2", "learn 2 3"], r"request 2 .*not been learnt before, got 2"),
        (["learn 1 1"], r"learn 1\+1: expected each unit once, got 1, 1"),
        (["learn a.b"], r"learn a\.b: expected a name of letters, digits.*, got 'a\.b'"),
    ],
)
def test_what_makes_no_sense_is_refused(lines, message):
    with pytest.raises(ConfigurationError, match=message):
        TaskStream.parse(lines)


def test_a_name_has_to_be_text():
    with pytest.raises(ConfigurationError, match=r"forget 2: expected a name .*, got 2"):
        Forget(name=2)
