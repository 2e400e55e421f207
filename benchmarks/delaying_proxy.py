"""A TCP proxy that delays each answer of a server by a fixed time, like a server far away.

    python -m benchmarks.delaying_proxy PORT DELAY_MS

It listens on a free port of 127.0.0.1, prints the port, and ends when its standard input ends. As a separate process it
takes no time of the interpreter that is measured.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from experiments.config import ROOT

READ_BYTES = 1 << 18


@contextmanager
def delayed(port: int, delay_ms: float) -> Iterator[int]:
    """Run a proxy before `port` of 127.0.0.1 and give its port."""
    command = [sys.executable, "-m", "benchmarks.delaying_proxy", str(port), str(delay_ms)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not (line := process.stdout.readline()).strip():
                raise RuntimeError(f"the proxy ended with status {process.wait()}")
            yield int(line)
        finally:
            process.stdin.close()
            process.wait()


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Forward each piece in order, and finally the end, `delay_s` after it arrived."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def send() -> None:
        while True:
            due_s, piece = await pieces.get()
            await asyncio.sleep(due_s - loop.time())
            if not piece:
                return
            writer.write(piece)
            await writer.drain()

    async def receive() -> None:
        piece = b"."
        while piece:
            piece = await reader.read(READ_BYTES)
            pieces.put_nowait((loop.time() + delay_s, piece))

    with contextlib.suppress(ConnectionError):
        await asyncio.gather(receive(), send())
    writer.close()


async def _connect(port: int, delay_s: float, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
    server, orders = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(_hand_on(client, orders, 0.0), _hand_on(server, answers, delay_s))


async def _serve(port: int, delay_s: float) -> None:
    server = await asyncio.start_server(partial(_connect, port, delay_s), "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2]) / 1000))
