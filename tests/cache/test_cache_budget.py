"""The gain of another chunk, and a budget shared by gains, compared with every other way to share it."""

import itertools

import pytest
from cache_support import given
from hypothesis import strategies as st

from cache.config import SizingConfig
from cache.sizing import make_sizing
from cache.sizing.budget import Budget, SlotReport
from cache.sizing.budgeted import Budgeted
from cache.sizing.gain_curve import GainCurve, Step
from cache.sizing.miss_ratio_curve import MissRatioCurve


def curve(*steps: tuple[int, float]) -> GainCurve:
    return GainCurve(tuple(Step(*step) for step in steps))


def report(*steps: tuple[int, float], holds: int = 0) -> SlotReport:
    return SlotReport(curve(*steps), holds)


def gained(of: GainCurve, chunks: int) -> float:
    gains = [step.gain for step in of.steps for _ in range(step.chunks)]
    return sum(gains[:chunks])


falling = st.lists(st.tuples(st.integers(1, 3), st.floats(0.1, 9)), max_size=3).map(
    lambda steps: curve(*zip([n for n, _ in steps], sorted((gain for _, gain in steps), reverse=True), strict=True))
)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_the_steps_of_a_curve_bridge_its_dents() -> None:
    seen = MissRatioCurve(4, 4)
    for now_ms, number in enumerate([1, 1, 2, 3, 4, 2, 3, 4]):
        seen.look_up(now_ms * 500, [key(number)])
    # One hit of the first chunk, none of the second, three of the third; over 3.5 s.
    assert GainCurve.of(seen, 4) == curve((3, 4 / 3 / 3.5))
    assert GainCurve.of(seen, 0) == GainCurve.of(MissRatioCurve(4, 4), 4) == curve()


def test_the_knee_is_where_a_chunk_gains_less_than_its_price() -> None:
    falls = curve((2, 5.0), (3, 1.0), (4, 0.5))
    assert [falls.knee(price) for price in (6, 5, 1, 0.7, 0.5)] == [0, 2, 5, 5, 9]


@given(st.lists(falling, min_size=1, max_size=3), st.integers(0, 20), st.integers(0, 3), st.integers(0, 9))
def test_no_other_way_to_share_gains_more(curves: list[GainCurve], more: int, least: int, room: int) -> None:
    slots, greatest = len(curves), least + room
    budget = Budget(chunks=least * slots + more, slots=slots, least_chunks=least, greatest_chunks=greatest)
    shares = budget.share({slot: SlotReport(one, 0) for slot, one in enumerate(curves)})
    assert sum(shares.values()) <= budget.chunks
    assert all(least <= share <= greatest for share in shares.values())
    # No free budget is left.
    assert sum(shares.values()) == min(budget.chunks, slots * greatest)
    best = max(
        sum(gained(one, share) for one, share in zip(curves, other, strict=True))
        for other in itertools.product(range(least, greatest + 1), repeat=slots)
        if sum(other) <= budget.chunks
    )
    assert sum(gained(curves[slot], share) for slot, share in shares.items()) == pytest.approx(best)


@given(st.dictionaries(st.integers(0, 5), st.builds(SlotReport, falling, st.integers(0, 30)), min_size=1))
def test_nobody_grows_into_what_another_holds(reports: dict[int, SlotReport]) -> None:
    budget = Budget(chunks=40, slots=6, least_chunks=0, greatest_chunks=30)
    shares = budget.share(reports)
    assert shares == budget.share(dict(reversed(reports.items())))
    held = sum(report.capacity_chunks for report in reports.values())
    assert sum(max(shares[slot], reports[slot].capacity_chunks) for slot in reports) <= max(40, held)
    # After all slots have followed their grants, each has the chunks that gain the most.
    for _ in range(2):
        told = budget.share(reports)
        reports = {slot: SlotReport(report.curve, told[slot]) for slot, report in reports.items()}
    assert budget.share(reports) == budget._by_gain({slot: report.curve for slot, report in reports.items()})


def test_a_slot_that_has_not_shrunk_yet_keeps_the_others_from_its_room() -> None:
    budget = Budget(chunks=100, slots=2, least_chunks=10, greatest_chunks=100)
    idle, busy = report((10, 0.1), holds=50), report((200, 5.0), holds=50)
    assert budget.share({0: idle, 1: busy}) == {0: 10, 1: 50}
    assert budget.share({0: report((10, 0.1), holds=10), 1: busy}) == {0: 10, 1: 90}


def test_what_nobody_gains_by_is_spread_evenly() -> None:
    budget = Budget(chunks=91, slots=3, least_chunks=5, greatest_chunks=40)
    assert budget.share({slot: report() for slot in range(3)}) == {0: 30, 1: 30, 2: 31}
    assert budget.share({0: report((38, 1.0)), 1: report(), 2: report()}) == {0: 40, 1: 25, 2: 26}


def test_a_slot_that_is_silent_has_no_share() -> None:
    budget = Budget(chunks=90, slots=3, least_chunks=10, greatest_chunks=90)
    assert budget.share({1: report((100, 1.0))}) == {1: 90}
    assert budget.even_chunks == 30


class Granted:
    """Grants the number of chunks that a test sets."""

    def __init__(self, chunks: int) -> None:
        self.granted_chunks = chunks
        self.offered: list[SlotReport] = []

    def offer(self, report: SlotReport) -> None:
        self.offered.append(report)


def test_the_policy_tells_its_gains_and_follows_its_grant() -> None:
    shares = Granted(20)
    config = SizingConfig(strategy="MRC", budget_chunks=100, adjust_every_requests=3)
    policy = make_sizing(config, shares)
    assert isinstance(policy, Budgeted)
    assert policy.capacity_chunks == 20
    assert shares.offered == [report(holds=20)]
    for now_ms in (0, 1000):
        assert policy.observe(now_ms, [key(1), key(2)]) == 20
    assert len(shares.offered) == 1
    policy.observe(2000, [key(1), key(2)])
    # Two lookups out of three found both chunks, in 2 s.
    assert shares.offered[1:] == [report((2, 1.0), holds=20)]
    shares.granted_chunks = 7
    assert policy.observe(2500, []) == policy.capacity_chunks == 7
    assert shares.offered[2:] == [report((2, 1.0), holds=7)]


@pytest.mark.parametrize("strategy", ["STATIC", "FLUID", "FREQUENCY"])
def test_policies_without_a_curve_have_no_part_in_the_budget(strategy: str) -> None:
    shares = Granted(20)
    make_sizing(SizingConfig(strategy=strategy, budget_chunks=100), shares).observe(0, [key(1)])
    assert shares.offered == []
