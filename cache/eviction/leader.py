"""Follow the leader: of two policies the one that would have hit more of the load so far."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cache.eviction.density import HitDensity
from cache.eviction.lru import LRU
from cache.eviction.protocol import EvictionPolicy
from cache.eviction.shadow import ShadowTier

HALF_LIFE_PROMPTS = 4096
"""Prompts after which a difference counts for half of one."""
SURE = 3.0
"""The other leads once it is ahead by so many standard deviations: to change costs what the tier does not have of it,
and two that are as good as each other are ahead by turns."""


def lru_or_density() -> "FollowTheLeader":
    """Follows LRU or `HitDensity`. LRU leads at first: where recency is all there is to know, nothing is lost."""
    return FollowTheLeader(LRU(), HitDensity())


class FollowTheLeader(EvictionPolicy):
    """Both policies run beside the tier in shadows, which hold keys alone, over every prompt.

    The tier keeps what the leader's shadow holds, so that under one leader all the time it hits just what that policy
    would (virtual caches with refetching: Gramacy, Warmuth, Brandt and Ari, NIPS 2002). Memory: the keys of two tiers
    and what the policies remember. Time: that of both, and O(chunks) at a change of the leader.
    """

    def __init__(self, first: EvictionPolicy, second: EvictionPolicy) -> None:
        """Fresh policies; `first` leads at first."""
        # The keys of two shadows, those that both were told of last, and what both policies remember.
        self.ghosts_per_chunk = 3 + first.ghosts_per_chunk + second.ghosts_per_chunk
        self._leader = ShadowTier(first)
        self._other = ShadowTier(second)
        self._behind = 0.0
        """Hits that the leader is behind the other by; aged, as is their variance."""
        self._variance = 0.0
        self._inside: OrderedDict[bytes, None] = OrderedDict()
        """The tier's keys, in the order in which they came."""
        self._strays: OrderedDict[bytes, None] = OrderedDict()
        """The keys of the tier that the leader does not hold, and some that it has taken in again."""
        self._known: OrderedDict[bytes, None] = OrderedDict()
        """What the shadows were told of last, as many keys as the tier has room for."""
        self._capacity = 0

    @property
    def _shadows(self) -> tuple[ShadowTier, ShadowTier]:
        return self._leader, self._other

    @property
    def leader(self) -> EvictionPolicy:
        """The policy that is followed."""
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
        # As of a random walk, which the sum is where none is better than the other.
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
        """Offer the shadows what no prompt of late has asked for: a chunk of an answer."""
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
