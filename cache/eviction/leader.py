"""Follow the leader: uses the one of two policies that would have had more hits so far."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cache.eviction.density import HitDensity
from cache.eviction.lru import LRU
from cache.eviction.protocol import EvictionPolicy
from cache.eviction.shadow import ShadowTier

HALF_LIFE_PROMPTS = 4096
"""Number of prompts after which a difference in hits counts half."""
SURE = 3.0
"""The leader changes when the other policy is ahead by this many standard deviations. A change costs hits, because the
tier lacks some of the new leader's chunks. Two equally good policies take turns in being slightly ahead."""


def lru_or_density() -> "FollowTheLeader":
    """Follows LRU or `HitDensity`. LRU leads at first, so a load where recency is the best predictor loses nothing."""
    return FollowTheLeader(LRU(), HitDensity())


class FollowTheLeader(EvictionPolicy):
    """Simulates both policies on every prompt, each in a shadow tier of keys, and keeps what the leader's shadow holds.

    As long as the leader does not change, the tier has exactly the hits of that policy. The method is that of virtual
    caches with refetching (Gramacy, Warmuth, Brandt and Ari, NIPS 2002). It needs memory for the keys of two tiers and
    for what both policies remember. It takes the time of both policies, and O(chunks) at a change of the leader.
    """

    def __init__(self, first: EvictionPolicy, second: EvictionPolicy) -> None:
        """`first` and `second` are new, empty policies. `first` leads at first."""
        # The keys of both shadows, those in `_known`, and what both policies remember.
        self.ghosts_per_chunk = 3 + first.ghosts_per_chunk + second.ghosts_per_chunk
        self._leader = ShadowTier(first)
        self._other = ShadowTier(second)
        self._behind = 0.0
        """Hits of the other policy minus hits of the leader. Old differences fade, also in the variance."""
        self._variance = 0.0
        self._inside: OrderedDict[bytes, None] = OrderedDict()
        """The keys in the tier, in the order of insertion."""
        self._strays: OrderedDict[bytes, None] = OrderedDict()
        """The keys in the tier that the leader's shadow does not hold, and some that it holds again."""
        self._known: OrderedDict[bytes, None] = OrderedDict()
        """The keys that the shadows saw last, at most as many as the capacity."""
        self._capacity = 0

    @property
    def _shadows(self) -> tuple[ShadowTier, ShadowTier]:
        return self._leader, self._other

    @property
    def leader(self) -> EvictionPolicy:
        """The policy that the tier follows now."""
        return self._leader.policy

    def on_resize(self, capacity_chunks: int) -> None:
        self._capacity = capacity_chunks
        for shadow in self._shadows:
            shadow.resize(capacity_chunks)
        self._know(())
        self._gather_strays()

    def on_request(self, keys: Sequence[bytes]) -> None:
        difference = self._other.request(keys) - self._leader.request(keys)
        aged = 0.5 ** (1 / HALF_LIFE_PROMPTS)
        self._behind = aged * self._behind + difference
        # The variance of a random walk: that is what the sum is if both policies are equally good.
        self._variance = aged * aged * self._variance + difference * difference
        self._know(keys)
        self._gather_strays()
        if self._behind > SURE * math.sqrt(self._variance):
            self._change()

    def admits(self, key: bytes) -> bool:
        self._introduce(key)
        return key in self._leader.held

    def on_insert(self, key: bytes) -> None:
        self._introduce(key)
        self._inside[key] = None
        if key not in self._leader.held:
            self._strays[key] = None

    def arrange(self, keys: Sequence[bytes]) -> None:
        for shadow in self._shadows:
            shadow.arrange(keys)

    def on_remove(self, key: bytes) -> None:
        del self._inside[key]
        self._strays.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        held = self._leader.held
        for key in self._strays:
            if key not in held:
                yield key
        for key in self._leader.policy.victims():
            if key in self._inside:
                yield key

    def _change(self) -> None:
        self._leader, self._other = self._other, self._leader
        self._behind = -self._behind
        held = self._leader.held
        self._strays = OrderedDict.fromkeys(key for key in self._inside if key not in held)

    def _introduce(self, key: bytes) -> None:
        """Offer `key` to the shadows if no recent prompt looked it up: it is a chunk of an answer."""
        if key in self._known:
            return
        for shadow in self._shadows:
            if key not in shadow.held:
                shadow.offer(key)
        self._know((key,))
        self._gather_strays()

    def _know(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def _gather_strays(self) -> None:
        for key in self._leader.left:
            if key in self._inside:
                self._strays[key] = None
        for shadow in self._shadows:
            shadow.left.clear()
