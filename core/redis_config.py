"""How to reach Redis: its address, and the credentials for it."""

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field

from core.config import Config, HostFile


def _redis_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        named = {"username", "password"} & parse_qs(parts.query).keys()
    except ValueError:
        raise ValueError("is no URL; write redis://host:port/db") from None
    if "@" in url or named:
        raise ValueError(
            "names a user or a password, which others may see there; set INFERTUNER_REDIS_USERNAME and "
            "INFERTUNER_REDIS_PASSWORD instead, or give --redis-credentials-file"
        )
    database = parts.path.strip("/")
    # The client would take database 0 for any other word.
    if parts.scheme in ("redis", "rediss") and database and not (database.isascii() and database.isdigit()):
        raise ValueError(f"names the database {database!r}, which is no number; write redis://host:port/0")
    return url


RedisUrl = Annotated[str, AfterValidator(_redis_url)]
"""The address of a Redis, without credentials."""


class RedisAccessConfig(Config):
    """Credentials for Redis. For TLS the URL is `rediss://host:port/db?ssl_ca_certs=FILE`."""

    redis_credentials_file: HostFile | None = Field(
        default=None,
        description="path on each host of a file with password=... and optionally username=..., readable only by "
        "its owner; none: the environment variables INFERTUNER_REDIS_USERNAME and "
        "INFERTUNER_REDIS_PASSWORD, if set",
    )
