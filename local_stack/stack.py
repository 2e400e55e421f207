"""The whole stack. A state file records each started process at once, and `stop` ends the recorded processes."""

import fcntl
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from core.config import Config
from core.errors import UserError
from core.options import flatten
from local_stack.config import StackConfig
from local_stack.flink import FlinkService
from local_stack.kafka import KafkaService
from local_stack.processes import Started, end, is_alive
from local_stack.redis import RedisService
from local_stack.service import NotReady, Service, refuse_taken_ports, require_own, wait_ready


class State(Config):
    """Content of the state file: options of the running stack, and its processes in the order of their start."""

    config: StackConfig
    processes: tuple[Started, ...] = ()


@dataclass(frozen=True)
class Addresses:
    brokers: str
    redis_url: str
    flink_rest_url: str
    flink_home: Path
    conf_dir: Path


@dataclass(frozen=True)
class Health:
    """State of one service: `problem` is none if it answers and all its processes run."""

    service: Service
    processes: tuple[Started, ...]
    problem: str | None


class LocalStack:
    """Kafka, Redis and Flink in one folder. The context manager starts them on entry and stops them on exit."""

    def __init__(self, config: StackConfig) -> None:
        self.config = config.model_copy(update={"dir": config.dir.resolve()})
        self._flink = FlinkService(self.config)
        # In the order of their start. Flink takes longest, so the others start while it does.
        self._services: tuple[Service, ...] = (self._flink, RedisService(self.config), KafkaService(self.config))

    @classmethod
    def running_in(cls, directory: Path) -> Self | None:
        """Return the stack that was started in `directory` and not stopped, with its options; none if there is none."""
        state = _read_state(directory.resolve())
        return None if state is None else cls(state.config)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def addresses(self) -> Addresses:
        """Addresses of the services, including the user's own."""
        flink, redis, kafka = (service.address for service in self._services)
        return Addresses(
            brokers=kafka,
            redis_url=redis,
            flink_rest_url=flink,
            flink_home=self._flink.home,
            conf_dir=self._flink.conf_dir,
        )

    def start(self) -> bool:
        """Start the services that do not run; return when all answer. False if all were running already.

        Services that were started with these options and are well keep running. The rest of a service that has died or
        is not well is ended first. Any exception, including an interruption, ends what was started. Raises `UserError`.
        """
        with _locked(self.config.dir):
            before = self._before()
            kept = () if before is None else self._well()
            names = {process.name for process in kept}
            missing = [
                (service, name)
                for service in self._services
                if service.own
                for name in service.processes
                if name not in names
            ]
            for service in self._services:
                if not service.own:
                    require_own(service)
            if not missing:
                return False
            self._end_all_but(kept)
            # A service that keeps running holds its ports itself.
            refuse_taken_ports([service for service in self._services if service.own and not _any_of(service, kept)])
            if before is None:
                self._flink.forget_jobs()
            if not _any_of(self._flink, kept):
                self._flink.write_client_files()
            try:
                self._launch(missing, kept)
            except BaseException:
                self._end_all_but(kept)
                raise
            return True

    def stop(self) -> int:
        """End exactly what was started in this folder. Return the number of processes."""
        with _locked(self.config.dir):
            return self._end_all_but(())

    @property
    def processes(self) -> tuple[Started, ...]:
        """Processes that were started in this folder and not stopped, dead ones included."""
        state = _read_state(self.config.dir)
        return () if state is None else state.processes

    def health(self) -> list[Health]:
        """Probe every service and return its state."""
        recorded = self.processes
        return [self._health_of(service, recorded) for service in self._services]

    def _health_of(self, service: Service, recorded: tuple[Started, ...]) -> Health:
        mine = tuple(process for process in recorded if process.service == service.name)
        if service.own and not mine:
            return Health(service, mine, "not started")
        alive = {process.name for process in mine if is_alive(process)}
        dead = [name for name in service.processes if name not in alive]
        if service.own and dead:
            return Health(service, mine, f"{', '.join(dead)} ended")
        try:
            service.probe()
        except NotReady as reason:
            return Health(service, mine, str(reason))
        return Health(service, mine, None)

    def _before(self) -> State | None:
        """Return the state of a stack that was started here with these options; none if all must be started.

        Raises `UserError` if a stack with other options is running and well.
        """
        state = _read_state(self.config.dir)
        if state is None:
            return None
        running, wanted = dict(flatten(state.config)), dict(flatten(self.config))
        # Timeouts belong to one command, not to the running stack.
        differing = [
            f"--{name.replace('_', '-')} is {running[name]}"
            for name in wanted
            if running[name] != wanted[name] and name not in {"start_timeout_s", "stop_grace_s"}
        ]
        if not differing:
            return state
        if any(part.problem for part in LocalStack(state.config).health()):
            return None
        raise UserError(
            f"a stack with other options runs in {self.config.dir} ({', '.join(differing)}); "
            "stop it first or choose another --dir"
        )

    def _well(self) -> tuple[Started, ...]:
        """Return the processes that may stay: running ones, except those of a complete service that does not answer."""
        kept: list[Started] = []
        for part in self.health():
            alive = [process for process in part.processes if is_alive(process)]
            if part.problem is None or len(alive) < len(part.service.processes):
                kept += alive
        return tuple(kept)

    def _launch(self, missing: Sequence[tuple[Service, str]], kept: tuple[Started, ...]) -> None:
        deadline_s = time.monotonic() + self.config.start_timeout_s
        state = State(config=self.config, processes=kept)
        _write_state(state)
        for service, name in missing:
            state = state.model_copy(update={"processes": (*state.processes, service.launch(name))})
            _write_state(state)
        for service in dict.fromkeys(service for service, _ in missing):
            mine = [process for process in state.processes if process.service == service.name]
            wait_ready(service, mine, self.config.dir / "log", deadline_s)

    def _end_all_but(self, kept: tuple[Started, ...]) -> int:
        """End the recorded processes that are not in `kept`. Return their number."""
        state = _read_state(self.config.dir)
        if state is None:
            return 0
        ended = end([process for process in state.processes if process not in kept], self.config.stop_grace_s)
        if kept:
            _write_state(state.model_copy(update={"processes": kept}))
        else:
            _state_file(self.config.dir).unlink()
        return ended


def _any_of(service: Service, processes: Iterable[Started]) -> bool:
    return any(process.service == service.name for process in processes)


def _state_file(directory: Path) -> Path:
    return directory / "state.json"


def _read_state(directory: Path) -> State | None:
    file = _state_file(directory)
    try:
        return State.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise UserError(
            f"{file} is not a state file of this version; end its processes by hand and delete it"
        ) from None


def _write_state(state: State) -> None:
    file = _state_file(state.config.dir)
    fresh = file.with_suffix(".new")
    fresh.write_text(state.model_dump_json(indent=1))
    fresh.replace(file)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Allow one start or stop at a time per folder; another one waits."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
