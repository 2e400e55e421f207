"""Learns online how likely chunks are to be used again, by their number of uses and the time since the last one."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

NEW_CHUNKS = (4, 16, 64)
"""Numbers of new chunks in a prompt at which the next class of new chunks begins."""
TURN_USES = 5
"""New chunks that follow a chunk with fewer uses than this form separate classes: they are likely a conversation's next
turn."""
USES = (3, 4, 5, 6, 7, 9, 13, 21, 34, 55, 100)
"""Numbers of uses at which the next class of used chunks begins. The first class has two uses."""
WIDTHS = len(NEW_CHUNKS) + 1
LAST = 2 * WIDTHS
"""Class of a new chunk at the end of its prompt. A partial chunk is never used again."""
FIRST_USED = LAST + 1
CLASSES = FIRST_USED + len(USES) + 1
YOUNGEST = 8
"""Ages below this share one bin. Above it there are two bins per octave."""
AGES = 36
EDGES = (0.0, *(YOUNGEST * 2.0 ** (step / 2) for step in range(AGES)))
"""Bin `i` is `[EDGES[i], EDGES[i + 1])`, the last one unbounded."""

CLASS_WEIGHT = 8.0
"""At this many expected uses, the level of a class and that of a similar class have the same weight."""
SHAPE_WEIGHT = 50.0
"""At this many chunks in a bin, its own hazard and that of a similar class have the same weight."""
FADING = 0.97
"""Each update multiplies the weight of old observations by this, because loads change."""


def class_of_new(new_chunks: int, uses_before: int) -> int:
    """Class of a chunk at its first use, from 0 to `CLASSES - 1`.

    `new_chunks` is the number of new chunks in the prompt. `uses_before` is the number of uses of the chunk before the
    new ones, and 0 if there is none.
    """
    is_turn = 0 < uses_before < TURN_USES
    return bisect_right(NEW_CHUNKS, new_chunks) + is_turn * WIDTHS


def class_of_used(uses: int) -> int:
    """Class of a chunk that is used for the second time or more."""
    return FIRST_USED + bisect_right(USES, uses)


def age_of(age: int) -> int:
    """The bin, from 0 to `AGES - 1`, of an age in prompts."""
    return min(bisect_right(EDGES, age) - 1, AGES - 1)


class AgeTable:
    """Counts the ages at which keys are used again, and derives densities: expected uses per chunk and unit of time."""

    def __init__(self) -> None:
        self._reused = [[0.0] * AGES for _ in range(CLASSES)]
        self._given_up = [[0.0] * AGES for _ in range(CLASSES)]
        # Before the first update, younger chunks are worth more, as in LRU.
        self.density: Sequence[Sequence[float]] = [[1.0 / edge for edge in EDGES[1:]] for _ in range(CLASSES)]
        """By class and age."""

    def reused(self, kind: int, age: int) -> None:
        """A key of class `kind` was used again at this age (a bin)."""
        self._reused[kind][age] += 1

    def given_up(self, kind: int, age: int) -> None:
        """A key of class `kind` was forgotten at this age (a bin), without a further use."""
        self._given_up[kind][age] += 1

    def learn(self, waiting: Iterable[tuple[int, int]]) -> None:
        """Update `density` from all counts. `waiting` has the class and the age of every key that is remembered now."""
        unused = [counts.copy() for counts in self._given_up]
        for kind, age in waiting:
            unused[kind][age] += 1
        any_new = _hazards(_sums(self._reused[:FIRST_USED]), _sums(unused[:FIRST_USED]), None)
        hazards: list[list[float]] = []
        for kind in range(CLASSES):
            like = hazards[-1] if kind > FIRST_USED else any_new
            hazards.append(_hazards(self._reused[kind], unused[kind], like))
        self.density = [_densities(hazard) for hazard in hazards]
        for counts in (*self._reused, *self._given_up):
            counts[:] = [count * FADING for count in counts]


def _exposed(reused: Sequence[float], unused: Sequence[float]) -> list[float]:
    """For each age, how many keys lived through it. Keys that went out of sight within it count half."""
    exposed, older = [0.0] * len(reused), 0.0
    for age in reversed(range(len(reused))):
        older += reused[age] + unused[age]
        exposed[age] = older - unused[age] / 2
    return exposed


def _sums(counts: Sequence[Sequence[float]]) -> list[float]:
    return [sum(ages) for ages in zip(*counts, strict=True)]


def _hazards(reused: Sequence[float], unused: Sequence[float], like: Sequence[float] | None) -> list[float]:
    """For each age, the probability that a key of this age is used again within the bin.

    Where few keys were seen, this falls back on `like`, the hazards of a similar class, scaled to this class's level.
    """
    exposed = _exposed(reused, unused)
    if like is None:
        return [uses / (keys + 1.0) for uses, keys in zip(reused, exposed, strict=True)]
    expected = sum(hazard * keys for hazard, keys in zip(like, exposed, strict=True))
    level = (sum(reused) + CLASS_WEIGHT) / (expected + CLASS_WEIGHT)
    return [
        (uses + SHAPE_WEIGHT * min(hazard * level, 1.0)) / (keys + SHAPE_WEIGHT)
        for uses, keys, hazard in zip(reused, exposed, like, strict=True)
    ]


def _densities(hazards: Sequence[float]) -> list[float]:
    """For each age, the greatest expected uses per unit of time over all ages up to which a chunk may be kept."""
    densities = []
    for begin in range(len(hazards)):
        left, uses, time, best = 1.0, 0.0, 0.0, 0.0
        for age in range(begin, len(hazards)):
            used = left * hazards[age]
            time += (EDGES[age + 1] - EDGES[age]) * (left - used / 2)
            uses += used
            left -= used
            best = max(best, uses / time)
        densities.append(best)
    return densities
