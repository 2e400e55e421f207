"""Small shapes, stamped chunks, a real Redis and a proxy that misbehaves on demand."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import hypothesis
import torch

from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.manager import TwoLevelCache, open_cache
from cache.protocol import ChunkShape, ModelIdentity
from core.clock import ManualClock
from local_stack.service import program

SHAPE = ChunkShape(layers=2, kv_heads=1, chunk_tokens=4, head_dim=4, dtype=torch.float32)
C = SHAPE.chunk_tokens
IDENTITY = ModelIdentity(weights_digest="weights", tokenizer_digest="tokenizer", settings="default/10000")

LIMITS = hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def given(*strategies, **named):
    """Hypothesis' `given` with the settings of this suite."""
    return lambda test: LIMITS(hypothesis.given(*strategies, **named)(test))


def prompt(chunks: int, first: int = 0) -> list[int]:
    """A prompt with this many full chunks. It shares nothing with a prompt of another `first`."""
    return [first * 1000 + i for i in range(chunks * C)]


def stamp(tokens: list[int], index: int, salt: str = "", shape: ChunkShape = SHAPE) -> torch.Tensor:
    """The only right tensor of chunk `index`. Its bytes are derived from the salt and all tokens up to its end."""
    seed = repr((salt, tuple(tokens[: (index + 1) * shape.chunk_tokens]))).encode()
    data = hashlib.shake_128(seed).digest(shape.size_bytes)
    return finite(torch.frombuffer(bytearray(data), dtype=shape.dtype).view(shape.size))


def finite(chunk: torch.Tensor) -> torch.Tensor:
    """The bits of `chunk` with 1 in place of numbers that are not finite, because only finite chunks are kept."""
    return torch.where(chunk.isfinite(), chunk, torch.ones((), dtype=chunk.dtype))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bytes(a.view(-1).view(torch.uint8)) == bytes(b.view(-1).view(torch.uint8))
    )


def reader(tokens: list[int], salt: str = "", fail_at: int | None = None, shape: ChunkShape = SHAPE):
    """A `read_chunk` that writes stamps. At chunk `fail_at` it fails after writing half of it."""

    def read_chunk(index: int, out: torch.Tensor) -> None:
        whole = stamp(tokens, index, salt, shape)
        if index == fail_at:
            out[0].copy_(whole[0])
            raise RuntimeError("the engine failed")
        out.copy_(whole)

    return read_chunk


def store(cache: TwoLevelCache, tokens: list[int], salt: str = "") -> int:
    return cache.store(tokens, reader(tokens, salt, shape=cache.shape), salt)


def hits(cache: TwoLevelCache, tokens: list[int], salt: str = "") -> tuple[int, int]:
    """Look up a prompt, check that the chunks are a prefix of the right tensors, and return local and remote counts."""
    with cache.fetch_and_lookup(tokens, salt) as prefix:
        check_prefix(prefix, tokens, salt, cache.shape)
        return prefix.local_chunks, prefix.remote_chunks


def check_prefix(prefix, tokens: list[int], salt: str, shape: ChunkShape = SHAPE) -> None:
    assert len(prefix.chunks) == len(prefix.tiers) == prefix.local_chunks + prefix.remote_chunks
    assert len(prefix.chunks) <= len(tokens) // shape.chunk_tokens
    for index, chunk in enumerate(prefix.chunks):
        assert same_bits(chunk, stamp(tokens, index, salt, shape)), f"chunk {index} holds another's content"


def make_cache(
    url: str | None = None, capacity: int = 8, clock=None, shape: ChunkShape = SHAPE, identity=IDENTITY, **remote
) -> TwoLevelCache:
    """A cache with generous deadlines, unless they are given."""
    settings = {"redis_url": url, "remote_deadline_ms": 5000.0, "write_flush_ms": 1.0} | remote
    config = CacheConfig(
        chunk_tokens=shape.chunk_tokens,
        sizing=SizingConfig(capacity_chunks=capacity),
        remote=RemoteConfig(**settings),
    )
    return open_cache(config, shape, identity, clock or ManualClock())


def in_another_process(script: str) -> str:
    """The output of `script` under another PYTHONHASHSEED."""
    ours = os.environ.get("PYTHONHASHSEED")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONHASHSEED": "1" if ours != "1" else "2", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A real `redis-server` on a free loopback port. `further` are more options of its command line."""

    def __init__(self, directory, *further: str) -> None:
        self.port = free_port()
        self.socket_path = f"{directory}/redis.sock"
        options = [
            "--unixsocket",
            self.socket_path,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(directory),
            *further,
        ]
        self._process = subprocess.Popen(
            [program("redis-server"), "--port", str(self.port), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_for_ping()

    def _wait_for_ping(self) -> None:
        give_up_s = time.monotonic() + 20
        while time.monotonic() < give_up_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"redis-server ended with status {self._process.returncode}")
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                client.sendall(b"PING\r\n")
                if client.recv(16).startswith((b"+PONG", b"-NOAUTH")):
                    return
        raise RuntimeError("redis-server does not answer")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class Proxy:
    """A proxy between cache and Redis that damages Redis' answers; `pass_through` ends this for new connections.

    `stall`: accepts, never answers. `drip`: a byte every few milliseconds. `truncate(n)`: n bytes, then the end.
    `down`: refuses connections and cuts those that exist.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._mode = "pass"
        self._bytes_left = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._listener: socket.socket | None = None
        self.port = 0
        self.accepted = 0
        self._listen()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def pass_through(self) -> None:
        self._mode = "pass"
        if self._listener is None:
            self._listen()

    def stall(self) -> None:
        self._mode = "stall"

    def drip(self) -> None:
        self._mode = "drip"

    def truncate(self, after_bytes: int) -> None:
        self._bytes_left = after_bytes
        self._mode = "truncate"

    def down(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            _close(listener)
        self._cut()

    def close(self) -> None:
        self._ended.set()
        self.down()
        for thread in self._threads:
            thread.join(5)

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._spawn(self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._sockets += [client, server]
            self._spawn(self._pump, client, server, False)
            self._spawn(self._pump, server, client, True)

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._forward(data, target) if answers else target.sendall(data)
        _close(source)
        _close(target)

    def _forward(self, data: bytes, target: socket.socket) -> None:
        mode = self._mode
        if mode == "stall":
            return
        if mode == "drip":
            for position in range(len(data)):
                if self._ended.wait(0.005):
                    return
                target.sendall(data[position : position + 1])
            return
        if mode == "truncate":
            data, self._bytes_left = data[: self._bytes_left], self._bytes_left - len(data)
        target.sendall(data)
        if mode == "truncate" and self._bytes_left <= 0:
            raise ConnectionError

    def _cut(self) -> None:
        for sock in self._sockets:
            _close(sock)
        self._sockets.clear()

    def _spawn(self, work, *arguments) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
