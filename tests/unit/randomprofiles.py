"""Profiles that nobody would record: spans that overlap or run backwards, unknown ids, no order."""

from __future__ import annotations

from hypothesis import strategies as st
from profiles import profile_of

from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import (
    Category,
    Cause,
    Compute,
    Gauge,
    Link,
    Memory,
    Meter,
    Phase,
    Record,
    Step,
    Tier,
    Transfer,
    Use,
    Wait,
)

LAST = 60
"""No time lies beyond it."""

times = st.integers(0, LAST)
unknown_times = st.integers(-1, LAST)
ids = st.integers(-1, 5)


def records() -> st.SearchStrategy[Record]:
    """Any one record."""
    sizes = st.integers(0, 1000)
    return st.one_of(
        st.builds(Step, id=ids, phase=ids, start=times, end=times, tokens=ids),
        st.builds(
            Compute,
            module=ids,
            phase=st.sampled_from(Phase),
            start=times,
            end=times,
            lane=st.integers(0, 1),
            launched=unknown_times,
            depth=st.integers(0, 3),
        ),
        st.builds(
            Transfer,
            id=ids,
            block=ids,
            link=st.sampled_from(Link),
            nbytes=sizes,
            cause=st.sampled_from(Cause),
            issued=times,
            start=times,
            end=times,
            failed=st.integers(0, 1),
        ),
        st.builds(Wait, block=ids, needed=times, ready=times, module=ids),
        st.builds(Use, block=ids, at=times, ready=unknown_times, issued=unknown_times, module=ids),
        st.builds(
            Memory,
            at=times,
            tier=st.sampled_from(Tier),
            category=st.sampled_from(Category),
            nbytes=st.integers(-500, 1000),
            module=ids,
            storage=ids,
        ),
        st.builds(Gauge, at=times, meter=st.sampled_from(Meter), value=sizes),
    )


def profiles() -> st.SearchStrategy[Profile]:
    """Up to some thirty records."""
    return st.lists(records(), max_size=30).map(profile_of)


windows = st.tuples(times, times).map(lambda pair: (min(pair), max(pair)))
