"""The command behind scripts/cluster.sh: start, stop or show the local stack."""

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console
from rich.table import Table

from core.errors import exit_on_user_error
from core.options import Parser, add_options, from_options
from local_stack.config import StackConfig
from local_stack.processes import Started, members
from local_stack.stack import LocalStack

CONSOLE = Console(highlight=False, soft_wrap=True)
MIB = 1 << 20


def main() -> None:
    """Run the command of `sys.argv`."""
    parser = Parser(prog="scripts/cluster.sh", description="Kafka, Redis and Flink on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="start | stop | status")
    add_options(commands.add_parser("start", help="start what does not run; return when all answer"), StackConfig)
    for name, help_text in (("stop", "end what start has started"), ("status", "show it; exit status 1 if not well")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--dir", metavar="DIR", default=argparse.SUPPRESS, help="the --dir given to start")
    options = parser.parse_args()
    config = from_options(StackConfig, options)
    # Unwind as Ctrl-C does, which ends what was started.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        {"start": _start, "stop": _stop, "status": _status}[options.command](config)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _start(config: StackConfig) -> None:
    stack = LocalStack(config)
    begin_s = time.monotonic()
    with CONSOLE.status("starting Kafka, Redis and Flink ..."):
        started = stack.start()
    CONSOLE.print(f"started in {time.monotonic() - begin_s:.1f} s" if started else "already running")
    _show(stack)


def _stop(config: StackConfig) -> None:
    begin_s = time.monotonic()
    with CONSOLE.status("stopping ..."):
        ended = LocalStack(_of_running(config.dir) or config).stop()
    CONSOLE.print(
        f"stopped {ended} processes in {time.monotonic() - begin_s:.1f} s" if ended else "nothing was running"
    )


def _status(config: StackConfig) -> None:
    if not _show(LocalStack(_of_running(config.dir) or config)):
        sys.exit(1)


def _show(stack: LocalStack) -> bool:
    """Print the table; return true if all services are well."""
    parts = stack.health()
    table = Table("part", "state", "address", "processes", box=None, pad_edge=False)
    for part in parts:
        state = f"[red]{part.problem}[/red]" if part.problem else "healthy"
        running = ", ".join(map(_process, part.processes)) or ("-" if part.service.own else "your own")
        table.add_row(part.service.name, state, part.service.address, running)
    CONSOLE.print(table)
    CONSOLE.print(f"logs: {stack.config.dir / 'log'}")
    return not any(part.problem for part in parts)


def _process(started: Started) -> str:
    resident_bytes = 0
    for process in members(started):
        try:
            resident_bytes += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return f"{started.name} {started.pid} ({resident_bytes // MIB} MiB)"


def _of_running(directory: Path) -> StackConfig | None:
    running = LocalStack.running_in(directory)
    return None if running is None else running.config


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    exit_on_user_error(main)
