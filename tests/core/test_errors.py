"""User errors, and the clock of the tests."""

import pytest
from pydantic import BaseModel, ValidationError

from core.clock import ManualClock, SystemClock
from core.errors import UserError, exit_on_user_error, faults, one_line


class Inner(BaseModel, extra="forbid"):
    size: int


class Outer(BaseModel, extra="forbid"):
    inner: Inner
    name: str


def error_of(value: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    return caught.value


def test_every_fault_is_told_in_one_line() -> None:
    line = one_line(error_of({"inner": {"size": "big", "a\nb": 1}}))
    assert line.split("; ") == [
        "inner.size: Input should be a valid integer, unable to parse string as an integer",
        "inner.a b: unknown field",
        "remove it",
        "name: missing",
        "add it",
    ]


def test_a_fault_of_the_whole_is_the_records() -> None:
    assert faults(error_of(3))[0][0] == ""
    assert one_line(error_of(3)).startswith("record: ")


def test_the_line_holds_nothing_of_the_input() -> None:
    assert "secret" not in one_line(error_of({"inner": {"size": "secret"}, "name": ["secret"]}))


def test_a_user_error_ends_the_command_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("device: there is none; use cpu")

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(main)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: device: there is none; use cpu\n")


def test_any_other_error_passes_on() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: print(1 // 0))  # noqa: T201


def test_no_error_is_no_exit(capsys: pytest.CaptureFixture[str]) -> None:
    exit_on_user_error(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_a_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(5.0)
    assert (clock.wall_ms(), clock.monotonic_ms()) == (5.0, 5.0)
    clock.advance(2.5)
    assert (clock.wall_ms(), clock.monotonic_ms()) == (7.5, 7.5)


def test_the_system_clock_counts_milliseconds() -> None:
    clock = SystemClock()
    assert clock.wall_ms() > 1.6e12
    first = clock.monotonic_ms()
    assert 0 <= clock.monotonic_ms() - first < 60_000
