"""Security properties of the Kafka connector's clients: protocol, certificates and user.

Flink's pages and logs show the options of a table, so they contain no secret. Kafka's config providers replace
`${env:NAME}` and `${file:PATH:name}` in each client by values of its own host.
"""

from core.credentials import variable
from core.kafka_config import KafkaAccessConfig, SaslMechanism

SHADED = "org.apache.flink.kafka.shaded."
"""Package prefix of Kafka's classes in Flink's SQL connector."""
_PROVIDERS = SHADED + "org.apache.kafka.common.config.provider."
_LOGIN_MODULES = {
    SaslMechanism.PLAIN: "plain.PlainLoginModule",
    SaslMechanism.SCRAM_SHA_256: "scram.ScramLoginModule",
    SaslMechanism.SCRAM_SHA_512: "scram.ScramLoginModule",
}


def security_properties(access: KafkaAccessConfig) -> dict[str, str]:
    """Return the properties for a producer, a consumer or an admin client of the connector."""
    security = access.kafka_security
    properties = {"security.protocol": security.value}
    if security.has_tls and access.kafka_ca_file is not None:
        properties |= {"ssl.truststore.type": "PEM", "ssl.truststore.location": str(access.kafka_ca_file)}
    if security.has_user:
        properties |= {"sasl.mechanism": access.kafka_sasl_mechanism.value} | _login(access)
    return properties


def _login(access: KafkaAccessConfig) -> dict[str, str]:
    file = access.kafka_credentials_file
    if file is not None:
        provider = {"config.providers": "file", "config.providers.file.class": _PROVIDERS + "FileConfigProvider"}
        # Restrict the provider to this file, whatever a property asks for.
        provider["config.providers.file.param.allowed.paths"] = str(file)
        user, password = f"${{file:{file}:username}}", f"${{file:{file}:password}}"
    else:
        provider = {"config.providers": "env", "config.providers.env.class": _PROVIDERS + "EnvVarConfigProvider"}
        user, password = (f"${{env:{variable('kafka', name)}}}" for name in ("username", "password"))
    module = f"{SHADED}org.apache.kafka.common.security.{_LOGIN_MODULES[access.kafka_sasl_mechanism]}"
    return provider | {"sasl.jaas.config": f'{module} required username="{user}" password="{password}";'}
