"""Simulates which keys a tier would hold under a policy, without the chunks."""

from collections.abc import Collection, Sequence

from cache.eviction.protocol import EvictionPolicy


class ShadowTier:
    """Looks up and stores each prompt at once, as the cache does when prompts come one after the other."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.held: set[bytes] = set()
        self.left: list[bytes] = []
        """Evicted keys. The caller reads and clears them."""
        self._capacity = 0

    def resize(self, capacity_chunks: int) -> None:
        self._capacity = capacity_chunks
        self.policy.on_resize(capacity_chunks)
        while len(self.held) > capacity_chunks:
            self._evict(next(self.policy.victims()))

    def request(self, keys: Sequence[bytes]) -> int:
        """Look up a prompt and insert its missing keys. Returns how many keys it held before the first missing one."""
        self.policy.on_request(keys)
        prefix = next((place for place, key in enumerate(keys) if key not in self.held), len(keys))
        self.policy.arrange(keys[:prefix])
        kept: set[bytes] = set()
        for key in keys:
            if key in self.held or self.offer(key, kept):
                kept.add(key)
        self.arrange(keys)
        return prefix

    def offer(self, key: bytes, kept: Collection[bytes] = ()) -> bool:
        """Insert `key`, which it does not hold, unless that would evict one of `kept`. True if it was inserted."""
        if len(self.held) >= self._capacity:
            if self._capacity == 0 or not self.policy.admits(key):
                return False
            victim = next((one for one in self.policy.victims() if one not in kept), None)
            if victim is None:
                return False
            self._evict(victim)
        self.policy.on_insert(key)
        self.held.add(key)
        return True

    def arrange(self, keys: Sequence[bytes]) -> None:
        self.policy.arrange([key for key in keys if key in self.held])

    def _evict(self, key: bytes) -> None:
        self.policy.on_remove(key)
        self.held.remove(key)
        self.left.append(key)
