"""Secrets of this host: credentials for Redis and Kafka, and the key that authenticates chunks.

A secret comes from an environment variable, or from a file that only its owner may read. It is read where it is used. A
configuration travels with its job and is shown on Flink's pages, so it only holds the path of such a file.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from core.errors import UserError

CHUNK_KEY_VARIABLE = "INFERTUNER_CHUNK_KEY"
LEAST_KEY_CHARACTERS = 32
FOR_OTHERS = 0o077
"""Permission bits of group and others. A file with secrets must have none of them."""
_BLANKS = " \t\f"
_read: set[str] = set()
"""Every secret that this process has read, for `without_secrets`."""


@dataclass(frozen=True)
class Credentials:
    """User name and password of a client. Its text hides the password."""

    username: str | None
    password: SecretStr


def variable(service: str, name: str) -> str:
    """The environment variable with the `username` or `password` (`name`) for `redis` or `kafka` (`service`)."""
    return f"INFERTUNER_{service}_{name}".upper()


def credentials(service: str, file: Path | None) -> Credentials | None:
    """Credentials for `redis` or `kafka` from `file`, or without a file from the environment; none if it has none.

    Raises `UserError` for a file that is missing, that others may read, or that has no password.
    """
    option = f"{service}_credentials_file"
    if file is not None:
        found, place = _properties(_text(option, file)), f"{option}: {str(file)!r}"
    else:
        found = {name: os.environ.get(variable(service, name), "") for name in ("username", "password")}
        place = variable(service, "password")
        if not any(found.values()):
            return None
    for name, value in found.items():
        if file is not None and ("\\" in value or value != value.rstrip(_BLANKS)):
            # Kafka's own reader of such files would read these values differently.
            raise UserError(f"{place}: {name} holds a backslash or ends with a blank; choose one without")
    username, password = found.get("username"), found.get("password")
    if not password:
        raise UserError(f"{place}: there is no password; write username=NAME and password=PASSWORD, a line each")
    return Credentials(username or None, _secret(password))


def chunk_key(file: Path | None) -> SecretStr | None:
    """The key that authenticates chunks, from `file`, or without a file from the environment; none if it has none.

    Raises `UserError` for a file that is missing or that others may read, and for a key that is too short.
    """
    key = (os.environ.get(CHUNK_KEY_VARIABLE, "") if file is None else _text("chunk_key_file", file)).strip()
    if file is None and not key:
        return None
    if len(key) < LEAST_KEY_CHARACTERS:
        place = CHUNK_KEY_VARIABLE if file is None else f"chunk_key_file: {str(file)!r}"
        raise UserError(f"{place}: shorter than {LEAST_KEY_CHARACTERS} characters; make one with openssl rand -hex 32")
    return _secret(key)


def without_secrets(text: str) -> str:
    """`text` with every secret that this process has read replaced by stars. A server may send back what it got.

    Redis does so for an unknown command. It cuts the command off after 128 characters, which may leave half a secret.
    """
    text = text.partition(", with args beginning with")[0]
    for secret in sorted(_read, key=len, reverse=True):
        text = text.replace(secret, "**********")
    return text


def in_one_line(error: BaseException) -> str:
    """The message of a client's error, in one line and without secrets."""
    return without_secrets(" ".join(str(error).split())) or type(error).__name__


def _secret(value: str) -> SecretStr:
    _read.add(value)
    return SecretStr(value)


def _text(option: str, file: Path) -> str:
    """The text of `file`. Only its owner may be allowed to read it."""
    try:
        with file.open(encoding="utf-8") as opened:
            if os.fstat(opened.fileno()).st_mode & FOR_OTHERS:
                raise UserError(f"{option}: others may read {str(file)!r}; run chmod 600 on it")
            return opened.read()
    except OSError as error:
        raise UserError(f"{option}: cannot read {str(file)!r} ({error.strerror}); it is needed on every host") from None
    except UnicodeDecodeError:
        raise UserError(f"{option}: {str(file)!r} is no text in UTF-8") from None


def _properties(text: str) -> dict[str, str]:
    """The `name=value` lines of `text`, as Java reads property files."""
    found = {}
    for line in text.splitlines():
        name, is_one, value = line.lstrip(_BLANKS).partition("=")
        if is_one and not name.startswith(("#", "!")):
            found[name.rstrip(_BLANKS)] = value.lstrip(_BLANKS)
    return {name: found.get(name, "") for name in ("username", "password")}
