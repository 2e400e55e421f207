"""Secrets come from a file readable only by its owner, or from the environment, and are never in a message."""

import pickle
from pathlib import Path

import pytest

from core.clients import kafka_settings, redis_settings
from core.config import HostFile
from core.credentials import chunk_key, credentials, in_one_line, without_secrets
from core.errors import UserError
from core.kafka_config import KafkaAccessConfig, KafkaSecurity
from core.options import Parser, add_options, from_options
from core.redis_config import RedisAccessConfig
from local_stack import StackConfig
from operators.config import JobConfig

KEY = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_USERNAME", "REDIS_PASSWORD", "KAFKA_USERNAME", "KAFKA_PASSWORD", "CHUNK_KEY"):
        monkeypatch.delenv(f"INFERTUNER_{name}", raising=False)
    # These secrets are short, so they must not be masked in texts of other tests.
    monkeypatch.setattr("core.credentials._read", set())


@pytest.fixture
def written(tmp_path: Path):
    """Writes a file of secrets."""

    def write(text: str, mode: int = 0o600) -> HostFile:
        file = tmp_path / "secrets"
        file.write_text(text)
        file.chmod(mode)
        return file

    return write


@pytest.mark.parametrize("service", ["redis", "kafka"])
class TestCredentials:
    def test_there_may_be_none(self, service: str) -> None:
        assert credentials(service, None) is None

    def test_of_the_environment(self, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"INFERTUNER_{service.upper()}_PASSWORD", "from env")
        found = credentials(service, None)
        assert (found.username, found.password.get_secret_value()) == (None, "from env")
        monkeypatch.setenv(f"INFERTUNER_{service.upper()}_USERNAME", "alice")
        assert credentials(service, None).username == "alice"

    def test_a_file_goes_before_the_environment(self, service, written, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"INFERTUNER_{service.upper()}_PASSWORD", "from env")
        found = credentials(service, written("# ours\n\n  username = alice\npassword=a=b # c\nother\n"))
        assert (found.username, found.password.get_secret_value()) == ("alice", "a=b # c")

    def test_the_last_line_of_a_name_counts(self, service, written) -> None:
        assert credentials(service, written("password=a\npassword=b")).password.get_secret_value() == "b"

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o644])
    def test_a_file_that_others_may_read_is_refused(self, service, written, mode: int) -> None:
        with pytest.raises(
            UserError, match=rf"^{service}_credentials_file: others may read '.*'; run chmod 600 on it$"
        ):
            credentials(service, written("password=x", mode))

    def test_a_missing_file_is_named(self, service, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=rf"^{service}_credentials_file: cannot read '.*none' \(No such file"):
            credentials(service, tmp_path / "none")

    @pytest.mark.parametrize("text", ["", "username=alice", "pasword=x", "password=", "password x", "#password=x"])
    def test_a_file_without_a_password_is_refused(self, service, written, text: str) -> None:
        with pytest.raises(UserError, match=rf"^{service}_credentials_file: '.*': there is no password; write"):
            credentials(service, written(text))

    @pytest.mark.parametrize("value", ["a\\tb", "secret ", "\\u0041"])
    def test_what_java_would_read_otherwise_is_refused(self, service, written, value: str) -> None:
        with pytest.raises(UserError, match="holds a backslash or ends with a blank") as caught:
            credentials(service, written(f"username=alice\npassword={value}\n"))
        assert value not in str(caught.value)

    def test_a_file_that_is_no_text_is_refused(self, service, tmp_path: Path) -> None:
        file = tmp_path / "binary"
        file.write_bytes(b"\xff\xfe")
        file.chmod(0o600)
        with pytest.raises(UserError, match="is no text in UTF-8"):
            credentials(service, file)

    def test_a_user_alone_is_refused(self, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"INFERTUNER_{service.upper()}_USERNAME", "alice")
        with pytest.raises(UserError, match=rf"^INFERTUNER_{service.upper()}_PASSWORD: there is no password"):
            credentials(service, None)

    def test_no_text_of_them_holds_the_password(self, service, written) -> None:
        found = credentials(service, written("username=alice\npassword=hunter2"))
        assert "hunter2" not in repr(found) + str(found) + f"{vars(found)}"


