"""Registries: what an option accepts, and when an implementation is imported."""

import sys
from collections.abc import Callable
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from core.errors import UserError
from core.options import Parser, add_options, from_options
from core.registry import Registry

COLOURS = Registry({"red": "nowhere:Red", "blue": "nowhere:Blue"})


class Paint(BaseModel):
    """What to paint with."""

    colour: Annotated[str, COLOURS] = Field(default="red", description="colour of the paint")


def painted(*arguments: str) -> str:
    parser = Parser(prog="paint")
    add_options(parser, Paint)
    return from_options(Paint, parser.parse_args(arguments)).colour


def test_an_option_takes_the_names_and_no_others() -> None:
    assert painted("--colour", "blue") == "blue"
    with pytest.raises(UserError, match=r"^--colour: Input should be 'red' or 'blue'$"):
        painted("--colour", "Blue")


def test_one_name_is_no_list() -> None:
    with pytest.raises(ValueError, match=r"^Input should be 'red'$"):
        Registry({"red": "nowhere:Red"}).checked("blue")


def test_the_help_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        painted("--help")
    assert "colour of the paint; one of red, blue (default: red)" in " ".join(capsys.readouterr().out.split())


def test_what_is_added_is_accepted_and_imported_when_it_is_chosen(register: Callable[..., None]) -> None:
    register(COLOURS, "green", "make", "def make():\n    return 'as grass'\n")
    assert painted("--colour", "green") == "green"
    assert "added_green" not in sys.modules
    assert COLOURS.load("green")() == "as grass"
