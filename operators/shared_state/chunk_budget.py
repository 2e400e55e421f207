"""Divides one budget of chunks among the local tiers of all slots of a job, which may run on several hosts.

Each slot writes to Redis what more chunks would gain there, and reads the reports of the others. All slots compute the
same shares from the same reports, without a coordinator. Since they may read at different moments, a slot that wants to
grow first writes its new size, and then checks that all written sizes fit. Shares never add up to more than the budget.
"""

import math
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter
from redis import Redis
from redis.exceptions import RedisError

from cache.sizing.budget import Budget, SlotReport
from core.clients import FROM_ENVIRONMENT, redis_settings
from core.clock import Clock
from core.redis_config import RedisAccessConfig
from operators.config import JobConfig
from operators.shared_state.periodic import Periodic
from operators.shared_state.slot_loads import TIMEOUT_S

STALE_MS = 3000
"""A slot without a report for this long loses its share."""
_REPORT = TypeAdapter(SlotReport)


class SharedReports:
    """The slots' reports, in Redis. `name` must be unique to the job."""

    def __init__(self, redis_url: str, name: str, slots: int, access: RedisAccessConfig = FROM_ENVIRONMENT) -> None:
        self._redis = Redis.from_url(
            redis_url, **redis_settings(redis_url, access), socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )
        self._keys = [f"{name}:gains:{slot}" for slot in range(slots)]

    def write(self, slot: int, report: SlotReport) -> None:
        self._redis.set(self._keys[slot], _REPORT.dump_json(report), px=STALE_MS)

    def read(self) -> dict[int, SlotReport]:
        """By slot, the reports of the last `STALE_MS`. Raises `ValueError` for an invalid report."""
        values: Any = self._redis.mget(self._keys)
        return {slot: _REPORT.validate_json(value) for slot, value in enumerate(values) if value is not None}

    def close(self) -> None:
        self._redis.close()


class BudgetShare:
    """A slot's share of the budget, updated by a thread of its own. Implements `cache.sizing.budgeted.Shares`.

    Until the reports of the other slots are known, they may hold all the rest, so the share is the minimum. If reports
    cannot be read for `STALE_MS`, it is an even part of the budget.
    """

    def __init__(self, budget: Budget, slot: int, shared: SharedReports | None, clock: Clock) -> None:
        """`shared` is None if the job has only this slot."""
        self._budget = budget
        self._slot = slot
        self._shared = shared
        self._clock = clock
        self._read_ms = -math.inf
        self._report: SlotReport | None = None
        self.granted_chunks = budget.even_chunks if shared is None else budget.least_chunks
        self._periodic = None if shared is None else Periodic("budget-share", lambda: self._refresh(shared))

    @classmethod
    def of(cls, config: JobConfig, slot: int, clock: Clock) -> "BudgetShare | None":
        """The slot's share of the job's budget. None if each slot sizes its own cache."""
        sizing, remote = config.cache.sizing, config.cache.remote
        if sizing.budget_chunks is None or not sizing.shares_budget:
            return None
        budget = Budget(
            chunks=sizing.budget_chunks,
            slots=config.parallelism,
            least_chunks=sizing.min_capacity_chunks,
            greatest_chunks=sizing.max_capacity_chunks,
        )
        shared = None
        if config.parallelism > 1 and remote.redis_url is not None:
            name = f"{remote.redis_namespace}:{config.job_name}:{config.kafka.consumer_group}"
            shared = SharedReports(remote.redis_url, name, config.parallelism, remote.access)
        return cls(budget, slot, shared, clock)

    def offer(self, report: SlotReport) -> None:
        self._report = report

    def close(self) -> None:
        """End the thread. The other slots get the share once the last report is stale."""
        if self._periodic is not None:
            self._periodic.close()
        if self._shared is not None:
            self._shared.close()

    def _refresh(self, shared: SharedReports) -> None:
        report = self._report
        if report is None:
            return
        # The cache takes a granted share at its next lookup. Until then it counts as held.
        held = max(report.capacity_chunks, self.granted_chunks)
        try:
            reports = self._exchange(shared, replace(report, capacity_chunks=held))
            share = self._budget.share(reports).get(self._slot, self._budget.least_chunks)
            if share > held and not self._fits(self._exchange(shared, replace(report, capacity_chunks=share))):
                share = held
        except (RedisError, ValueError):
            if self._clock.monotonic_ms() - self._read_ms > STALE_MS:
                self.granted_chunks = self._budget.even_chunks
            raise
        self._read_ms = self._clock.monotonic_ms()
        self.granted_chunks = share

    def _exchange(self, shared: SharedReports, report: SlotReport) -> dict[int, SlotReport]:
        shared.write(self._slot, report)
        return shared.read()

    def _fits(self, reports: dict[int, SlotReport]) -> bool:
        return sum(report.capacity_chunks for report in reports.values()) <= self._budget.chunks