class TestTexts:
    def test_a_secret_that_was_read_is_not_told(self, written) -> None:
        credentials("redis", written("password=s3cr3t-of-texts"))
        error = RuntimeError("they said\n 's3cr3t-of-texts' is wrong")
        assert in_one_line(error) == "they said '**********' is wrong"
        assert without_secrets("nothing") == "nothing"
        assert in_one_line(TimeoutError()) == "TimeoutError"

    def test_what_redis_sends_back_is_cut_off(self) -> None:
        said = "ERR unknown command 'AUTH', with args beginning with: 'alice' 'half-of-a-passwo"
        assert without_secrets(said) == "ERR unknown command 'AUTH'"


class TestChunkKey:
    def test_of_the_environment_or_a_file(self, written, monkeypatch: pytest.MonkeyPatch) -> None:
        assert chunk_key(None) is None
        monkeypatch.setenv("INFERTUNER_CHUNK_KEY", KEY)
        assert chunk_key(None).get_secret_value() == KEY
        assert chunk_key(written(f"{KEY[::-1]}\n")).get_secret_value() == KEY[::-1]
        assert KEY not in repr(chunk_key(None))

    @pytest.mark.parametrize("text", ["", "short", KEY[1:]])
    def test_a_key_that_could_be_guessed_is_refused(self, written, text: str) -> None:
        with pytest.raises(
            UserError, match=r"^chunk_key_file: '.*': shorter than 32 characters; make one with openssl"
        ):
            chunk_key(written(text))

    def test_the_environments_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("INFERTUNER_CHUNK_KEY", "short")
        with pytest.raises(UserError, match=r"^INFERTUNER_CHUNK_KEY: shorter"):
            chunk_key(None)

    def test_a_file_that_others_may_read_is_refused(self, written) -> None:
        with pytest.raises(UserError, match=r"^chunk_key_file: others may read"):
            chunk_key(written(KEY, 0o644))


def options_of(config, *arguments: str):
    parser = Parser(prog="job")
    add_options(parser, config)
    return from_options(config, parser.parse_args(arguments))


class TestOptions:
    @pytest.mark.parametrize("config", [JobConfig, StackConfig])
    @pytest.mark.parametrize(
        "url",
        [
            "redis://:hunter2@host:6379/0",
            "rediss://alice:hunter2@host",
            "redis://alice@host",
            "redis://host:6379/0?password=hunter2",
            "redis://host?db=1&username=alice",
            "redis://:hun/ter2@host",
            "redis://:hunter2@[::1",
        ],
    )
    def test_a_url_with_a_user_or_password_is_refused_and_not_told(self, config, url: str) -> None:
        with pytest.raises(UserError) as caught:
            options_of(config, f"--redis-url={url}")
        line = str(caught.value)
        assert line.startswith("--redis-url: ")
        assert "ter2" not in line
        assert "alice" not in line
        assert "\n" not in line
        if "[" not in url:
            assert "INFERTUNER_REDIS_PASSWORD" in line
            assert "--redis-credentials-file" in line

    def test_a_unix_socket_has_another_way_to_write_an_at(self) -> None:
        assert options_of(JobConfig, "--redis-url=unix:///tmp/a%40b.sock").cache.remote.redis_url

    @pytest.mark.parametrize(
        "option", ["redis-credentials-file", "kafka-credentials-file", "kafka-ca-file", "chunk-key-file"]
    )
    @pytest.mark.parametrize("path", ["secrets", "./secrets", "/a:b", "/a}b", '/a"b', "/a,b", "/a\\b"])
    def test_a_path_that_means_something_else_on_other_hosts_or_to_kafka(self, option: str, path: str) -> None:
        with pytest.raises(UserError, match=rf"^--{option}: (is read on every host|has one of)"):
            options_of(JobConfig, "--kafka-security=SASL_SSL", f"--{option}={path}")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (
                ["--kafka-ca-file=/ca.pem"],
                "--kafka-ca-file is only read over TLS; add --kafka-security SSL or SASL_SSL",
            ),
            (["--kafka-ca-file=/ca.pem", "--kafka-security=SASL_PLAINTEXT"], "--kafka-ca-file is only read over TLS"),
            (["--kafka-credentials-file=/c"], "--kafka-credentials-file is only read with SASL"),
            (
                ["--kafka-credentials-file=/c", "--kafka-security=SSL"],
                "--kafka-credentials-file is only read with SASL",
            ),
        ],
    )
    def test_what_would_not_be_used_is_refused(self, arguments: list[str], said: str) -> None:
        with pytest.raises(UserError, match=f"^{said}"):
            options_of(JobConfig, *arguments)

    def test_a_broker_that_is_started_needs_its_settings(self) -> None:
        with pytest.raises(UserError, match=r"^--kafka-security is set up at the broker; .*--kafka-properties"):
            options_of(StackConfig, "--kafka-security=SASL_PLAINTEXT")
        assert options_of(StackConfig, "--kafka-security=SASL_PLAINTEXT", "--brokers=h:1").brokers == "h:1"


