"""Settings of Redis and Kafka clients, except timeouts: address, TLS and credentials.

Every `redis.Redis` and every kafka-python client in the project is made with these settings.
"""

import logging
from typing import Any
from urllib.parse import urlsplit

from core.credentials import Credentials, credentials, variable
from core.errors import UserError
from core.kafka_config import KafkaAccessConfig
from core.redis_config import RedisAccessConfig

_TELLING_LOGGERS = ("kafka.admin.client", "kafka.net.connection", "kafka.protocol.parser")
"""At DEBUG these loggers write what kafka-python is configured with and sends, including passwords."""
FROM_ENVIRONMENT = RedisAccessConfig()
"""Credentials from environment variables, if they are set."""


class _Hidden(str):
    """A string whose `repr` hides it, because clients may print their settings."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'**********'"


def _is_no_detail(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def redis_settings(url: str, access: RedisAccessConfig = FROM_ENVIRONMENT) -> dict[str, Any]:
    """Arguments of `redis.Redis.from_url(url, ...)`. Raises `UserError` for credentials that cannot be read."""
    settings: dict[str, Any] = {}
    if urlsplit(url).scheme == "rediss":
        settings["ssl_check_hostname"] = True  # Not by default.
    found = credentials("redis", access.redis_credentials_file)
    if found is not None:
        settings |= {"username": found.username, "password": _Hidden(found.password.get_secret_value())}
    return settings


def kafka_settings(brokers: str, access: KafkaAccessConfig) -> dict[str, Any]:
    """Arguments of kafka-python's clients. Raises `UserError` for credentials or a CA file that cannot be read."""
    security = access.kafka_security
    settings: dict[str, Any] = {"bootstrap_servers": brokers.split(","), "security_protocol": security.value}
    if security.has_tls and access.kafka_ca_file is not None:
        if not access.kafka_ca_file.is_file():
            raise UserError(f"kafka_ca_file: {str(access.kafka_ca_file)!r} is no file; name the CA's certificate")
        settings["ssl_cafile"] = str(access.kafka_ca_file)
    if security.has_user:
        user = kafka_user(access)
        for name in _TELLING_LOGGERS:
            logging.getLogger(name).addFilter(_is_no_detail)
        settings |= {
            "sasl_mechanism": access.kafka_sasl_mechanism.value,
            "sasl_plain_username": user.username,
            "sasl_plain_password": _Hidden(user.password.get_secret_value()),
        }
    return settings


def kafka_user(access: KafkaAccessConfig) -> Credentials:
    """Credentials for a `kafka_security` with a user. Raises `UserError` if this host has none."""
    found = credentials("kafka", access.kafka_credentials_file)
    if found is None or found.username is None:
        raise UserError(
            f"kafka_security: {access.kafka_security} needs a user and a password; set {variable('kafka', 'username')} "
            f"and {variable('kafka', 'password')}, or give --kafka-credentials-file"
        )
    for value in (found.username, found.password.get_secret_value()):
        # Flink's connector reads both out of a quoted text, where others would end it or stand for something else.
        if not (value.isascii() and value.isprintable()) or not set(value).isdisjoint('"\\'):
            raise UserError("kafka_security: user and password are of ASCII, without double quotes and backslashes")
    return found
