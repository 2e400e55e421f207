"""Maps sessions to slots, and slots to Flink keys."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

from core.default_slot import default_slot
from operators.config import PlacementConfig
from operators.shared_state.slot_loads import Loads

DETOUR_MS = 100.0
"""Assumed load of a session that is sent to another slot than its default, until that slot reports again."""


class PlacementPolicy(Protocol):
    """Chooses the slot of a session."""

    def slot_of(self, session_id: str) -> int: ...


class SessionAffinity:
    """Sends each session to its default slot, where the chunks of its conversation are."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def slot_of(self, session_id: str) -> int:
        """Index in `[0, slots)`, the same in every process."""
        return default_slot(session_id, self._slots)


class BalancedPlacement:
    """Sends a new session to its default slot, or to the least loaded slot if the default one is overloaded.

    The session then stays there. A slot is overloaded if its queue is longer than `overload_ms`, and longer than
    `overload_ratio` times the mean of the other queues. This is the bound of consistent hashing with bounded loads
    (Mirrokni et al., SODA 2018), applied to waiting time. While loads are unknown, sessions go to their default slots.
    """

    def __init__(self, slots: int, config: PlacementConfig, loads: Loads) -> None:
        self._slots = slots
        self._config = config
        self._loads = loads
        self._known: OrderedDict[str, int] = OrderedDict()
        self._read: Mapping[int, float] = {}
        self._queues_ms: dict[int, float] = {}
        """The queues as last read, plus the sessions that were sent there since."""

    def slot_of(self, session_id: str) -> int:
        slot = self._known.pop(session_id, None)
        if slot is None:
            slot = self._place(default_slot(session_id, self._slots))
        self._known[session_id] = slot
        if len(self._known) > self._config.remembered_sessions:
            self._known.popitem(last=False)
        return slot

    def _place(self, default: int) -> int:
        read = self._loads.queues_ms
        if read is not self._read:
            self._read, self._queues_ms = read, dict(read)
        others = {slot: queue for slot, queue in self._queues_ms.items() if slot != default}
        if default not in self._queues_ms or not others:
            return default
        bound_ms = max(self._config.overload_ms, self._config.overload_ratio * sum(others.values()) / len(others))
        if self._queues_ms[default] <= bound_ms:
            return default
        slot = min(others, key=lambda other: (others[other], other))
        if others[slot] >= self._queues_ms[default]:
            return default
        self._queues_ms[slot] += DETOUR_MS
        return slot


def key_of_each_slot(assign: Callable[[int], int], slots: int, max_tries: int = 1 << 16) -> tuple[int, ...]:
    """Find an integer key for each slot: Flink processes `keys[i]` in subtask `i`.

    Flink hashes keys into key groups, so the keys 0..n-1 do not spread evenly over n subtasks. `assign` is Flink's own
    rule (key -> subtask index). Raises `ValueError` if `max_tries` keys do not suffice.
    """
    keys: dict[int, int] = {}
    for key in range(max_tries):
        keys.setdefault(assign(key), key)
        if len(keys) == slots:
            return tuple(keys[slot] for slot in range(slots))
    raise ValueError(f"no key found for every one of {slots} slots among {max_tries}")
