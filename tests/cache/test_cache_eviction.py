"""One contract for every eviction policy, and the order that is LRU's own."""

import pytest
from cache_support import given
from hypothesis import strategies as st

from cache.eviction import LRU, make_eviction
from core.config import Eviction

events = st.lists(st.tuples(st.sampled_from(["use", "remove"]), st.integers(0, 9)), max_size=60)


def key(number: int) -> bytes:
    return bytes([number]) * 32


@pytest.mark.parametrize("name", Eviction)
class TestContract:
    @given(events=events)
    def test_victims_are_exactly_the_keys_that_are_in(self, name, events):
        policy, inside = make_eviction(name), set()
        for event, number in events:
            if event == "use" and number in inside:
                policy.on_access(key(number))
            elif event == "use":
                policy.on_insert(key(number))
                inside.add(number)
            elif number in inside:
                policy.on_remove(key(number))
                inside.remove(number)
            victims = list(policy.victims())
            assert sorted(victims) == sorted(map(key, inside))
            assert list(policy.victims()) == victims, "asking for victims changed their order"

    def test_policies_do_not_share_state(self, name):
        make_eviction(name).on_insert(key(1))
        assert list(make_eviction(name).victims()) == []


@given(events)
def test_lru_orders_by_last_use(events):
    policy, order = LRU(), []
    for event, number in events:
        if event == "use":
            (policy.on_access if number in order else policy.on_insert)(key(number))
            order = [n for n in order if n != number] + [number]
        elif number in order:
            policy.on_remove(key(number))
            order.remove(number)
    assert list(policy.victims()) == [key(n) for n in order]
