"""Errors a person can act on: one line that names the field and the fix."""

from collections.abc import Callable
import sys

from pydantic import ValidationError


class UserError(Exception):
    """Something the user gave is wrong; `str(error)` is one line that says what and how to mend it."""


def one_line(error: ValidationError) -> str:
    """All faults of a pydantic validation in one line: `field: what is wrong; field: ...`."""
    faults = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(str(part) for part in fault["loc"]) or "record"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown field; remove it"
        elif fault["type"] == "missing":
            message = "missing; add it"
        faults.append(f"{place}: {message}")
    return " ".join("; ".join(faults).split())


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit status 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
