"""Each registered eviction policy under the contract, then the behaviour of each policy."""

import random

import pytest
from cache_support import SHAPE, given
from eviction_contract import check_order_in_a_prompt, content, key, keys, machine
from hypothesis import strategies as st

from cache.eviction import EvictionPolicy, make_eviction
from cache.eviction.arc import ARC
from cache.eviction.density import HitDensity
from cache.eviction.fifo import FIFO
from cache.eviction.leader import FollowTheLeader
from cache.eviction.lfu import LFU
from cache.eviction.lru import LRU
from cache.eviction.mq import MQ
from cache.eviction.reuse_ages import AGES, CLASSES, EDGES, AgeTable, age_of, class_of_new, class_of_used
from cache.local import LocalTier
from cache.registry import EVICTION

globals().update({f"TestContract{name}": machine(name) for name in EVICTION})


@pytest.mark.parametrize("name", list(EVICTION))
class TestInATier:
    def test_policies_do_not_share_state(self, name):
        make_eviction(name).on_insert(key(1))
        assert list(make_eviction(name).victims()) == []

    @given(length=st.integers(1, 8), capacity=st.integers(1, 8), times=st.integers(1, 3))
    def test_a_prompts_last_chunks_leave_before_its_first(self, name, length, capacity, times):
        check_order_in_a_prompt(name, length, capacity, times)


@pytest.mark.parametrize("name", ["LRU", "LFU", "ARC", "MQ", "DENSITY", "LEADER"])
@given(first=st.integers(1, 4), length=st.integers(5, 8))
def test_a_longer_turn_comes_in_behind_the_one_before(name, first, length):
    """If a conversation has continued once, its newest chunks leave first; with FIFO its oldest."""
    tier = LocalTier(length, SHAPE.size_bytes, make_eviction(name))
    for end in (first, length):
        prompt = keys(*range(end))
        tier.request(prompt)
        for number in range(end):
            if key(number) not in tier:
                assert tier.put(key(number), content(number))
        tier.arrange(prompt)
    tier.resize(first)
    assert set(tier) == set(keys(*range(first)))


events = st.lists(st.tuples(st.sampled_from(["use", "remove"]), st.integers(0, 9)), max_size=60)


def played(policy: EvictionPolicy, happened, on_use) -> list[bytes]:
    """Apply `happened` to `policy`, one block at a time, and call `on_use(number, is_new)` for each use."""
    policy.on_resize(10)
    inside: set[int] = set()
    for event, number in happened:
        if event == "use":
            policy.on_request(keys(number))
            if number not in inside:
                policy.on_insert(key(number))
            on_use(number, number not in inside)
            inside.add(number)
        elif number in inside:
            policy.on_remove(key(number))
            inside.remove(number)
    return [one for one in policy.victims() if one in set(keys(*inside))]


@given(events)
def test_lru_orders_by_last_use(events):
    order: list[int] = []

    def use(number, _):
        order[:] = [n for n in order if n != number] + [number]

    assert played(LRU(), events, use) == [one for one in keys(*order) if one in set(inside_after(events))]


def inside_after(happened) -> list[bytes]:
    inside: set[int] = set()
    for event, number in happened:
        (inside.add if event == "use" else inside.discard)(number)
    return keys(*inside)


@given(events)
def test_fifo_orders_by_arrival(events):
    order: list[int] = []

    def use(number, is_new):
        if is_new:
            order[:] = [n for n in order if n != number] + [number]

    assert played(FIFO(), events, use) == [one for one in keys(*order) if one in set(inside_after(events))]


@given(st.lists(st.integers(0, 9), max_size=60))
def test_lfu_orders_by_uses_and_then_by_who_reached_them_first(numbers):
    uses: dict[int, tuple[int, int]] = {}

    def use(number, _):
        uses[number] = (uses.get(number, (0, 0))[0] + 1, len(uses) + sum(count for count, _ in uses.values()))

    victims = played(LFU(), [("use", number) for number in numbers], use)
    assert victims == keys(*sorted(uses, key=uses.get))


def use_each(policy: EvictionPolicy, numbers, capacity: int) -> list[int]:
    """Send one block after the other through a tier; return which of them were hits."""
    policy.on_resize(capacity)
    inside: set[bytes] = set()
    hits = []
    for number in numbers:
        policy.on_request(keys(number))
        if key(number) in inside:
            hits.append(number)
            continue
        if len(inside) >= capacity:
            if not policy.admits(key(number)):
                continue
            victim = next(policy.victims())
            policy.on_remove(victim)
            inside.remove(victim)
        policy.on_insert(key(number))
        inside.add(key(number))
    return hits


def test_arc_keeps_what_was_used_twice_through_a_scan():
    numbers = [1, 2, 1, 2, *range(10, 40), 1, 2]
    assert use_each(ARC(), numbers, 4)[2:] == [1, 2]
    assert use_each(LRU(), numbers, 4)[2:] == []


def test_arc_learns_from_ghosts_which_list_to_favour():
    policy = ARC()
    use_each(policy, [1, 2, 1, 2, 3, 4, 5, 6, 3], 4)
    assert policy._p > 0, "3 came back from those that were used once: their list should have had more room"


def test_mq_keeps_frequent_blocks_and_remembers_uses_of_those_that_left():
    often = [1, 2] * 4
    assert use_each(MQ(), [*often, *range(10, 16), 1, 2], 4)[-2:] == [1, 2]
    policy = MQ()
    use_each(policy, [*often, *range(10, 12)], 1)
    assert policy._uses[key(1)] == 4


def test_mq_lets_what_was_once_frequent_sink():
    policy = MQ()
    use_each(policy, [1, 1, 1, 1, *range(10, 60)], 4)
    assert policy._queue_of.get(key(1), -1) < 2


