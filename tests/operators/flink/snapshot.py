"""The content of a checkpoint, and its division among subtasks."""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.operators.flink.key_groups import subtask_of
from tests.operators.flink.keyed_state import Contents
from tests.operators.flink.timers import Timer


@dataclass(frozen=True)
class Snapshot:
    """The keyed state and timers of one or several subtasks."""

    contents: Contents
    timers: tuple[Timer, ...]

    @classmethod
    def of_all(cls, parts: "Iterable[Snapshot]") -> "Snapshot":
        parts = list(parts)
        contents = {place: content for part in parts for place, content in part.contents.items()}
        return cls(contents, tuple(timer for part in parts for timer in part.timers))

    def without(self, *timers: Timer) -> "Snapshot":
        """The same snapshot without these timers, as if they were on their way to Java when it was taken."""
        return Snapshot(self.contents, tuple(timer for timer in self.timers if timer not in timers))

    def of_subtask(self, subtask: int, parallelism: int) -> "Snapshot":
        """The part of the snapshot whose key groups belong to a subtask."""
        contents = {
            (name, key): content
            for (name, key), content in self.contents.items()
            if subtask_of(key, parallelism) == subtask
        }
        timers = tuple(timer for timer in self.timers if subtask_of(timer.key, parallelism) == subtask)
        return Snapshot(contents, timers)


NOTHING = Snapshot({}, ())
