"""A process with a share of a budget and no model: `python -m tests.operators.budget_slot URL SLOT GAIN`.

It prints its grant whenever that changes, and follows it at once.
"""

import sys
import time

from cache.sizing.budget import Budget, SlotReport
from cache.sizing.gain_curve import GainCurve, Step
from core.clock import SystemClock
from operators.shared_state.chunk_budget import BudgetShare, SharedReports

BUDGET = Budget(chunks=300, slots=3, least_chunks=20, greatest_chunks=250)


def report(gain: float, holds: int) -> SlotReport:
    """The report of a slot that gains from up to 200 chunks."""
    return SlotReport(GainCurve((Step(200, gain),)), holds)


def shared_reports(url: str, name: str = "budget") -> SharedReports:
    return SharedReports(url, name, BUDGET.slots)


def main(url: str, slot: int, gain: float) -> None:
    share, held = BudgetShare(BUDGET, slot, shared_reports(url), SystemClock()), BUDGET.even_chunks
    while True:
        share.offer(report(gain, held))
        if share.granted_chunks != held:
            held = share.granted_chunks
            print(held, flush=True)  # noqa: T201
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
