"""Sends a workload to the requests topic and reports the offered and the reached rate."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError

from core.clients import kafka_settings
from core.clock import Clock
from core.credentials import in_one_line
from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.records import Request
from workloads.pacing import Backlog, Lag, OpenLoop
from workloads.timed_request import Workload

CONNECT_TIMEOUT_MS = 5_000
"""Maximum wait for the broker's first answer."""
DELIVERY_TIMEOUT_MS = 10_000
"""Maximum time until a record is acknowledged; after that it counts as an error."""


class PendingSend(Protocol):
    """A record that was sent but not yet acknowledged. Callbacks may come from another thread."""

    def add_callback(self, callback: Callable[[Any], None]) -> Any: ...

    def add_errback(self, errback: Callable[[BaseException], None]) -> Any: ...


class Producer(Protocol):
    """The part of `kafka.KafkaProducer` that the generator uses."""

    def send(self, topic: str, value: bytes, key: bytes) -> PendingSend: ...

    def flush(self, timeout: float) -> None:
        """Block until every delivery has ended, or raise a `KafkaError` after `timeout` seconds."""
        ...


class Stop(Protocol):
    """The part of `threading.Event` that the generator uses."""

    def wait(self, timeout: float) -> bool: ...


@dataclass(frozen=True)
class LoadReport:
    """The offered load and its outcome."""

    sent: int
    """Requests handed to the producer."""
    acknowledged: int
    errors: int
    """Requests that the broker did not acknowledge."""
    first_error: str | None
    duration_ms: float
    """Time from the first send to the last acknowledgement."""
    offered_rate: float | None
    """Scheduled requests per second: (sent - 1) / (last due - first due). None for a backlog or below two requests."""
    reached_rate: float | None
    """Requests per second that Kafka took: (acknowledged - 1) / duration. None below two requests."""
    lag: Lag
    adjustments: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report for the terminal, one value per line."""
        facts = {
            "requests sent": str(self.sent),
            "acknowledged": str(self.acknowledged),
            "errors": str(self.errors),
            "duration": f"{self.duration_ms / 1000:.2f} s",
            "offered rate": _rate(self.offered_rate),
            "reached rate": _rate(self.reached_rate),
            "lag": f"mean {self.lag.mean_ms:.2f} ms, max {self.lag.max_ms:.2f} ms, {self.lag.late} late",
        }
        facts |= {name.replace("_", " "): str(count) for name, count in self.adjustments.items()}
        return [f"{name + ':':22}{value}" for name, value in facts.items()]


class KafkaLoadGenerator:
    """Sends each request of a workload when it is due, in the caller's thread.

    The session is the record's key, so the requests of a session stay in order, in one partition.
    """

    def __init__(
        self, producer: Producer, topic: str, workload: Workload, clock: Clock, *, backlog: bool = False
    ) -> None:
        self._producer = producer
        self._topic = topic
        self._workload = workload
        self._clock = clock
        self._backlog = backlog

    def run(self, stop: Stop | None = None, on_sent: Callable[[Request], None] | None = None) -> LoadReport:
        """Send all requests, or until `stop` is set; then wait for the acknowledgements.

        `on_sent` is called in this thread after a request was given to the producer. The report counts records that
        Kafka did not take. If the workload raises, the requests before are delivered and the error is raised.
        """
        stop = stop or threading.Event()
        pace = (Backlog if self._backlog else OpenLoop)(self._clock, lambda wait_ms: stop.wait(wait_ms / 1000))
        deliveries = _Deliveries(self._clock)
        first_due_ms = last_due_ms = 0.0
        # The first request is made before the clock starts, because opening a trace takes time.
        requests = iter(self._workload)
        timed = next(requests, None)
        pace.begin()
        try:
            while timed is not None:
                created_at_ms = pace.due(timed.at_ms)
                if created_at_ms is None:
                    break
                if deliveries.sent == 0:
                    first_due_ms = timed.at_ms
                last_due_ms = timed.at_ms
                request = timed.created(created_at_ms)
                self._send(request, deliveries)
                if on_sent is not None:
                    on_sent(request)
                timed = next(requests, None)
        finally:
            self._flush(deliveries)
        span_ms = 0.0 if self._backlog else last_due_ms - first_due_ms
        return deliveries.report(span_ms, pace.lag, dict(self._workload.adjustments()))

    def _send(self, request: Request, deliveries: "_Deliveries") -> None:
        deliveries.begin()
        try:
            delivery = self._producer.send(
                self._topic, value=request.to_json().encode(), key=request.session_id.encode()
            )
        except KafkaError as error:
            deliveries.failed(error)
            return
        delivery.add_callback(deliveries.acknowledged)
        delivery.add_errback(deliveries.failed)

    def _flush(self, deliveries: "_Deliveries") -> None:
        try:
            # The producer gives up on a record by itself; the margin gives it time to report that.
            self._producer.flush(timeout=1.5 * DELIVERY_TIMEOUT_MS / 1000)
        except KafkaError as error:
            deliveries.abandon(error)


class _Deliveries:
    """Counts the outcomes of the records. The producer's thread calls it too."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._began_ms = self._last_ms = 0.0
        self._acknowledged = self._errors = 0
        self._first_error: str | None = None
        self.sent = 0

    def begin(self) -> None:
        if self.sent == 0:
            self._began_ms = self._last_ms = self._clock.monotonic_ms()
        self.sent += 1

    def acknowledged(self, _metadata: Any) -> None:
        with self._lock:
            self._acknowledged += 1
            self._last_ms = self._clock.monotonic_ms()

    def failed(self, error: BaseException) -> None:
        with self._lock:
            self._errors += 1
            self._first_error = self._first_error or " ".join(str(error).split())

    def abandon(self, error: BaseException) -> None:
        """Count every record without an outcome as an error."""
        with self._lock:
            self._errors = self.sent - self._acknowledged
            self._first_error = self._first_error or " ".join(str(error).split())

    def report(self, span_ms: float, lag: Lag, adjustments: Mapping[str, int]) -> LoadReport:
        with self._lock:
            duration_ms = self._last_ms - self._began_ms
            return LoadReport(
                sent=self.sent,
                acknowledged=self._acknowledged,
                errors=self._errors,
                first_error=self._first_error,
                duration_ms=duration_ms,
                offered_rate=_per_second(self.sent - 1, span_ms),
                reached_rate=_per_second(self._acknowledged - 1, duration_ms),
                lag=lag,
                adjustments=adjustments,
            )


