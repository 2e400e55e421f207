"""Where a session is at home: jobs place by it, and a load that is to be even over the slots is made by it."""

import xxhash


def home_slot(session_id: str, slots: int) -> int:
    """Index in `[0, slots)`, the same in every process."""
    return xxhash.xxh3_64_intdigest(session_id.encode("utf-8", "surrogatepass")) % slots
