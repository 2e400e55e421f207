import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from workloads.pacing import Backlog, OpenLoop


class Waits:
    """A wait that advances the clock, as sleeping would. `early` ends it halfway, as a timer may."""

    def __init__(self, clock: ManualClock, *, early: bool = False) -> None:
        self.clock = clock
        self.early = early
        self.stopped = False

    def __call__(self, wait_ms: float) -> bool:
        if not self.stopped:
            self.clock.advance(wait_ms / 2 if self.early and wait_ms > 1 else wait_ms)
        return self.stopped


def open_loop(start_ms: float = 1000.0, *, early: bool = False) -> tuple[OpenLoop, ManualClock, Waits]:
    clock = ManualClock(start_ms)
    wait = Waits(clock, early=early)
    pace = OpenLoop(clock, wait)
    pace.begin()
    return pace, clock, wait


@pytest.mark.parametrize("early", [False, True])
def test_waits_until_each_is_due(early: bool) -> None:
    pace, clock, _ = open_loop(early=early)
    for at_ms in (0.0, 10.0, 10.0, 250.0):
        assert pace.due(at_ms) == 1000.0 + at_ms
        assert clock.monotonic_ms() == pytest.approx(1000.0 + at_ms)
    assert (pace.lag.sends, pace.lag.late) == (4, 0)
    assert pace.lag.max_ms == pytest.approx(0.0)


def test_a_slow_send_delays_nothing_but_itself_and_creation_times_stay_on_schedule() -> None:
    pace, clock, _ = open_loop()
    created = []
    for index, send_takes_ms in enumerate((0.0, 250.0, 0.0, 0.0, 0.0)):
        created.append(pace.due(100.0 * index))
        clock.advance(send_takes_ms)
    assert created == [1000.0, 1100.0, 1200.0, 1300.0, 1400.0]
    # The third and fourth were due at 1200 and 1300, and left at 1350 when the second let go.
    assert (pace.lag.late, pace.lag.max_ms, pace.lag.total_ms) == (2, 150.0, 200.0)
    assert pace.lag.mean_ms == 40.0
    assert clock.monotonic_ms() == 1400.0


@given(
    gaps=st.lists(st.floats(min_value=0, max_value=1e4), max_size=30),
    delays=st.lists(st.floats(min_value=0, max_value=1e4), min_size=30, max_size=30),
)
def test_creation_times_never_depend_on_the_system_under_test(gaps: list[float], delays: list[float]) -> None:
    pace, clock, _ = open_loop(1.7e12)
    at_ms = 0.0
    for gap, delay in zip(gaps, delays, strict=False):
        at_ms += gap
        assert pace.due(at_ms) == 1.7e12 + at_ms
        assert clock.monotonic_ms() >= 1.7e12 + at_ms
        clock.advance(delay)
    assert pace.lag.sends == len(gaps)
    assert 0 <= pace.lag.mean_ms <= pace.lag.max_ms


def test_a_stop_ends_the_wait_and_holds_for_what_is_due_already() -> None:
    pace, clock, wait = open_loop()
    wait.stopped = True
    assert pace.due(50.0) is None
    clock.advance(100.0)
    assert pace.due(50.0) is None
    assert pace.lag.sends == 0


def test_a_backlog_waits_for_nothing_and_creates_when_it_sends() -> None:
    clock = ManualClock(5.0)
    wait = Waits(clock)
    pace = Backlog(clock, wait)
    pace.begin()
    assert pace.due(1e9) == 5.0
    clock.advance(3.0)
    assert pace.due(2e9) == 8.0
    assert pace.lag.mean_ms == 0.0
    wait.stopped = True
    assert pace.due(0.0) is None
