"""Makes command-line options from configuration classes, with the same names, defaults and checks."""

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from core.errors import UserError, faults
from core.registry import Registry

C = TypeVar("C", bound=BaseModel)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports errors in one line. argparse itself prints the whole usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def add_options(parser: argparse.ArgumentParser, config: type[BaseModel]) -> None:
    """Adds one option for each field of `config` and of the configurations nested in it, which become help groups.

    If two configurations have a field of the same name, the option belongs to the first.
    """
    _add_options(parser, config, set())


def _add_options(parser: argparse.ArgumentParser, config: type[BaseModel], taken: set[str]) -> None:
    group = parser.add_argument_group(config.__name__, (config.__doc__ or "").splitlines()[0])
    for name, field in config.model_fields.items():
        nested = _nested(field)
        if nested is not None:
            _add_options(parser, nested, taken)
            continue
        if name in taken:
            continue
        taken.add(name)
        flag = "--" + name.replace("_", "-")
        default = field.get_default(call_default_factory=True)
        help_text = f"{_described(name, field)} (default: {'none' if default is None else default})"
        help_text = help_text.replace("%", "%%")  # argparse formats it with its own values
        # Defaults are suppressed: the parsed options only hold what was given, and the model adds its own defaults.
        if field.annotation is bool:
            group.add_argument(
                flag, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text
            )
        else:
            metavar = name.rsplit("_", 1)[-1].upper()
            group.add_argument(flag, dest=name, metavar=metavar, default=argparse.SUPPRESS, help=help_text)


def set_own_defaults(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Gives some options another default than their configuration's, in the help too."""
    parser.set_defaults(**defaults)
    # argparse has no public way to its options.
    for action in parser._actions:
        if action.dest in defaults:
            head, _, _ = (action.help or "").rpartition(" (default: ")
            action.help = f"{head} (default: {defaults[action.dest]})"


def from_options(config: type[C], options: argparse.Namespace) -> C:
    """The configuration from the parsed `options`. Raises `UserError` with one line that names each bad option."""
    try:
        return config.model_validate(_gather(config, dict(vars(options))))
    except ValidationError as error:
        raise UserError(_as_options(config, error)) from None


def to_options(config: BaseModel) -> list[str]:
    """The command line from which `from_options` makes `config` again.

    It includes defaults, because a command may have other defaults. It only leaves out fields that are none.
    """
    arguments: list[str] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            arguments += to_options(value)
        elif value is not None:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                arguments.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                # One word, because a separate value that begins with a dash would be read as an option.
                arguments.append(f"--{flag}={value}")
    return arguments


def flatten(config: BaseModel) -> Iterator[tuple[str, Any]]:
    """Name and value of each field, including nested ones, in the order of the options."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from flatten(value)
        else:
            yield name, value


def _described(name: str, field: FieldInfo) -> str:
    """The description of the option, and the names that it chooses from."""
    choices = [choice for registry in field.metadata if isinstance(registry, Registry) for choice in registry]
    return f"{field.description or name}{'; one of ' if choices else ''}{', '.join(choices)}"


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _gather(config: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    """Takes the values for the fields of `config` out of `given`. The first field of a name gets the value."""
    values: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        nested = _nested(field)
        if nested is not None:
            values[name] = _gather(nested, given)
        elif name in given:
            values[name] = given.pop(name)
    return values


def _as_options(config: type[BaseModel], error: ValidationError) -> str:
    """All errors in one line, with the names that the user typed: `cache.chunk_tokens` is `--chunk-tokens`."""
    names = set(_leaves(config))

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    lines = []
    for place, message in faults(error):
        option = _option(config, place)
        if option is not None:
            lines.append(f"{flag(option)}: {message}")
        else:  # An error of several fields together. The message names them.
            whole_words = r"(?<![\w/.-])\w+(?![\w/-]|\.\w)"
            lines.append(re.sub(whole_words, lambda word: flag(word[0]) if word[0] in names else word[0], message))
    return " ".join("; ".join(lines).split())


def _option(config: type[BaseModel], place: str) -> str | None:
    """The field at the dotted path, or whose value the path leads into; none if the path ends at a group of fields."""
    nested: type[BaseModel] | None = config
    for name in place.split("."):
        if nested is None or name not in nested.model_fields:
            return None
        nested = _nested(nested.model_fields[name])
        if nested is None:
            return name
    return None


def _leaves(config: type[BaseModel]) -> Iterator[str]:
    for name, field in config.model_fields.items():
        nested = _nested(field)
        if nested is None:
            yield name
        else:
            yield from _leaves(nested)
