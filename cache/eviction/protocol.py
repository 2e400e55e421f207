"""What the local tier tells an eviction policy, and what it asks of it."""

from collections.abc import Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """An order over the keys that the local tier holds. Knows neither capacity nor leases nor tensors."""

    def on_insert(self, key: bytes) -> None:
        """`key` is in the tier now; it was not before."""
        ...

    def on_access(self, key: bytes) -> None:
        """`key`, which is in the tier, was used."""
        ...

    def on_remove(self, key: bytes) -> None:
        """`key`, which was in the tier, is gone."""
        ...

    def victims(self) -> Iterator[bytes]:
        """Every key of the tier once, the first to leave first. Valid until the next call that changes the order.

        The tier takes the first that no lease holds, and reports it by `on_remove`.
        """
        ...
