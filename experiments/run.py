"""Runs one variant: submits the job, waits until it is ready, sends the load, reads the answers, drains the job."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from core.clients import redis_settings
from core.clock import SystemClock
from core.credentials import in_one_line
from core.errors import UserError
from core.options import to_options
from core.redis_config import RedisAccessConfig
from experiments.collector import Collector, Ledger, wait_for_slots
from experiments.config import RunConfig, Variant
from experiments.flink_job import FlinkCluster, FlinkJob
from experiments.kafka_topics import fresh_topics, reading
from experiments.provenance import provenance
from experiments.records import LoadSummary, Manifest, RunRecords
from operators.config import JobConfig
from workloads.config import WorkloadConfig
from workloads.kafka_generator import KafkaLoadGenerator, LoadReport, connected, offered
from workloads.progress import progress_bar
from workloads.timed_request import Workload

LATE_SUBMISSION_S = 2.0
"""If a submission was interrupted, Flink may still have accepted the job. Maximum wait until it shows the job."""
REDIS_BATCH = 1000


@dataclass(frozen=True)
class Setting:
    """Parts that all variants of one experiment share."""

    experiment: str
    run_id: str
    pipeline: Path
    flink: FlinkCluster
    run: RunConfig
    workload_config: WorkloadConfig
    workload: Workload
    backlog: bool
    """Send the whole load at once instead of on its schedule."""


def run_variant(setting: Setting, variant: Variant, position: int) -> RunRecords:
    """Measure `variant`. Its job, topics and keys are removed afterwards, also after an error.

    Raises `UserError` if the job fails, gives no more answers, or does not become ready in time.
    """
    job, run = variant.job, setting.run
    conditions = provenance()
    with ExitStack() as cleanup:
        remote = job.cache.remote
        if remote.redis_url is not None:
            cleanup.callback(delete_keys, remote.redis_url, remote.redis_namespace, remote.access)
        cleanup.enter_context(fresh_topics(job.kafka, partitions=job.parallelism))
        submitted = cleanup.enter_context(_submitted(setting, job))
        ready = cleanup.enter_context(reading(job.kafka, [job.kafka.ready_topic]))
        answers = cleanup.enter_context(reading(job.kafka, [job.kafka.responses_topic, job.kafka.dead_letters_topic]))
        ledger = Ledger()
        collector = Collector(answers, job.kafka, ledger)
        with progress_bar("{task.description:22}") as bar:
            task = bar.add_task(f"{variant.name}: slots ready", total=job.parallelism)
            slots = wait_for_slots(
                ready,
                job.parallelism,
                run.ready_timeout_s,
                watch=lambda: submitted.require_alive(untouched=True),
                on_progress=lambda count: bar.update(task, completed=count),
            )
            bar.update(task, description=f"{variant.name}: answered", total=setting.workload.requests, completed=0)
            with _offered(setting, job, ledger) as load:
                report = collector.until_settled(
                    load,
                    run.idle_timeout_s,
                    watch=submitted.require_alive,
                    on_progress=lambda count: bar.update(task, completed=count),
                )
        failures = submitted.failures()
        submitted.stop(run.savepoint_dir, run.stop_timeout_s)
        late = collector.rest()
    return RunRecords(
        Manifest(
            experiment=setting.experiment,
            run_id=setting.run_id,
            variant=variant.name,
            position=position,
            job=job,
            workload=setting.workload_config,
            job_id=submitted.job_id,
            slots=slots,
            load=LoadSummary.of(report),
            duplicates=ledger.duplicates,
            late_duplicates=late,
            failures=tuple(failures),
            provenance=conditions,
        ),
        ledger.all_sent,
        ledger.responses,
        ledger.dead_letters,
    )


@contextmanager
def _offered(setting: Setting, job: JobConfig, ledger: Ledger) -> "Iterator[Future[LoadReport]]":
    """Send the load of `setting`, and record each sent request in `ledger`."""
    with connected(job.kafka) as producer:
        generator = KafkaLoadGenerator(
            producer, job.kafka.requests_topic, setting.workload, SystemClock(), backlog=setting.backlog
        )
        with offered(generator, ledger.sent) as load:
            yield load


@contextmanager
def _submitted(setting: Setting, job: JobConfig) -> Iterator[FlinkJob]:
    """Submit the job; at the end of the block, cancel it if it has not ended."""
    submitted = None
    try:
        submitted = setting.flink.submit(setting.pipeline, to_options(job))
        yield submitted
    finally:
        if submitted is not None:
            submitted.cancel()
        else:
            time.sleep(LATE_SUBMISSION_S)
            for accepted in setting.flink.jobs_named(job.job_name):
                accepted.cancel()


def delete_keys(redis_url: str, namespace: str, access: RedisAccessConfig) -> int:
    """Find the keys of `namespace` by SCAN and delete them; return their number. Raises `UserError` if Redis fails."""
    deleted = 0
    settings = redis_settings(redis_url, access)
    try:
        with Redis.from_url(redis_url, **settings, socket_timeout=10, socket_connect_timeout=5) as client:
            batch: list[bytes] = []
            for key in client.scan_iter(match=f"{namespace}:*", count=REDIS_BATCH):
                batch.append(key)
                if len(batch) == REDIS_BATCH:
                    deleted += int(client.unlink(*batch))
                    batch.clear()
            if batch:
                deleted += int(client.unlink(*batch))
    except (RedisError, OSError) as error:
        raise UserError(f"keys {namespace}:* are left in Redis ({in_one_line(error)})") from None
    return deleted
