"""Hit density: keeps the chunks with the most expected uses per chunk and unit of time.

The idea is that of LHD (Beckmann, Chen and Cidon, NSDI 2018): rank chunks by expected hits over expected time in the
cache. Both are learned from the ages at which similar chunks were used again. This policy differs from LHD in two ways.
The time in the cache is the one that makes the density greatest, which is the index of Gittins (1979). And a new chunk
with a lower density than all chunks in the tier is not admitted, because three of four chunks are never used again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cache.eviction.protocol import EvictionPolicy
from cache.eviction.reuse_ages import CLASSES, LAST, AgeTable, age_of, class_of_new, class_of_used

RELEARNINGS = 8
"""Number of updates of the densities during as many uses as there are remembered keys."""
LEAST_RELEARNED = 1024
"""Minimum number of uses between two updates of the densities."""


@dataclass(eq=False, slots=True)
class _Group:
    """Chunks of one class whose last use was by the same prompt, in the order of the prompt."""

    used_at: int
    kind: int
    held: dict[bytes, None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Record:
    """What the policy knows about a key, whether or not it is in the tier."""

    uses: int
    group: _Group
    own_kind: int
    """The class by the key's own uses. Its group may have the class of a later chunk of the prompt."""


class HitDensity(EvictionPolicy):
    """Evicts from the group of chunks with the lowest hit density, the last chunk of a prompt before its first.

    Time is counted in prompts. The age of a chunk is the time since its last use. The class of a chunk is its number of
    uses. Chunks with one use have several classes: by how many chunks of the prompt were new, and by whether they
    follow chunks that few other prompts used. A chunk is worth at least as much as the chunks behind it in its prompt.
    The density rises and falls with age, so only the oldest and the youngest group of each class are compared. An
    eviction takes O(classes), and every other call O(1) per key. Updating the densities takes O(remembered keys), and
    happens once in a number of uses proportional to that.
    """

    ghosts_per_chunk = 8
    """Conversations return after the tier has turned over many times."""

    def __init__(self) -> None:
        self._capacity = 0
        self._now = 0
        self._latest: dict[int, _Group] = {}
        """The groups of the latest prompt, by class."""
        self._unasked = _Group(0, class_of_new(1, 0))
        """Chunks inserted since the latest prompt that no prompt looked up."""
        self._records: dict[bytes, _Record] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        """Keys of the records that are not in the tier, the longest unused first."""
        self._groups: list[OrderedDict[_Group, None]] = [OrderedDict() for _ in range(CLASSES)]
        """The groups of each class that hold chunks, oldest first."""
        self._ages = AgeTable()
        self._uses_until_learned = LEAST_RELEARNED

    def on_resize(self, capacity_chunks: int) -> None:
        self._capacity = capacity_chunks
        self._forget()

    def on_request(self, keys: Sequence[bytes]) -> None:
        self._now += 1
        self._latest = {}
        kind_if_new = self._kind_of_new(keys)
        for place, key in enumerate(reversed(keys)):
            self._count(key, kind_if_new if place else LAST)
        self._regroup(keys)
        self._forget()
        self._uses_until_learned -= len(keys)
        if self._uses_until_learned <= 0:
            self._learn()

    def admits(self, key: bytes) -> bool:
        record = self._records.get(key)
        victim = self._least()
        if victim is None:
            return False
        return record is None or self._density(victim) < self._density(record.group)

    def on_insert(self, key: bytes) -> None:
        record = self._records.get(key)
        if record is None:  # No prompt looked it up: it is a chunk of an answer.
            if self._unasked.used_at < self._now:
                self._unasked = _Group(self._now, class_of_new(1, 0))
            record = self._records[key] = _Record(1, self._unasked, self._unasked.kind)
        else:
            del self._ghosts[key]
        self._hold(key, record.group)

    def arrange(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            held = self._records[key].group.held
            del held[key]
            held[key] = None

    def on_remove(self, key: bytes) -> None:
        self._let_go(key, self._records[key].group)
        self._ghosts[key] = None
        self._forget()

    def victims(self) -> Iterator[bytes]:
        first = self._least()
        if first is not None:
            yield from list(reversed(first.held))
        others = [group for groups in self._groups for group in groups if group is not first]
        # The latest prompt comes last: its end must not evict its own beginning.
        others.sort(key=lambda group: (self._is_latest(group), self._density(group)))
        for group in others:
            yield from reversed(group.held)

    def _is_latest(self, group: _Group) -> bool:
        return self._latest.get(group.kind) is group

    def _density(self, group: _Group) -> float:
        return self._ages.density[group.kind][age_of(self._now - group.used_at)]

    def _least(self) -> _Group | None:
        """The group with the lowest density, except those of the latest prompt."""
        least, least_density = None, 0.0
        for groups in self._groups:
            if not groups:
                continue
            oldest = next(iter(groups))
            youngest = next((group for group in reversed(groups) if not self._is_latest(group)), oldest)
            for group in (oldest, youngest):
                density = self._density(group)
                if (least is None or density < least_density) and not self._is_latest(group):
                    least, least_density = group, density
        return least

    def _kind_of_new(self, keys: Sequence[bytes]) -> int:
        known, last = 0, None
        for key in keys:
            record = self._records.get(key)
            if record is None:
                break
            known, last = known + 1, record
        return class_of_new(len(keys) - known, 0 if last is None else last.uses)

    def _count(self, key: bytes, kind_if_new: int) -> None:
        """Count one use of `key`. Its group does not change yet."""
        record = self._records.get(key)
        if record is None:
            self._records[key] = _Record(1, _Group(self._now, kind_if_new), kind_if_new)
            self._ghosts[key] = None
        else:
            self._ages.reused(record.own_kind, age_of(self._now - record.group.used_at))
            record.uses += 1
            record.own_kind = class_of_used(record.uses)
            if key in self._ghosts:
                self._ghosts.move_to_end(key)

    def _regroup(self, keys: Sequence[bytes]) -> None:
        """Move a prompt's keys to the latest groups, each to the best class of its own and of the keys behind it."""
        kinds: list[int] = []
        best = 0
        for key in reversed(keys):
            kind = self._records[key].own_kind
            if not kinds or self._ages.density[kind][0] > self._ages.density[best][0]:
                best = kind
            kinds.append(best)
        for key, kind in zip(keys, reversed(kinds), strict=True):
            record = self._records[key]
            if key in record.group.held:
                self._let_go(key, record.group)
                record.group = self._latest_group(kind)
                self._hold(key, record.group)
            else:
                record.group = self._latest_group(kind)

    def _latest_group(self, kind: int) -> _Group:
        return self._latest.setdefault(kind, _Group(self._now, kind))

    def _hold(self, key: bytes, group: _Group) -> None:
        if not group.held:
            self._groups[group.kind][group] = None
        group.held[key] = None

    def _let_go(self, key: bytes, group: _Group) -> None:
        del group.held[key]
        if not group.held:
            del self._groups[group.kind][group]

    def _forget(self) -> None:
        while len(self._ghosts) > self.ghosts_per_chunk * self._capacity:
            key, _ = self._ghosts.popitem(last=False)
            record = self._records.pop(key)
            self._ages.given_up(record.own_kind, age_of(self._now - record.group.used_at))

    def _learn(self) -> None:
        now = self._now
        self._ages.learn((record.own_kind, age_of(now - record.group.used_at)) for record in self._records.values())
        self._uses_until_learned = max(LEAST_RELEARNED, len(self._records) // RELEARNINGS)
