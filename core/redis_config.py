"""How to reach Redis: its address and the credentials."""

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
"""Where a Redis is, and nothing of who asks."""


class RedisAccessConfig(Config):
    """Who asks Redis. Over TLS the URL is `rediss://host:port/db?ssl_ca_certs=FILE`."""

    redis_credentials_file: HostFile | None = Field(
        default=None,
        description="file, on each host, with password=... and maybe username=..., readable by its owner alone; none: "
        "INFERTUNER_REDIS_USERNAME and INFERTUNER_REDIS_PASSWORD of its environment, if set",
    )
