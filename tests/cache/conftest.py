import pytest
import redis
from cache_support import Proxy, RedisServer, make_cache


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def client(redis_server):
    """A plain client of an empty Redis."""
    client = redis.Redis(port=redis_server.port)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def proxy(redis_server, client):
    proxy = Proxy(redis_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def caches():
    """Makes caches, and closes them at the end."""
    opened = []

    def make(*args, **kwargs):
        opened.append(make_cache(*args, **kwargs))
        return opened[-1]

    yield make
    for cache in opened:
        cache.close(0.5)
