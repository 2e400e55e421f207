"""What Kafka, Redis and Flink have in common: an address, processes that are launched, and a probe."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from core.errors import UserError
from local_stack.config import ROOT, port_is_free
from local_stack.processes import Started, is_alive

PROBE_EVERY_S = 0.1
PROBE_TIMEOUT_S = 3.0
LOG_TAIL_LINES = 15


class NotReady(Exception):  # noqa: N818 - not an error while it starts
    """A service does not answer as it should (yet); the text says why."""


class Service(Protocol):
    name: str
    address: str
    address_option: str
    """The option that names a user's own one."""
    own: bool
    """Whether it is started here; otherwise the user said where one runs."""
    processes: tuple[str, ...]
    """Names of the processes that it consists of where it is started here, in the order of their start."""

    def ports(self) -> dict[str, int]:
        """The ports that it will listen on, by the option that sets them."""
        ...

    def launch(self, process: str) -> Started:
        """Start that one of its processes; does not wait until it answers."""
        ...

    def probe(self) -> None:
        """Ask for one answer. Raises `NotReady`."""
        ...


def refuse_taken_ports(services: Iterable[Service]) -> None:
    """Raises `UserError` naming every port that is taken or used twice, and the option that changes it."""
    faults = []
    seen: dict[int, str] = {}
    for service in services:
        for option, port in service.ports().items():
            if port in seen:
                faults.append(f"port {port} of {service.name} is also {seen[port]}; choose another with {option}")
            elif not port_is_free(port):
                faults.append(
                    f"port {port} of {service.name} is taken; choose another with {option}, "
                    f"or use a {service.name} of your own with {service.address_option}"
                )
            seen[port] = option
    if faults:
        raise UserError("; ".join(faults))


def require_own(service: Service) -> None:
    """Raises `UserError` if the user's own service does not answer."""
    try:
        service.probe()
    except NotReady as reason:
        raise UserError(
            f"{service.address_option}: no {service.name} answers at {service.address} ({reason}); "
            "start it or correct the address, or leave the option out to have one started"
        ) from None


def wait_ready(service: Service, started: Iterable[Started], logs: Path, deadline_s: float) -> None:
    """Probe until it answers. Raises `UserError` with the end of the log if it dies or `deadline_s` passes.

    `deadline_s` is a point of `time.monotonic()`.
    """
    started = tuple(started)
    while True:
        dead = [process for process in started if not is_alive(process)]
        if dead:
            raise UserError(f"{dead[0].name} ended while starting" + log_tail(dead[0], logs))
        try:
            return service.probe()
        except NotReady as reason:
            if time.monotonic() > deadline_s:
                raise UserError(
                    f"{service.name} is not ready in time ({reason}); allow more with --start-timeout-s"
                    + "".join(log_tail(process, logs) for process in started)
                ) from None
        time.sleep(PROBE_EVERY_S)


def program(name: str) -> str:
    """Path of a program: of `JAVA_HOME`, on the PATH, or where scripts/setup.sh puts it. Raises `UserError`."""
    java_home = os.environ.get("JAVA_HOME")
    places: tuple[Callable[[], str | None], ...] = (
        lambda: shutil.which(name, path=f"{java_home}/bin") if java_home else None,
        lambda: shutil.which(name),
        lambda: shutil.which(name, path=str(ROOT / ".local" / "bin")),
    )
    for place in places:
        if found := place():
            return found
    raise UserError(f"{name} is not installed; run scripts/setup.sh")


def log_tail(process: Started, logs: Path) -> str:
    """The last lines that a process has logged, and where; below whatever is said of it."""
    files = sorted({*logs.glob(process.log), logs / f"{process.name}.out"}, key=lambda file: file.stat().st_mtime)
    filled = [file for file in files if file.stat().st_size]
    if not filled:
        return f"\n--- {process.name} has logged nothing in {logs}"
    lines = filled[-1].read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return f"\n--- end of {filled[-1]}\n" + "\n".join(lines)
