"""Errors that the user can fix: one line that names the field and the fix."""

import sys
from collections.abc import Callable, Mapping

from pydantic import ValidationError

MOST_FAULTS = 8
LONGEST_FAULT = 300
"""Maximum number of faults in a line, and of characters per fault. A record may have many, with long names."""


class UserError(Exception):
    """The user's input is wrong. `str(error)` is one line that says what is wrong and how to fix it."""


def faults(error: ValidationError) -> list[tuple[str, str]]:
    """Each fault of a pydantic validation: the dotted path of its field (empty for the whole), and the message."""
    found = []
    reported = error.errors(include_url=False, include_context=False, include_input=False)
    for fault in reported:
        # pydantic also reports a collection as too short if its first item is invalid, which is not true.
        if fault["type"] == "too_short" and any(_is_within(other["loc"], fault["loc"]) for other in reported):
            continue
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown field; remove it"
        elif fault["type"] == "missing":
            message = "missing; add it"
        found.append((".".join(str(part) for part in fault["loc"]), message))
    return found


def _is_within(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def one_line(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """The faults of a pydantic validation in one line: `field: message; field: message`, the first few in full.

    `names` maps top-level fields to the names by which the user knows them.
    """
    found = [(_renamed(place, names or {}), message) for place, message in faults(error)]
    named = [f"{place or 'record'}: {message}"[:LONGEST_FAULT] for place, message in found[:MOST_FAULTS]]
    if len(found) > MOST_FAULTS:
        named.append(f"and {len(found) - MOST_FAULTS} more")
    return " ".join("; ".join(named).split())


def _renamed(place: str, names: Mapping[str, str]) -> str:
    first, dot, rest = place.partition(".")
    return names.get(first, first) + dot + rest


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command's `main`. A `UserError` becomes one line on stderr and exit status 2, without a traceback."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
