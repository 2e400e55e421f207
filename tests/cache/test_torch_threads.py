"""The cache's threads compute without a thread team; other threads keep their number of threads."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_support import hits, make_cache, prompt, store

from cache.payload import RawPayload
from cache.torch_threads import use_one_thread

N = 3


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_thread(call: Callable[[], None]) -> int:
    """Call `call` in a new thread; return its `torch.get_num_threads`."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: (call(), found.append(torch.get_num_threads())))
    thread.start()
    thread.join()
    return found[0]


def noting(threads: set[int], method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `method` to append its number of threads to `threads`."""

    def noted(self, what):
        threads.add(torch.get_num_threads())
        return method(self, what)

    return noted


def test_only_the_thread_that_asks_for_it_computes_alone():
    assert in_a_thread(use_one_thread) == 1
    assert torch.get_num_threads() == 3
    assert in_a_thread(lambda: None) == 3


def test_what_goes_to_redis_and_comes_from_there_is_computed_alone(redis_server, monkeypatch):
    used: dict[str, set[int]] = {"pack": set(), "unpack": set()}
    for name, threads in used.items():
        monkeypatch.setattr(RawPayload, name, noting(threads, getattr(RawPayload, name)))
    writer, reader = make_cache(redis_server.url), make_cache(redis_server.url)
    tokens = prompt(N)
    store(writer, tokens)
    assert writer.flush(10)
    assert hits(reader, tokens) == (0, N)
    assert used == {"pack": {1}, "unpack": {1}}
    assert torch.get_num_threads() == 3
    for cache in (writer, reader):
        cache.close()
