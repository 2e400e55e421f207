from cache.breaker import CircuitBreaker
from core.clock import ManualClock


def opened(clock):
    breaker = CircuitBreaker(3, 100.0, clock)
    assert [breaker.failure() for _ in range(3)] == [False, False, True]
    return breaker


def test_opens_after_failures_in_a_row_only():
    breaker = CircuitBreaker(2, 100.0, ManualClock())
    for _ in range(5):
        assert not breaker.failure()
        breaker.success()
        assert breaker.try_acquire()
    breaker.failure()
    assert breaker.failure()
    assert breaker.is_open
    assert not breaker.try_acquire()


def test_half_open_lets_one_probe_through_and_its_success_closes():
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(99.9)
    assert not breaker.try_acquire()
    clock.advance(0.2)
    assert not breaker.is_open
    assert breaker.try_acquire()
    assert not breaker.try_acquire()
    assert breaker.is_open
    breaker.success()
    assert breaker.try_acquire()
    assert breaker.try_acquire()


def test_a_failed_probe_opens_again_at_once():
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(100)
    assert breaker.try_acquire()
    assert breaker.failure()
    clock.advance(99)
    assert not breaker.try_acquire()
    clock.advance(1)
    assert breaker.try_acquire()


def test_a_retired_breaker_stays_open_whatever_is_told():
    clock = ManualClock()
    breaker = CircuitBreaker(1, 100.0, clock)
    breaker.retire()
    breaker.success()
    clock.advance(1000)
    assert breaker.is_open
    assert not breaker.try_acquire()
