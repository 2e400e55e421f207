"""How likely chunks are to be used again, by how often they were used and for how long not since: learned online."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

NEW_CHUNKS = (4, 16, 64)
"""Chunks that are new in a prompt at which the next class of new chunks begins."""
TURN_USES = 5
"""New chunks that follow one with fewer uses than this are taken for a conversation's next turn, and counted apart."""
USES = (3, 4, 5, 6, 7, 9, 13, 21, 34, 55, 100)
"""Uses at which the next class of chunks that are not new begins; the first has two."""
WIDTHS = len(NEW_CHUNKS) + 1
LAST = 2 * WIDTHS
"""Class of the first use of a prompt's last chunk: a partial one is never used again."""
FIRST_USED = LAST + 1
CLASSES = FIRST_USED + len(USES) + 1
YOUNGEST = 8
"""Ages below this are not told apart; above it there are two bins an octave."""
AGES = 36
EDGES = (0.0, *(YOUNGEST * 2.0 ** (step / 2) for step in range(AGES)))
"""Bin `i` is `[EDGES[i], EDGES[i + 1])`, the last one unbounded."""

CLASS_WEIGHT = 8.0
"""Expected uses for which a class like it is believed as much as the class itself, as to the level ..."""
SHAPE_WEIGHT = 50.0
"""... and chunks in a bin, as to the course over the ages."""
FADING = 0.97
"""What an observation counts after another learning, in parts: loads change."""


def class_of_new(new_chunks: int, uses_before: int) -> int:
    """Class of a chunk at its first use, in a prompt of `new_chunks` new chunks after a chunk with `uses_before` uses.

    None before it is no uses. From 0 to `CLASSES - 1`, as all classes are.
    """
    is_turn = 0 < uses_before < TURN_USES
    return bisect_right(NEW_CHUNKS, new_chunks) + is_turn * WIDTHS


def class_of_used(uses: int) -> int:
    """Class of a chunk that is used for the second time or more."""
    return FIRST_USED + bisect_right(USES, uses)


def age_of(age: int) -> int:
    """The bin, from 0 to `AGES - 1`, of an age of so many prompts."""
    return min(bisect_right(EDGES, age) - 1, AGES - 1)


class AgeTable:
    """Counts ages at reuse, and of `learn` makes densities: expected uses for each chunk and unit of time."""

    def __init__(self) -> None:
        self._reused = [[0.0] * AGES for _ in range(CLASSES)]
        self._given_up = [[0.0] * AGES for _ in range(CLASSES)]
        # Until something is learned the younger is worth more, as for LRU.
        self.density: Sequence[Sequence[float]] = [[1.0 / edge for edge in EDGES[1:]] for _ in range(CLASSES)]
        """By class and age."""

    def reused(self, kind: int, age: int) -> None:
        """A key of class `kind` was used at this age (both as bins)."""
        self._reused[kind][age] += 1

    def given_up(self, kind: int, age: int) -> None:
        """A key of class `kind` was forgotten at this age: it lived so long without a use, no more is known."""
        self._given_up[kind][age] += 1

    def learn(self, waiting: Iterable[tuple[int, int]]) -> None:
        """Make `density` of all that was counted; `waiting` are class and age of every key that is remembered now."""
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
    """By age, how many keys lived through it; of those that went out of sight within it, half."""
    exposed, older = [0.0] * len(reused), 0.0
    for age in reversed(range(len(reused))):
        older += reused[age] + unused[age]
        exposed[age] = older - unused[age] / 2
    return exposed


def _sums(counts: Sequence[Sequence[float]]) -> list[float]:
    return [sum(ages) for ages in zip(*counts, strict=True)]


def _hazards(reused: Sequence[float], unused: Sequence[float], like: Sequence[float] | None) -> list[float]:
    """By age, the probability that a key that has come to it is used within its bin.

    Where little was seen it is the hazard of a class that is `like` this one, at this one's own level.
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
    """By age, the greatest quotient of uses and time that keeping a chunk up to some later age promises."""
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
