"""Redis with users and TLS: with the right credentials all works, with wrong ones every lookup is a miss."""

import logging
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from cache_support import SHAPE, RedisServer, free_port, hits, prompt, store

from cache.redis_wire import RedisAddress
from cache.sizing.budget import SlotReport
from cache.sizing.gain_curve import GainCurve, Step
from core.clients import redis_settings
from core.credentials import credentials
from core.errors import UserError
from core.redis_config import RedisAccessConfig
from local_stack.config import StackConfig
from local_stack.redis import RedisService
from local_stack.service import NotReady
from operators.shared_state.chunk_budget import SharedReports
from operators.shared_state.slot_loads import LoadReporter, SharedLoads
from tests.tls import Certificates, make_certificates

N = 3
TOKENS = prompt(N)
NAMESPACE = "team-a"
PASSWORD, OTHERS_PASSWORD = "s3cr3t-of-team-a", "s3cr3t-of-nobody"
OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def acl() -> str:
    """The ACL file. The job's user has exactly the rights of docs/operations.md."""
    (line,) = re.findall(r"user infertuner on .*", OPERATIONS.read_text())
    return f"""\
user default off
{line.replace("infertuner", NAMESPACE).replace("PASSWORD", PASSWORD)}
user reader on >{PASSWORD} ~{NAMESPACE}:* resetchannels -@all +get +strlen +select
user admin on >{PASSWORD} ~* +@all
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, certificates: Certificates):
    """One port in plain text and one with TLS, with the same users."""
    directory = tmp_path_factory.mktemp("redis")
    users = directory / "users.acl"
    users.write_text(acl())
    tls_port = free_port()
    started = RedisServer(
        directory,
        *("--tls-port", str(tls_port), "--tls-auth-clients", "no", "--aclfile", str(users)),
        *("--tls-cert-file", str(certificates.certificate), "--tls-key-file", str(certificates.key)),
        *("--tls-ca-cert-file", str(certificates.ca)),
    )
    started.tls_port = tls_port
    yield started
    started.stop()


@pytest.fixture
def admin(server):
    with redis.Redis(port=server.port, username="admin", password=PASSWORD) as client:
        client.flushall()
        yield client


@pytest.fixture
def tls_url(server, certificates: Certificates) -> str:
    return f"rediss://127.0.0.1:{server.tls_port}/0?ssl_ca_certs={certificates.ca}"


@pytest.fixture
def asks_as(tmp_path: Path):
    """Makes the access configuration of a user, with a credentials file."""

    def access(username: str, password: str = PASSWORD) -> RedisAccessConfig:
        file = tmp_path / f"{username}-{len(password)}"
        file.write_text(f"username={username}\npassword={password}\n")
        file.chmod(0o600)
        return RedisAccessConfig(redis_credentials_file=file)

    return access


@pytest.fixture
def cache_of(caches, asks_as):
    def make(url: str, username: str = NAMESPACE, password: str = PASSWORD, **settings):
        access = asks_as(username, password)
        return caches(url, access=access, redis_namespace=NAMESPACE, **settings)

    return make


class TestRightAnswers:
    @pytest.mark.parametrize("kind", ["plain", "tls", "another database"])
    def test_chunks_of_one_cache_are_found_by_another(self, server, tls_url, admin, cache_of, kind: str) -> None:
        url = {"plain": server.url, "tls": tls_url, "another database": server.url[:-1] + "3"}[kind]
        writer = cache_of(url)
        store(writer, TOKENS)
        assert writer.flush(10)
        assert writer.stats().bytes_written > 0
        reading = cache_of(url)
        assert hits(reading, TOKENS) == (0, N)
        stats = reading.stats()
        assert (stats.remote_errors, stats.remote_timeouts, stats.remote_corrupt) == (0, 0, 0)
        assert all(key.startswith(b"team-a:") for key in admin.scan_iter())

    def test_large_chunks_over_tls(self, tls_url, admin, cache_of) -> None:
        """Chunks larger than one TLS record."""
        shape = replace(SHAPE, layers=8, head_dim=128)
        assert shape.size_bytes > 1 << 14
        store(writer := cache_of(tls_url, shape=shape), TOKENS)
        assert writer.flush(10)
        assert hits(cache_of(tls_url, shape=shape), TOKENS) == (0, N)

    def test_a_damaged_chunk_is_deleted(self, server, admin, cache_of) -> None:
        store(writer := cache_of(server.url), TOKENS)
        assert writer.flush(10)
        key = next(admin.scan_iter())
        admin.setrange(key, 130, b"\xff\xff")
        cache = cache_of(server.url)
        assert sum(hits(cache, TOKENS)) < N
        assert cache.stats().remote_corrupt == 1
        assert cache.flush(10)
        assert not admin.exists(key)

    def test_the_shared_state_of_a_job_works(self, server, tls_url, admin, asks_as) -> None:
        for url in (server.url, tls_url):
            access = asks_as(NAMESPACE)
            loads = SharedLoads(url, f"{NAMESPACE}:job:group", 2, access)
            loads.write(1, 12.0)
            assert loads.read() == {1: 12.0}
            loads.close()
            budget = SharedReports(url, f"{NAMESPACE}:job:group", 2, access)
            report = SlotReport(GainCurve((Step(2, 0.5),)), capacity_chunks=3)
            budget.write(0, report)
            assert budget.read() == {0: report}
            budget.close()

    def test_of_the_environment(self, server, admin, caches, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("INFERTUNER_REDIS_USERNAME", NAMESPACE)
        monkeypatch.setenv("INFERTUNER_REDIS_PASSWORD", PASSWORD)
        cache = caches(server.url, redis_namespace=NAMESPACE)
        store(cache, TOKENS)
        assert cache.flush(10)
        assert hits(caches(server.url, redis_namespace=NAMESPACE), TOKENS) == (0, N)


def misses(cache) -> int:
    """Look up, store and flush as an engine does. Nothing may be found, raised or waited for. Returns the errors."""
    began_s = time.monotonic()
    assert hits(cache, TOKENS) == (0, 0)
    store(cache, TOKENS)
    assert cache.flush(10)
    with cache.fetch_and_lookup(TOKENS) as prefix:
        assert prefix.remote_chunks == 0
    assert time.monotonic() - began_s < 5.0
    assert cache.stats().bytes_written == 0
    return cache.stats().remote_errors


class TestWrongAnswers:
    def test_a_wrong_password(self, server, tls_url, admin, cache_of, caplog) -> None:
        with caplog.at_level(logging.DEBUG):
            for url in (server.url, tls_url):
                assert misses(cache_of(url, password=OTHERS_PASSWORD, breaker_failures=1)) > 0
        assert "WRONGPASS" in caplog.text
        assert OTHERS_PASSWORD not in caplog.text
        assert admin.dbsize() == 0

    def test_no_password(self, server, admin, caches) -> None:
        assert misses(caches(server.url, redis_namespace=NAMESPACE)) > 0

    def test_a_server_of_another_ca(self, server, admin, cache_of, tmp_path, caplog) -> None:
        other = make_certificates(tmp_path / "other")
        url = f"rediss://127.0.0.1:{server.tls_port}/0?ssl_ca_certs={other.ca}"
        with caplog.at_level(logging.DEBUG):
            assert misses(cache_of(url, breaker_failures=1)) > 0
            assert misses(cache_of(f"rediss://127.0.0.1:{server.tls_port}/0")) > 0
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
        assert PASSWORD not in caplog.text

    def test_a_server_under_another_name(self, tls_url, admin, cache_of) -> None:
        assert misses(cache_of(tls_url.replace("127.0.0.1", "localhost"))) > 0

    def test_a_ca_file_that_is_missing(self, server, admin, cache_of) -> None:
        assert misses(cache_of(f"rediss://127.0.0.1:{server.tls_port}/0?ssl_ca_certs=/none.pem")) > 0

    @pytest.mark.parametrize("scheme", ["redis", "rediss"])
    def test_the_wrong_port(self, server, certificates, admin, cache_of, scheme: str) -> None:
        """A TLS client on the plain-text port, and the other way round."""
        port = server.tls_port if scheme == "redis" else server.port
        query = f"?ssl_ca_certs={certificates.ca}" if scheme == "rediss" else ""
        cache = cache_of(f"{scheme}://127.0.0.1:{port}/0{query}", remote_deadline_ms=300.0)
        began_s = time.monotonic()
        assert hits(cache, TOKENS) == (0, 0)
        assert time.monotonic() - began_s < 2.0
        assert cache.stats().remote_errors + cache.stats().remote_timeouts == 1

    def test_a_user_without_rights_to_the_keys(self, server, admin, caches, asks_as, caplog) -> None:
        with caplog.at_level(logging.DEBUG):
            cache = caches(
                server.url, access=asks_as(NAMESPACE), redis_namespace="team-b", breaker_failures=1, capacity=0
            )
            assert misses(cache) > 0
        assert "NOPERM" in caplog.text
        assert admin.dbsize() == 0

    def test_a_user_who_may_read_alone(self, server, admin, cache_of) -> None:
        store(writer := cache_of(server.url), TOKENS)
        assert writer.flush(10)
        reader = cache_of(server.url, username="reader")
        assert hits(reader, TOKENS) == (0, N)
        store(reader, prompt(N, first=7))
        assert reader.flush(10)
        stats = reader.stats()
        assert (stats.bytes_written, stats.write_dropped) == (0, N)
        assert stats.remote_errors > 0
        assert hits(reader, TOKENS) == (N, 0)

    @pytest.mark.parametrize("username", [NAMESPACE, None])
    def test_redis_that_sends_the_password_back(self, tmp_path, caches, caplog, username: str | None) -> None:
        """A server that does not know AUTH repeats it in its error, and so does redis-py."""
        server = RedisServer(tmp_path, "--rename-command", "AUTH", "")
        file = tmp_path / "file"
        file.write_text(f"password={PASSWORD}\n" + (f"username={username}\n" if username else ""))
        file.chmod(0o600)
        access = RedisAccessConfig(redis_credentials_file=file)
        try:
            with caplog.at_level(logging.DEBUG):
                assert misses(caches(server.url, access=access, breaker_failures=1)) > 0
                report = LoadReporter(SharedLoads(server.url, "loads", 1, access), 0, lambda: 1.0)
                give_up_s = time.monotonic() + 10
                while "load-report" not in caplog.text:
                    assert time.monotonic() < give_up_s
                    time.sleep(0.01)
                report.close()
            config = StackConfig(dir=tmp_path, redis_url=server.url, redis_access=access)
            with pytest.raises(NotReady, match="unknown command 'AUTH'") as caught:
                RedisService(config).probe()
            assert "unknown command 'AUTH'" in caplog.text
            assert PASSWORD not in caplog.text + str(caught.value)
        finally:
            server.stop()

    @pytest.mark.parametrize("fault", ["stall", "drip"])
    def test_a_handshake_that_never_ends_is_a_timeout(self, tls_url, server, cache_of, proxy, fault) -> None:
        proxy._target_port = server.tls_port
        getattr(proxy, fault)()
        cache = cache_of(tls_url.replace(str(server.tls_port), str(proxy.port)), remote_deadline_ms=200.0)
        began_s = time.monotonic()
        assert hits(cache, TOKENS) == (0, 0)
        assert time.monotonic() - began_s < 2.0
        assert cache.stats().remote_timeouts == 1


class TestOneLine:
    """Errors that a user sees have one line and no password."""

    @pytest.mark.parametrize("over_tls", [False, True])
    def test_a_probe(self, server, tls_url, asks_as, tmp_path, over_tls: bool) -> None:
        config = StackConfig(dir=tmp_path, redis_url=tls_url if over_tls else server.url)
        RedisService(config.model_copy(update={"redis_access": asks_as("admin")})).probe()
        wrong = config.model_copy(update={"redis_access": asks_as("admin", OTHERS_PASSWORD)})
        with pytest.raises(NotReady) as caught:
            RedisService(wrong).probe()
        assert "invalid username-password pair" in str(caught.value)
        assert OTHERS_PASSWORD not in str(caught.value)

    def test_redis_py_checks_the_servers_name(self, tls_url, admin, asks_as) -> None:
        url = tls_url.replace("127.0.0.1", "localhost")
        client = redis.Redis.from_url(url, **redis_settings(url, asks_as("admin")))
        with client, pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            client.ping()

    def test_an_address_tells_nothing(self, server, asks_as) -> None:
        address = RedisAddress.of(server.url, asks_as(NAMESPACE))
        assert PASSWORD not in f"{address} {address!r}"
        assert address.asks_as == credentials("redis", asks_as(NAMESPACE).redis_credentials_file)

    def test_credentials_that_cannot_be_read_are_named_where_the_cache_is_opened(self, server, caches) -> None:
        with pytest.raises(UserError, match="redis_credentials_file: cannot read"):
            caches(server.url, access=RedisAccessConfig(redis_credentials_file="/none"))
