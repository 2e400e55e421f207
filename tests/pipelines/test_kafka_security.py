"""Kafka with users and TLS: tested with every client of ours, the connector's clients, and a whole job.

One real broker has a listener in plain text and one with TLS, both with users. The job gets only paths: no page of
Flink, log or command line contains a secret.
"""

import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from kafka import KafkaAdminClient
from kafka.admin import NewTopic, ScramMechanism, UserScramCredentialUpsertion
from redis import Redis

from core.clients import kafka_settings
from core.errors import UserError
from core.kafka_config import KafkaAccessConfig, KafkaConfig, KafkaSecurity, SaslMechanism
from experiments.flink_job import FlinkCluster
from experiments.kafka_topics import at_end, fresh_topics, reading, require_broker
from local_stack import LocalStack, StackConfig
from local_stack.config import JARS
from local_stack.flink import DIRECT
from local_stack.kafka import KafkaService
from local_stack.service import NotReady
from operators.config import JobConfig
from pipelines.connectors import ensure_topics
from pipelines.kafka_security import security_properties
from tests.pipelines.job_run import ROOT, Run, listening_on, processes_of
from tests.tls import Certificates, make_certificates
from workloads.kafka_generator import connected

USER = "alice"
JOB = ROOT / "pipelines" / "inference.py"
SASL_TLS, SASL_PLAIN_TEXT = KafkaSecurity.SASL_SSL, KafkaSecurity.SASL_PLAINTEXT

BROKER = """\
listeners=CLIENTS://127.0.0.1:{port},OVERTLS://127.0.0.1:{tls_port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=CLIENTS://127.0.0.1:{port},OVERTLS://127.0.0.1:{tls_port}
listener.security.protocol.map=CLIENTS:SASL_PLAINTEXT,OVERTLS:SASL_SSL,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
sasl.mechanism.inter.broker.protocol=PLAIN
ssl.keystore.type=PEM
ssl.keystore.location={key_and_certificate}
"""
PLAIN_MODULE = "org.apache.kafka.common.security.plain.PlainLoginModule"
SCRAM_MODULE = "org.apache.kafka.common.security.scram.ScramLoginModule"


def secret() -> str:
    """A secret with every character that some parser on the way might interpret."""
    return f"{secrets.token_hex(8)} ';=#${{x:y}}!:,"


@dataclass(frozen=True)
class Secured:
    """A broker that accepts only users."""

    stack: LocalStack
    over_tls: str
    """Its address for TLS."""
    certificates: Certificates
    password: str
    credentials: Path

    @property
    def brokers(self) -> str:
        return self.stack.addresses().brokers

    def access(
        self, security: KafkaSecurity = SASL_PLAIN_TEXT, mechanism: str = "PLAIN", file: Path | None = None
    ) -> KafkaAccessConfig:
        return KafkaAccessConfig(
            kafka_security=security,
            kafka_sasl_mechanism=SaslMechanism(mechanism),
            kafka_ca_file=self.certificates.ca if security.has_tls else None,
            kafka_credentials_file=file or self.credentials,
        )

    def address(self, security: KafkaSecurity) -> str:
        return self.over_tls if security.has_tls else self.brokers


