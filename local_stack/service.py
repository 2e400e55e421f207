"""The common interface of Kafka, Redis and Flink: an address, processes to launch, and a probe."""

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
    """A service does not answer as it should (yet). The text gives the reason."""


class Service(Protocol):
    name: str
    address: str
    address_option: str
    """The option with the address of the user's own service."""
    own: bool
    """True if the stack starts the service, false if the user gave the address of a running one."""
    processes: tuple[str, ...]
    """Names of the service's processes if the stack starts it, in the order of their start."""

    def ports(self) -> dict[str, int]:
        """Ports on which the service will listen, by the option that sets them."""
        ...

    def launch(self, process: str) -> Started:
        """Start this process of the service, without waiting until it answers."""
        ...

    def probe(self) -> None:
        """Send one request. Raises `NotReady` if the service does not answer as it should."""
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
                    f"or use your own {service.name} with {service.address_option}"
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
    """Probe until the service answers. Raises `UserError` with the end of the log if it dies or at `deadline_s`.

    `deadline_s` is a time of `time.monotonic()`.
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
    """Find a program in `JAVA_HOME`, on the PATH, or where scripts/setup.sh installs it. Raises `UserError`."""
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
    """Return the last lines of a process's log, with the path, to append to a message."""
    files = sorted({*logs.glob(process.log), logs / f"{process.name}.out"}, key=lambda file: file.stat().st_mtime)
    filled = [file for file in files if file.stat().st_size]
    if not filled:
        return f"\n--- {process.name} has logged nothing in {logs}"
    lines = filled[-1].read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return f"\n--- end of {filled[-1]}\n" + "\n".join(lines)
