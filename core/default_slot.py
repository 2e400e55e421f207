"""Maps a session to its default slot. Jobs use it for placement; the load generator uses it to balance sessions."""

import xxhash


def default_slot(session_id: str, slots: int) -> int:
    """Index of the slot in `[0, slots)`, the same in every process."""
    return xxhash.xxh3_64_intdigest(session_id.encode("utf-8", "surrogatepass")) % slots