def credentials_file(path: Path, password: str, username: str = USER) -> Path:
    path.write_text(f"# of a test\nusername={username}\npassword={password}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def secured(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A separate broker, with the shared Redis and Flink. Its users log in by PLAIN and by SCRAM."""
    directory = tmp_path_factory.mktemp("secured")
    password = secret()
    made = make_certificates(directory / "tls")
    shared = stack.addresses()
    config = StackConfig.on_free_ports(directory / "stack", redis_url=shared.redis_url, flink_url=shared.flink_rest_url)
    tls_port = config.flink_port  # Free, as its Flink is another's.
    settings = directory / "broker.properties"
    settings.touch(mode=0o600)
    jaas = f'{PLAIN_MODULE} required username="{USER}" password="{password}" user_{USER}="{password}";'
    settings.write_text(
        BROKER.format(
            port=config.kafka_port,
            tls_port=tls_port,
            controller_port=config.kafka_controller_port,
            key_and_certificate=made.key_and_certificate,
        )
        + f"listener.name.clients.plain.sasl.jaas.config={jaas}\n"
        + f"listener.name.overtls.plain.sasl.jaas.config={jaas}\n"
        + "".join(
            f"listener.name.{name}.scram-sha-{bits}.sasl.jaas.config={SCRAM_MODULE} required;\n"
            for name in ("clients", "overtls")
            for bits in (256, 512)
        )
    )
    file = credentials_file(directory / "kafka.credentials", password)
    access = KafkaAccessConfig(kafka_security=SASL_PLAIN_TEXT, kafka_credentials_file=file)
    config = config.model_copy(update={"kafka_properties": settings, "kafka_access": access})
    with LocalStack(config) as running:
        admin = KafkaAdminClient(**kafka_settings(running.addresses().brokers, access))
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):  # Not both in one request.
            told = admin.alter_user_scram_credentials([UserScramCredentialUpsertion(USER, mechanism, password)])
            assert told == {USER: None}
        admin.close()
        yield Secured(running, f"127.0.0.1:{tls_port}", made, password, file)


class TestProperties:
    """Properties of the connector, without a broker."""

    def test_in_plain_text_there_is_nothing_else(self) -> None:
        assert security_properties(KafkaAccessConfig()) == {"security.protocol": "PLAINTEXT"}

    def test_over_tls(self) -> None:
        ca = Path("/etc/ca.pem")
        assert security_properties(KafkaAccessConfig(kafka_security=KafkaSecurity.SSL, kafka_ca_file=ca)) == {
            "security.protocol": "SSL",
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": "/etc/ca.pem",
        }
        assert security_properties(KafkaAccessConfig(kafka_security=KafkaSecurity.SSL)) == {"security.protocol": "SSL"}

    @pytest.mark.parametrize("mechanism", SaslMechanism)
    def test_a_user_is_a_reference(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism) -> None:
        monkeypatch.setenv("INFERTUNER_KAFKA_USERNAME", USER)
        monkeypatch.setenv("INFERTUNER_KAFKA_PASSWORD", "hunter2")
        file = credentials_file(tmp_path / "file", "hunter2")
        for given in (None, file):
            access = KafkaAccessConfig(
                kafka_security=SASL_TLS, kafka_sasl_mechanism=mechanism, kafka_credentials_file=given
            )
            found = security_properties(access)
            assert "hunter2" not in str(found)
            assert USER not in str(found)
            assert found["sasl.mechanism"] == mechanism.value
            assert "${" in found["sasl.jaas.config"]

    def test_its_classes_are_in_the_connector(self) -> None:
        """Another build of the connector may have other class names, and the job would not start."""
        (jar,) = (JARS / "connector").glob("flink-sql-connector-kafka-*.jar")
        held = subprocess.run(
            [sys.executable, "-m", "zipfile", "-l", str(jar)], capture_output=True, text=True, check=True
        ).stdout
        for mechanism in SaslMechanism:
            for given in (None, Path("/file")):
                access = KafkaAccessConfig(
                    kafka_security=SASL_TLS, kafka_sasl_mechanism=mechanism, kafka_credentials_file=given
                )
                found = security_properties(access)
                module = found["sasl.jaas.config"].split()[0]
                provider = found[f"config.providers.{found['config.providers']}.class"]
                for name in (module, provider):
                    assert f"{name.replace('.', '/')}.class" in held


