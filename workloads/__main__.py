"""`python -m workloads`: send a workload to Kafka, or print it with `--dry-run`."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from core.clock import SystemClock
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.kafka_config import KafkaConfig
from core.options import Parser, add_options, from_options
from workloads.catalogue import make_workload
from workloads.config import WorkloadConfig
from workloads.kafka_generator import KafkaLoadGenerator, LoadReport, connected
from workloads.progress import progress_bar
from workloads.timed_request import OfRun, Workload


class LoadConfig(Config):
    """How the load is sent."""

    backlog: bool = Field(default=False, description="send everything at once instead of on the workload's schedule")
    run: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="suffix of every request id, because a job answers an id once; none: the start time in ms",
    )
    dry_run: bool = Field(
        default=False, description="print the requests as JSON lines, with created_at_ms counted from 0; send nothing"
    )
    workload: WorkloadConfig = WorkloadConfig()
    kafka: KafkaConfig = KafkaConfig()


def main() -> None:
    parser = Parser(prog="python -m workloads", description=__doc__)
    add_options(parser, LoadConfig)
    config = from_options(LoadConfig, parser.parse_args())
    workload = make_workload(config.workload)
    if config.dry_run:
        _print(workload)
        return
    # kafka-python logs each failed connection; the error and the report already say what matters.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    report = _send(config, workload)
    sys.stdout.write("\n".join(report.lines()) + "\n")
    if report.errors:
        raise UserError(
            f"Kafka at {config.kafka.brokers} did not take {report.errors} of {report.sent} requests "
            f"(first: {report.first_error}); look at the broker"
        )


def _send(config: LoadConfig, workload: Workload) -> LoadReport:
    topic = config.kafka.requests_topic
    with _stopped_by_signal() as stop, connected(config.kafka) as producer, progress_bar() as progress:
        task = progress.add_task("requests", total=workload.requests)
        clock = SystemClock()
        of_run = OfRun(workload, config.run or f"{clock.wall_ms():.0f}")
        generator = KafkaLoadGenerator(producer, topic, of_run, clock, backlog=config.backlog)
        return generator.run(stop, on_sent=lambda _: progress.advance(task))


def _print(workload: Workload) -> None:
    try:
        for timed in workload:
            sys.stdout.write(timed.created(timed.at_ms).to_json() + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe; at exit Python would flush to it and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _stopped_by_signal() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C or SIGTERM sets, so that sent requests are still delivered and reported."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    exit_on_user_error(main)