class TestClients:
    def test_of_redis(self, written, monkeypatch: pytest.MonkeyPatch) -> None:
        assert redis_settings("redis://h") == {}
        assert redis_settings("rediss://h") == {"ssl_check_hostname": True}
        monkeypatch.setenv("INFERTUNER_REDIS_PASSWORD", "hunter2")
        assert redis_settings("redis://h") == {"username": None, "password": "hunter2"}
        file = RedisAccessConfig(redis_credentials_file=written("username=alice\npassword=other"))
        assert redis_settings("redis://h", file) == {"username": "alice", "password": "other"}
        assert "other" not in repr(redis_settings("redis://h", file))

    def test_of_kafka(self, written, tmp_path: Path) -> None:
        assert kafka_settings("a:1,b:2", KafkaAccessConfig()) == {
            "bootstrap_servers": ["a:1", "b:2"],
            "security_protocol": "PLAINTEXT",
        }
        (ca := tmp_path / "ca.pem").touch()
        file = written("username=alice\npassword=hunter2")
        access = KafkaAccessConfig(
            kafka_security=KafkaSecurity.SASL_SSL,
            kafka_sasl_mechanism="SCRAM-SHA-512",
            kafka_ca_file=ca,
            kafka_credentials_file=file,
        )
        found = kafka_settings("a:1", access)
        assert found == {
            "bootstrap_servers": ["a:1"],
            "security_protocol": "SASL_SSL",
            "ssl_cafile": str(ca),
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": "alice",
            "sasl_plain_password": "hunter2",
        }
        # kafka-python prints its settings.
        assert "hunter2" not in f"{found}"

    def test_kafka_needs_a_user_where_it_asks_for_one(self, written) -> None:
        access = KafkaAccessConfig(kafka_security=KafkaSecurity.SASL_SSL)
        with pytest.raises(UserError, match=r"^kafka_security: SASL_SSL needs a user and a password; set INFERTUNER_K"):
            kafka_settings("a:1", access)
        nameless = access.model_copy(update={"kafka_credentials_file": written("password=x")})
        with pytest.raises(UserError, match="needs a user and a password"):
            kafka_settings("a:1", nameless)

    @pytest.mark.parametrize("password", ['a"b', "a\\b", "a\tb", "ü"])
    def test_what_the_connector_could_not_quote_is_refused(self, password: str, monkeypatch) -> None:
        monkeypatch.setenv("INFERTUNER_KAFKA_USERNAME", "alice")
        monkeypatch.setenv("INFERTUNER_KAFKA_PASSWORD", password)
        with pytest.raises(UserError, match="of ASCII, without double quotes and backslashes") as caught:
            kafka_settings("a:1", KafkaAccessConfig(kafka_security=KafkaSecurity.SASL_PLAINTEXT))
        assert password not in str(caught.value)

    def test_a_ca_that_is_no_file_is_named(self, tmp_path: Path) -> None:
        access = KafkaAccessConfig(kafka_security=KafkaSecurity.SSL, kafka_ca_file=tmp_path / "none")
        with pytest.raises(UserError, match=r"^kafka_ca_file: '.*none' is no file"):
            kafka_settings("a:1", access)

    def test_what_travels_with_a_job_holds_no_secret(self, written, monkeypatch: pytest.MonkeyPatch) -> None:
        file = written("username=alice\npassword=hunter2")
        monkeypatch.setenv("INFERTUNER_CHUNK_KEY", KEY)
        job = options_of(
            JobConfig, "--kafka-security=SASL_PLAINTEXT", f"--kafka-credentials-file={file}",
            "--redis-url=redis://h", f"--redis-credentials-file={file}",
        )  # fmt: skip
        kafka_settings(job.kafka.brokers, job.kafka.access)
        assert b"hunter2" not in pickle.dumps(job)
        assert KEY.encode() not in pickle.dumps(job)
        assert "hunter2" not in job.model_dump_json()