class TestHitDensity:
    @staticmethod
    def conversations(rounds: int, once: int, begin: int = 1000):
        """In each round 3 conversations of 4 blocks return, and `once` prompts of 4 blocks come only once."""
        fresh = iter(range(begin, 10**9))
        for _ in range(rounds):
            for conversation in range(3):
                yield [100 * conversation + n for n in range(4)]
                for _ in range(once // 3):
                    yield [next(fresh) for _ in range(4)]

    @staticmethod
    def prefix_hits(policy: EvictionPolicy, prompts, capacity: int, after_each=lambda: None) -> int:
        tier = LocalTier(capacity, SHAPE.size_bytes, policy)
        nothing = content(0)
        hits = 0
        for prompt in prompts:
            wanted = keys(*prompt)
            tier.request(wanted)
            for one in wanted:
                if one not in tier:
                    break
                hits += 1
            for one in wanted:
                if one not in tier:
                    tier.put(one, nothing)
            tier.arrange([one for one in wanted if one in tier])
            after_each()
        return hits

    def test_what_returns_stays_where_lru_loses_all_of_it(self):
        load = list(self.conversations(rounds=60, once=30))
        reusable = 60 * 12 - 12
        assert self.prefix_hits(LRU(), load, 24) == 0
        assert self.prefix_hits(HitDensity(), load, 24) > 0.5 * reusable

    def test_newcomers_that_promise_less_than_all_that_is_there_are_refused(self):
        policy = HitDensity()
        self.prefix_hits(policy, self.conversations(rounds=60, once=30), 12)
        policy.on_request(keys(*range(10**6, 10**6 + 4)))
        assert not any(policy.admits(key(10**6 + place)) for place in range(4))

    def test_a_change_of_the_load_is_learned(self):
        policy = HitDensity()
        self.prefix_hits(policy, self.conversations(rounds=60, once=30), 24)
        others = [[n + 500 for n in prompt] for prompt in self.conversations(60, 30, begin=10**6)]
        tier_hits = self.prefix_hits(policy_after(policy), others, 24)
        assert tier_hits > 0.25 * (60 * 12 - 12)


class MostRecent(LRU):
    """Evicts the most recently used key first, which is best for cyclic reads."""

    def victims(self):
        return reversed(self._oldest_first)


class TestFollowTheLeader:
    def test_it_follows_what_hits_more(self):
        load = list(TestHitDensity.conversations(rounds=60, once=30))
        policy = make_eviction("LEADER")
        hits = TestHitDensity.prefix_hits(policy, load, 24)
        assert isinstance(policy.leader, HitDensity)
        assert hits > 0.8 * TestHitDensity.prefix_hits(HitDensity(), load, 24)

    def test_it_changes_with_the_load_and_back(self):
        """A cycle of 30 blocks through 24 chunks, where LRU has no hits; then a moving window; then the cycle again."""
        circle = [[place % 30] for place in range(900)]
        window = [[1000 + place + back] for place in range(900) for back in (3, 2, 1, 0)]
        policy = FollowTheLeader(LRU(), MostRecent())
        leaders = []
        TestHitDensity.prefix_hits(policy, [*circle, *window, *circle], 24, lambda: leaders.append(type(policy.leader)))
        assert leaders[0] is LRU
        assert leaders[len(circle) - 1] is MostRecent
        assert leaders[len(circle) + len(window) - 1] is LRU

    def test_two_that_are_as_good_do_not_change_places(self):
        """Random single blocks, for which no policy is better than another."""
        draw = random.Random(3)
        policy = FollowTheLeader(LRU(), FIFO())
        leaders = set()
        load = [[draw.randrange(60)] for _ in range(3000)]
        TestHitDensity.prefix_hits(policy, load, 24, lambda: leaders.add(type(policy.leader)))
        assert leaders == {LRU}


def policy_after(policy: HitDensity) -> HitDensity:
    """A policy with the knowledge of `policy`, for an empty tier."""
    fresh = HitDensity()
    fresh._ages = policy._ages
    return fresh


class TestReuseAges:
    @given(st.integers(0, 1 << 40))
    def test_an_age_is_within_its_bin(self, age):
        place = age_of(age)
        assert EDGES[place] <= age
        assert place == AGES - 1 or age < EDGES[place + 1]

    def test_classes_are_told_apart_and_in_range(self):
        new = {class_of_new(chunks, before) for chunks in (1, 4, 16, 64, 1000) for before in (0, 1, 50)}
        used = {class_of_used(uses) for uses in (2, 3, 5, 10, 1000)}
        assert not new & used
        assert new | used <= set(range(CLASSES))

    def test_density_is_uses_by_time_for_the_best_stay(self):
        """All of 100 keys are used again at an age in bin 6 and none earlier, so density grows up to that bin."""
        table = AgeTable()
        for _ in range(100):
            table.reused(0, 6)
        table.learn([])
        density = table.density[0]
        assert all(density[age] < density[age + 1] for age in range(6))
        # Kept to the end of bin 6; on average a key leaves in its middle.
        expected = (100 / 101) / (EDGES[6] + (EDGES[7] - EDGES[6]) * (1 - 100 / 101 / 2))
        assert density[0] == pytest.approx(expected, rel=0.03)

    def test_what_is_never_used_again_is_worth_less_the_longer_it_waits(self):
        table = AgeTable()
        for _ in range(50):
            table.reused(1, 3)
        table.learn((1, 10) for _ in range(50))
        assert table.density[1][0] > table.density[1][8]

    def test_a_class_that_was_never_seen_is_taken_for_the_one_below(self):
        table = AgeTable()
        for _ in range(500):
            table.reused(0, 4)
        table.learn((0, 8) for _ in range(500))
        assert table.density[1] == pytest.approx(table.density[0], rel=0.15)
