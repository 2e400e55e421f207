"""Secrets of this host: who its clients of Redis and Kafka are, and the key that authenticates chunks.

They come from the environment or from a file that its owner alone may read, and are read where they are used. A
configuration travels with a job, to be seen on Flink's pages: it holds the path of such a file at most.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from core.errors import UserError

CHUNK_KEY_VARIABLE = "INFERTUNER_CHUNK_KEY"
LEAST_KEY_CHARACTERS = 32
FOR_OTHERS = 0o077
"""Permissions of group and others; a file of secrets grants none of them."""
_BLANKS = " \t\f"
_read: set[str] = set()
"""Every secret that this process has read, for `without_secrets`."""


@dataclass(frozen=True)
class Credentials:
    """Who a client says it is. Its text leaves the password out."""

    username: str | None
    password: SecretStr


def variable(service: str, name: str) -> str:
    """The environment variable of the `username` or `password` of `redis` or `kafka`."""
    return f"INFERTUNER_{service}_{name}".upper()


def credentials(service: str, file: Path | None) -> Credentials | None:
    """Credentials of `redis` or `kafka`, from `file` or, without one, from the environment; none if neither has any.

    Raises `UserError` for a file that is missing, that others may read, or that names no password.
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
            # Kafka's own reader of such files takes these for something else.
            raise UserError(f"{place}: {name} holds a backslash or ends with a blank; choose one without")
    username, password = found.get("username"), found.get("password")
    if not password:
        raise UserError(f"{place}: there is no password; write username=NAME and password=PASSWORD, a line each")
    return Credentials(username or None, _secret(password))


def chunk_key(file: Path | None) -> SecretStr | None:
    """The key of authenticated chunks: the text in `file` or, without one, in the environment; none: there is none.

    Raises `UserError` for a file that is missing or that others may read, and for a key that could be guessed.
    """
    key = (os.environ.get(CHUNK_KEY_VARIABLE, "") if file is None else _text("chunk_key_file", file)).strip()
    if file is None and not key:
        return None
    if len(key) < LEAST_KEY_CHARACTERS:
        place = CHUNK_KEY_VARIABLE if file is None else f"chunk_key_file: {str(file)!r}"
        raise UserError(f"{place}: shorter than {LEAST_KEY_CHARACTERS} characters; make one with openssl rand -hex 32")
    return _secret(key)


def without_secrets(text: str) -> str:
    """`text` with stars for every secret that this process has read: a server may send back what it was sent.

    Redis does so for a command that it does not know, cut off at 128 characters, which may be half a secret.
    """
    text = text.partition(", with args beginning with")[0]
    for secret in sorted(_read, key=len, reverse=True):
        text = text.replace(secret, "**********")
    return text


def in_one_line(error: BaseException) -> str:
    """What a client's error says, in one line without secrets."""
    return without_secrets(" ".join(str(error).split())) or type(error).__name__


def _secret(value: str) -> SecretStr:
    _read.add(value)
    return SecretStr(value)


def _text(option: str, file: Path) -> str:
    """What is in `file`, which only its owner may read."""
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
    """The `name=value` lines of `text`, as far as Java's properties and this agree on them."""
    found = {}
    for line in text.splitlines():
        name, is_one, value = line.lstrip(_BLANKS).partition("=")
        if is_one and not name.startswith(("#", "!")):
            found[name.rstrip(_BLANKS)] = value.lstrip(_BLANKS)
    return {name: found.get(name, "") for name in ("username", "password")}
