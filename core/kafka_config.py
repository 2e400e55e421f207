"""How to reach Kafka, and the topics of a job."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from core.config import Config, HostFile
from core.records import MAX_RESULT_BYTES


class KafkaSecurity(StrEnum):
    """Security protocols of Kafka clients, by Kafka's names."""

    PLAINTEXT = "PLAINTEXT"
    SSL = "SSL"
    SASL_PLAINTEXT = "SASL_PLAINTEXT"
    SASL_SSL = "SASL_SSL"

    @property
    def has_tls(self) -> bool:
        return self in (KafkaSecurity.SSL, KafkaSecurity.SASL_SSL)

    @property
    def has_user(self) -> bool:
        return self in (KafkaSecurity.SASL_PLAINTEXT, KafkaSecurity.SASL_SSL)


class SaslMechanism(StrEnum):
    """SASL mechanisms, by Kafka's names."""

    PLAIN = "PLAIN"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_512 = "SCRAM-SHA-512"


class KafkaAccessConfig(Config):
    """Security protocol and credentials for Kafka."""

    kafka_security: KafkaSecurity = Field(
        default=KafkaSecurity.PLAINTEXT,
        description="security protocol: PLAINTEXT, SSL (TLS), SASL_PLAINTEXT (user), or SASL_SSL (TLS and user)",
    )
    kafka_sasl_mechanism: SaslMechanism = Field(
        default=SaslMechanism.PLAIN, description="SASL mechanism: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"
    )
    kafka_ca_file: HostFile | None = Field(
        default=None,
        description="SSL: path on each host of a PEM file with the certificate of the CA to trust; none: the CAs "
        "that Java and Python trust by default",
    )
    kafka_credentials_file: HostFile | None = Field(
        default=None,
        description="SASL: path on each host of a file with username=... and password=..., readable only by its "
        "owner; none: the environment variables INFERTUNER_KAFKA_USERNAME and INFERTUNER_KAFKA_PASSWORD",
    )

    @model_validator(mode="after")
    def _all_of_it_is_used(self) -> Self:
        # A user who sets a file must not believe in a protection that the protocol does not give.
        if self.kafka_ca_file is not None and not self.kafka_security.has_tls:
            raise ValueError("kafka_ca_file is only read over TLS; add --kafka-security SSL or SASL_SSL")
        if self.kafka_credentials_file is not None and not self.kafka_security.has_user:
            raise ValueError("kafka_credentials_file is only read with SASL; add --kafka-security SASL_SSL")
        return self


class KafkaConfig(Config):
    """The brokers, the topics and the consumer group."""

    brokers: str = Field(default="127.0.0.1:9092", min_length=1, description="Kafka bootstrap servers, host:port,...")
    topic_prefix: str = Field(
        default="llm",
        pattern=r"^[A-Za-z0-9._-]{1,200}$",
        description="prefix of the topics: PREFIX.requests, PREFIX.responses, ...",
    )
    consumer_group: str = Field(default="infertuner", min_length=1, description="Kafka consumer group of the job")
    access: KafkaAccessConfig = KafkaAccessConfig()

    @property
    def requests_topic(self) -> str:
        return f"{self.topic_prefix}.requests"

    @property
    def responses_topic(self) -> str:
        return f"{self.topic_prefix}.responses"

    @property
    def dead_letters_topic(self) -> str:
        return f"{self.topic_prefix}.dead-letters"

    @property
    def ready_topic(self) -> str:
        """Gets one record per slot when its model is loaded and warm."""
        return f"{self.topic_prefix}.ready"

    def topic_settings(self, topic: str) -> dict[str, str]:
        """Topic settings that `topic` is created with."""
        # Recovery searches for answers by record time, so all records should be stamped by one clock: the broker's.
        settings = {"message.timestamp.type": "LogAppendTime"}
        if topic in (self.responses_topic, self.dead_letters_topic):
            settings["max.message.bytes"] = str(MAX_RESULT_BYTES)
        return settings

    @property
    def topics(self) -> tuple[str, ...]:
        return (self.requests_topic, self.responses_topic, self.dead_letters_topic, self.ready_topic)
