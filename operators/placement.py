"""Which slot answers a session, and which Flink key leads to that slot."""

from collections.abc import Callable

from core.session_home import home_slot


class SessionAffinity:
    """A session stays at one slot, where the chunks of its conversation are; sessions spread over all slots."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def slot_of(self, session_id: str) -> int:
        """Index in `[0, slots)`, the same in every process."""
        return home_slot(session_id, self._slots)


def key_of_each_slot(assign: Callable[[int], int], slots: int, max_tries: int = 1 << 16) -> tuple[int, ...]:
    """One integer key for each subtask, so that `keys[i]` is processed by subtask `i`.

    Flink hashes keys into key groups, so that keys 0..n-1 do not spread over n subtasks. `assign` is Flink's own rule
    (key -> subtask index).
    """
    keys: dict[int, int] = {}
    for key in range(max_tries):
        keys.setdefault(assign(key), key)
        if len(keys) == slots:
            return tuple(keys[slot] for slot in range(slots))
    raise ValueError(f"no key found for every one of {slots} slots among {max_tries}")