@contextmanager
def offered(
    generator: KafkaLoadGenerator, on_sent: Callable[[Request], None] | None = None
) -> "Iterator[Future[LoadReport]]":
    """Send the load from its own thread; at the end of the block, stop it if it has not ended."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load") as pool:
        # Leaving the pool's block waits for the thread, so the thread must be told to stop before.
        try:
            yield pool.submit(generator.run, stop, on_sent)
        finally:
            stop.set()


@contextmanager
def connected(config: KafkaConfig) -> Iterator[Producer]:
    """Call `connect`, and close the producer at the end."""
    producer = connect(config)
    try:
        yield producer
    finally:
        try:
            producer.close(timeout=1)
        except KafkaError:
            # `close` flushes first, and leaves everything open if the broker is gone. The report already counts the
            # records that the broker did not take.
            producer.flush = lambda timeout: None
            producer.close(timeout=0)


def connect(config: KafkaConfig) -> KafkaProducer:
    """Return a producer that loses, repeats and reorders no record while the broker is up.

    Raises `UserError` within about twice `CONNECT_TIMEOUT_MS` if no broker answers or the topic does not exist.
    """
    settings = kafka_settings(config.brokers, config.access)
    try:
        admin = KafkaAdminClient(
            **settings,
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=CONNECT_TIMEOUT_MS,
        )
        try:
            topics = admin.list_topics()
        finally:
            admin.close()
        if config.requests_topic not in topics:
            raise UserError(
                f"--topic-prefix: Kafka at {config.brokers} has no topic {config.requests_topic}; "
                f"create it or start the job first"
            )
        return KafkaProducer(
            **settings,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            allow_auto_create_topics=False,
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            max_block_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=CONNECT_TIMEOUT_MS,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
        )
    except KafkaError as error:
        raise UserError(
            f"--brokers: Kafka at {config.brokers} does not answer ({in_one_line(error)}); is it running, and are "
            f"--kafka-security and its user right?"
        ) from None
    except ValueError:
        raise UserError(f"--brokers: {config.brokers} is not host:port,...; give the addresses of Kafka") from None


def _per_second(intervals: int, span_ms: float) -> float | None:
    return 1000 * intervals / span_ms if intervals > 0 and span_ms > 0 else None


def _rate(per_second: float | None) -> str:
    return "-" if per_second is None else f"{per_second:.2f} requests/s"
