"""Keyed state as Flink keeps it: bytes, by name and current key.

Values pass through the coders that PyFlink uses for the types of their descriptors. So a read never returns the written
object, and a value that does not fit its type cannot be written.
"""

from abc import ABC
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyflink.datastream.state import ListState, MapState, State, ValueState
from pyflink.fn_execution.beam.beam_coders import FlinkCoder
from pyflink.fn_execution.coders import FieldCoder

Key = int | None
"""None if a stream has no keys."""
Contents = Mapping[tuple[str, int], Any]
"""Non-empty state by name and key: the bytes of a value, a tuple of bytes, or a mapping of bytes to bytes."""


class KeyedState:
    """Replaces the backend of keyed state in PyFlink's `StreamingRuntimeContext`."""

    def __init__(self, contents: Contents) -> None:
        self.current_key: Key = None
        self.contents = dict(contents)
        self._states: dict[str, StoredState] = {}

    def get_value_state(self, name: str, coder: FieldCoder, ttl_config: None) -> "StoredValue":
        return self._state(StoredValue, name, ttl_config, coder)

    def get_list_state(self, name: str, coder: FieldCoder, ttl_config: None) -> "StoredList":
        return self._state(StoredList, name, ttl_config, coder)

    def get_map_state(self, name: str, key_coder: FieldCoder, coder: FieldCoder, ttl_config: None) -> "StoredMap":
        return self._state(StoredMap, name, ttl_config, coder, key_coder)

    def read(self, name: str, key: Key) -> Any:
        """The decoded content of a state under a key: a value, a list or a dictionary."""
        before, self.current_key = self.current_key, key
        try:
            return self._states[name].all()
        finally:
            self.current_key = before

    def _state(self, kind: "type[StoredState]", name: str, ttl_config: None, *coders: FieldCoder) -> Any:
        if ttl_config is not None:
            raise NotImplementedError("time to live")
        state = self._states.setdefault(name, kind(self, name, *coders))
        if not isinstance(state, kind):
            raise TypeError(f"the state name {name!r} is already in use and not a {kind.__name__}")
        return state


class StoredState(State, ABC):
    """The state of one name, for all keys. It shows the content under the current key."""

    def __init__(self, store: KeyedState, name: str, coder: FieldCoder) -> None:
        self._store = store
        self._name = name
        self._coder = FlinkCoder(coder)
        self._changes: dict[Key, int] = defaultdict(int)

    def clear(self) -> None:
        self._set(None)

    def all(self) -> Any:
        raise NotImplementedError

    @property
    def _place(self) -> tuple[str, Any]:
        return self._name, self._store.current_key

    def _get(self) -> Any:
        return self._store.contents.get(self._place)

    def _set(self, content: Any) -> None:
        self._changes[self._store.current_key] += 1
        if content not in (None, (), {}):
            self._store.contents[self._place] = content
        else:
            self._store.contents.pop(self._place, None)

    def _unchanged(self, elements: Iterable[Any]) -> Iterator[Any]:
        """Fails a write during an iteration. PyFlink reads from Java while it iterates, so the result is undefined."""
        key = self._store.current_key
        return self._while_at(key, self._changes[key], iter(elements))

    def _while_at(self, key: Key, changes: int, elements: Iterator[Any]) -> Iterator[Any]:
        while True:
            if (self._store.current_key, self._changes[key]) != (key, changes):
                raise RuntimeError(f"the state {self._name!r} was modified while it was iterated over")
            try:
                yield next(elements)
            except StopIteration:
                return


class StoredValue(StoredState, ValueState):
    def value(self) -> Any:
        content = self._get()
        return None if content is None else self._coder.decode(content)

    all = value

    def update(self, value: Any) -> None:
        self._set(None if value is None else self._coder.encode(value))


class StoredList(StoredState, ListState):
    def get(self) -> "Reading":
        return Reading(self)

    def add(self, value: Any) -> None:
        self.add_all([value])

    def add_all(self, values: Iterable[Any]) -> None:
        self._set((self._get() or ()) + tuple(self._coder.encode(value) for value in values))

    def update(self, values: Iterable[Any]) -> None:
        self.clear()
        self.add_all(values)

    def all(self) -> list[Any]:
        return list(self)

    def __iter__(self) -> Iterator[Any]:
        return self._unchanged(map(self._coder.decode, self._get() or ()))


class Reading:
    """PyFlink's result for a list: it can be iterated several times, has no length, and is always true."""

    def __init__(self, state: StoredList) -> None:
        self._state = state

    def __iter__(self) -> Iterator[Any]:
        return iter(self._state)


class StoredMap(StoredState, MapState):
    def __init__(self, store: KeyedState, name: str, coder: FieldCoder, key_coder: FieldCoder) -> None:
        super().__init__(store, name, coder)
        self._key_coder = FlinkCoder(key_coder)

    def get(self, key: Any) -> Any:
        return self._value((self._get() or {}).get(self._key_coder.encode(key)))

    def put(self, key: Any, value: Any) -> None:
        encoded = None if value is None else self._coder.encode(value)
        self._set((self._get() or {}) | {self._key_coder.encode(key): encoded})

    def put_all(self, dict_value: Any) -> None:
        """Takes pairs, as in PyFlink 2.3, in spite of its name and annotation."""
        for key, value in dict_value:
            self.put(key, value)

    def remove(self, key: Any) -> None:
        encoded = self._key_coder.encode(key)
        self._set({other: value for other, value in (self._get() or {}).items() if other != encoded})

    def contains(self, key: Any) -> bool:
        return self.get(key) is not None

    def items(self) -> Iterator[tuple[Any, Any]]:
        pairs = (self._get() or {}).items()
        return self._unchanged((self._key_coder.decode(key), self._value(value)) for key, value in pairs)

    def keys(self) -> Iterator[Any]:
        return self._unchanged(key for key, _ in self.all().items())

    def values(self) -> Iterator[Any]:
        return self._unchanged(value for _, value in self.all().items())

    def is_empty(self) -> bool:
        return not self._get()

    def all(self) -> dict[Any, Any]:
        return dict(self.items())

    def _value(self, encoded: bytes | None) -> Any:
        return None if encoded is None else self._coder.decode(encoded)