def connector_clients(properties: Sequence[Mapping[str, str]], env: Mapping[str, str], lib: Path) -> list[object]:
    """Output of the connector's client with each of `properties`, in a JVM with `env`."""
    flink_home = Path(sys.modules["pyflink"].__path__[0])
    lib.mkdir()
    for jar in (*(flink_home / "lib").glob("*.jar"), *(JARS / "connector").glob("*.jar")):
        (lib / jar.name).symlink_to(jar)
    # PyFlink uses FLINK_LIB_DIR only if FLINK_HOME is set.
    paths = {"FLINK_HOME": str(flink_home), "FLINK_LIB_DIR": str(lib), "PYTHONPATH": str(ROOT)}
    quick = {"default.api.timeout.ms": "20000", "request.timeout.ms": "20000"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("connector_client.py"))],
        input="".join(json.dumps({**quick, **one}) + "\n" for one in properties),
        env={**os.environ, **paths, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.integration
class TestConnector:
    def test_the_connectors_own_client_logs_in(self, secured: Secured, tmp_path: Path) -> None:
        """Kafka's config providers insert the credentials, from a file and from the environment."""
        admin = KafkaAdminClient(**kafka_settings(secured.brokers, secured.access()))
        admin.create_topics([NewTopic("connector-sees-this", 1, 1)])
        admin.close()
        wrong = credentials_file(tmp_path / "wrong", "wrong")
        other = make_certificates(tmp_path / "other")
        by_file = [
            (SASL_PLAIN_TEXT, secured.access()),
            (SASL_TLS, secured.access(SASL_TLS, "SCRAM-SHA-512")),
        ]
        by_environment = [
            (security, access.model_copy(update={"kafka_credentials_file": None}))
            for security, access in (
                (SASL_TLS, secured.access(SASL_TLS)),
                (SASL_PLAIN_TEXT, secured.access(SASL_PLAIN_TEXT, "SCRAM-SHA-256")),
            )
        ]
        refused = [
            (SASL_PLAIN_TEXT, secured.access(file=wrong)),
            (SASL_TLS, secured.access(SASL_TLS).model_copy(update={"kafka_ca_file": other.ca})),
        ]
        said = connector_clients(
            [
                {"bootstrap.servers": secured.address(security)} | security_properties(access)
                for security, access in (*by_file, *by_environment, *refused)
            ],
            {"INFERTUNER_KAFKA_USERNAME": USER, "INFERTUNER_KAFKA_PASSWORD": secured.password},
            tmp_path / "lib",
        )
        assert said[:4] == [["connector-sees-this"]] * 4
        assert "SaslAuthenticationException" in str(said[4])
        assert "CertPath" in str(said[5])
        assert not any(secret in str(said) for secret in (secured.password, "wrong"))


@pytest.mark.integration
class TestClients:
    """Clients of kafka-python, with each listener and mechanism, and all their logs at DEBUG."""

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shorten timeouts: kafka-python retries until its timeout, whatever the broker answers."""
        monkeypatch.setattr("experiments.kafka_topics.CONNECT_TIMEOUT_MS", 2000)
        monkeypatch.setattr("local_stack.kafka.PROBE_TIMEOUT_S", 2.0)

    @pytest.mark.parametrize(
        ("security", "mechanism"),
        [(SASL_PLAIN_TEXT, "PLAIN"), (SASL_PLAIN_TEXT, "SCRAM-SHA-256"), (SASL_TLS, "SCRAM-SHA-512")],
    )
    def test_records_come_and_go_and_no_log_has_the_password(
        self, secured: Secured, security: KafkaSecurity, mechanism: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        kafka = KafkaConfig(
            brokers=secured.address(security),
            topic_prefix=f"clients-{security}-{mechanism}",
            access=secured.access(security, mechanism),
        )
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, logger="kafka")
        require_broker(kafka)
        with fresh_topics(kafka, 1):
            with connected(kafka) as producer:
                producer.send(kafka.requests_topic, value=b"a record", key=b"a key")
                producer.flush(10)
            with reading(kafka, [kafka.requests_topic]) as consumer:
                assert [record.value for record in next(iter(consumer.poll(10_000).values()))] == [b"a record"]
                assert at_end(consumer)
        ensure_topics(JobConfig(kafka=kafka))
        assert "kafka" in {record.name.split(".")[0] for record in caplog.records}
        assert secured.password not in caplog.text
        assert secured.password.encode().decode("unicode_escape") not in caplog.text

    def test_a_wrong_password_is_one_line(
        self, secured: Secured, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, logger="kafka")
        wrong = credentials_file(tmp_path / "wrong", "not-the-password")
        kafka = KafkaConfig(brokers=secured.brokers, access=secured.access(file=wrong))
        with pytest.raises(UserError, match=r"^--brokers: Kafka at .* does not answer .*--kafka-security") as caught:
            require_broker(kafka)
        told = [str(caught.value)]
        config = secured.stack.config.model_copy(update={"kafka_access": kafka.access})
        with pytest.raises(NotReady) as not_ready:
            KafkaService(config).probe()
        told.append(str(not_ready.value))
        assert not any("\n" in line or "not-the-password" in line for line in told)
        assert "not-the-password" not in caplog.text

    def test_nobody_comes_in_without_a_user(self, secured: Secured) -> None:
        with pytest.raises(UserError, match="does not answer"):
            require_broker(KafkaConfig(brokers=secured.brokers))

    def test_the_brokers_settings_are_its_owners_alone(self, secured: Secured) -> None:
        written = secured.stack.config.dir / "kafka" / "server.properties"
        assert secured.password in written.read_text()
        assert written.stat().st_mode & 0o077 == 0

    def test_it_listens_on_loopback_only(self, secured: Secured) -> None:
        assert listening_on(processes_of(secured.stack)) == {"127.0.0.1"}


@pytest.mark.integration
def test_a_whole_job_and_nothing_that_it_leaves_holds_a_secret(
    secured: Secured, stack: LocalStack, flink: FlinkCluster, model: Path, tmp_path: Path
) -> None:
    name, redis_password, chunk_key = "secured-job", secrets.token_hex(16), secrets.token_hex(32)
    redis_file = credentials_file(tmp_path / "redis.credentials", redis_password, name)
    key_file = tmp_path / "chunk.key"
    key_file.touch(mode=0o600)
    key_file.write_text(chunk_key)
    rights = ["+get", "+set", "+strlen", "+unlink", "+mget", "+select"]
    with Redis.from_url(stack.addresses().redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", name, "on", f">{redis_password}", f"~{name}:*", "-@all", *rights)
    access = secured.access(SASL_TLS, "SCRAM-SHA-256")
    run = Run(stack, flink, model, name, JOB, brokers=secured.over_tls, access=access)
    try:
        ensure_topics(JobConfig(parallelism=1, kafka=run.kafka))
        run.send(30)
        run.submit(
            *("--parallelism", "1", "--bounded", "--kafka-security", "SASL_SSL"),
            *("--kafka-sasl-mechanism", "SCRAM-SHA-256", "--kafka-ca-file", str(secured.certificates.ca)),
            *("--kafka-credentials-file", str(secured.credentials), "--redis-credentials-file", str(redis_file)),
            *("--chunk-key-file", str(key_file)),
        )
        # All of its processes run by now.
        run.read_until(lambda so_far: len(so_far.ready) == 1)
        started = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        run.settle()
        assert run.job.failures() == []
        assert len(run.answered()) == 30
        with Redis.from_url(stack.addresses().redis_url) as admin:
            keys = list(admin.scan_iter(f"{name}:*"))
            assert keys, "no chunk came to Redis"
            held = b"".join(value for value in admin.mget(keys) if value)
        job = f"/jobs/{run.job.job_id}"
        pages = [job, f"{job}/config", f"{job}/plan", f"{job}/exceptions", f"{job}/checkpoints/config"]
        pages += ["/jobmanager/config", "/jobmanager/environment", "/taskmanagers", "/jobs/overview"]
        texts = {page: page_text(stack, page) for page in pages}
        logs = [file for one in (stack, secured.stack) for file in (one.config.dir / "log").iterdir()]
        texts |= {str(file): file.read_text(errors="replace") for file in logs}
        texts |= {"command lines": "\n".join(" ".join(line) for line in started)}
        texts |= {"Redis": held.decode("latin-1")}
        assert str(redis_file) in texts["command lines"] or "beam" in texts["command lines"]
        assert any(str(secured.credentials) in text for text in texts.values()), "the references are nowhere to be seen"
        for place, text in texts.items():
            for secret in (secured.password, secured.password.split()[0], redis_password, chunk_key):
                assert secret not in text, place
    finally:
        run.close()


def page_text(stack: LocalStack, page: str) -> str:
    with DIRECT.open(f"{stack.addresses().flink_rest_url}{page}", timeout=10) as answer:
        return answer.read().decode()
