"""Hit density: what is kept are the chunks that promise most uses for the room and time they will take.

The idea is LHD's (Beckmann, Chen and Cidon, NSDI 2018): rank by expected hits over expected residence, both learned
from the ages at which chunks like this one were used again. Ours differs in two ways. A chunk is kept for as long as
its density is at its best, which is the index of Gittins (1979); and a newcomer that promises less than all that is
there is not admitted, as three chunks of four are never used again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cache.eviction.protocol import EvictionPolicy
from cache.eviction.reuse_ages import CLASSES, LAST, AgeTable, age_of, class_of_new, class_of_used

RELEARNINGS = 8
"""How often the densities are learned anew while as many uses come as keys are remembered."""
LEAST_RELEARNED = 1024
"""Uses after which the densities are learned anew at the earliest."""


@dataclass(eq=False, slots=True)
class _Group:
    """The chunks that one prompt used last and that are of one class, from the prompt's first to its last."""

    used_at: int
    kind: int
    held: dict[bytes, None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Record:
    """What is known of a key, in the tier or not."""

    uses: int
    group: _Group
    own_kind: int
    """The class that its own uses make; its group's may be that of a chunk behind it."""


class HitDensity(EvictionPolicy):
    """The group whose chunks promise the fewest uses for their room leaves first, its last chunk before its first.

    Time is counted in prompts, age is time since the last use. A class is a number of uses; that of the first use tells
    how much is new in the prompt, and whether it goes on from what only few others had. A chunk is worth at least what
    those behind it in its prompt are. Densities rise and fall with age, so that of a class only the oldest
    and the youngest groups are looked at: O(classes) for an eviction, O(1) for all else, but for learning, which takes
    time in proportion to the remembered keys after as many uses.
    """

    ghosts_per_chunk = 8
    """Conversations return after the tier has turned over many times."""

    def __init__(self) -> None:
        self._capacity = 0
        self._now = 0
        self._latest: dict[int, _Group] = {}
        """By class, the groups of the prompt that came last."""
        self._unasked = _Group(0, class_of_new(1, 0))
        """What came in since the latest prompt and was in no prompt."""
        self._records: dict[bytes, _Record] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        """Those of the records whose key is not in the tier, the one longest in vain first."""
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
        if record is None:  # Nobody asked for it: a chunk of an answer.
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
        # The prompt that is in work comes last: it never makes room for its end at the cost of its beginning.
        others.sort(key=lambda group: (self._is_latest(group), self._density(group)))
        for group in others:
            yield from reversed(group.held)

    def _is_latest(self, group: _Group) -> bool:
        return self._latest.get(group.kind) is group

    def _density(self, group: _Group) -> float:
        return self._ages.density[group.kind][age_of(self._now - group.used_at)]

    def _least(self) -> _Group | None:
        """The group of the least density but for those of the latest prompt."""
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
        """One use of `key`, whose group is as it was."""
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
        """Put a prompt's keys into groups of the latest prompt: each into the best class from it to the end."""
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
