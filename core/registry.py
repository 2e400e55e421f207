"""Named implementations that an option chooses from."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Registry:
    """The implementations of one kind by name, in the order in which the option's help lists them.

    To add one, write its file and add its line: `"NAME": "package.module:attribute"`. The attribute is a class, or a
    function that makes an instance. Its module is imported by `load`, so importing a registry costs nothing.

    A field annotated with `Annotated[str, REGISTRY]` accepts the names only.
    """

    def __init__(self, places: dict[str, str]) -> None:
        self.places = places
        """Where each implementation is, by name."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def load(self, name: str) -> Any:
        """Import the implementation called `name`. Raises `KeyError` for a name that is not registered."""
        module, _, attribute = self.places[name].partition(":")
        return getattr(import_module(module), attribute)

    def checked(self, name: str) -> str:
        """`name`, if it is registered. Raises `ValueError` that lists the names otherwise."""
        if name not in self.places:
            *others, last = (f"'{known}'" for known in self)
            raise ValueError(f"Input should be {', '.join(others)} or {last}" if others else f"Input should be {last}")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.checked, handler(source))
