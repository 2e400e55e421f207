"""Records per second if the model takes no time: our job, its graph without our functions, and the alternatives.

A whole load becomes visible at one moment, and its sender is idle by then. The job answers with the simulated engine on
a device that takes no time. The pass-through job has the same topics, records, keys and graph, with functions that only
pass records on (`benchmarks/pass_through.py`). Both run side by side and take turns. The consumer loop and Beam
RunInference are those of `benchmarks/alternatives.py`, but answer one token without `generate`. RunInference works
without Kafka.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.progress import Progress

from benchmarks.baselines.contenders import orders_of
from benchmarks.baselines.group import Worker, WorkerGroup
from benchmarks.baselines.worker import Order
from benchmarks.on_flink import (
    PASS_THROUGH,
    PIPELINE,
    CpuSeconds,
    Drained,
    FlinkConfig,
    JobUnderTest,
    drain,
    running,
)
from benchmarks.report import ratios, spread
from cache.config import CacheConfig
from core.errors import UserError
from core.records import Response
from experiments.config import in_own_space
from experiments.kafka_topics import fresh_topics, reading
from experiments.services import Services
from inference_service.config import EngineConfig
from inference_service.device_profile import DeviceProfile
from operators.config import BatchingConfig, JobConfig
from workloads.config import IndependentConfig, WorkloadConfig
from workloads.independent import IndependentWorkload

Samples = dict[str, list[float]]

SLOTS = (1, 2)
OURS = "zero_engine"
JOBS = {OURS: PIPELINE, "pass_through": PASS_THROUGH}
ROWS = 256
"""Rows of the engine: a typical number for classifying short records on a GPU."""
WARM_UPS = 3
"""Number of loads before the measured ones."""
LOOP_BATCH = 500
"""Records per poll of the consumer loop: the default of Kafka's consumer."""


class ZeroLoads:
    """Loads of the smallest possible requests, equally many per slot. No two loads share a request id."""

    def __init__(self, records: int, seed: int) -> None:
        self.records = records
        self._seed = seed

    def next(self, slots: int) -> IndependentWorkload:
        self._seed += 1
        return IndependentWorkload(
            WorkloadConfig(
                workload="independent",
                requests=self.records,
                seed=self._seed,
                max_new_tokens=1,
                independent=IndependentConfig(prompt_tokens=1, answer_tokens=1, even_over=slots),
            )
        )


class ZeroEngine:
    """Measures one system after the other, and appends the results to `samples`."""

    def __init__(self, flink: FlinkConfig, found: Services, loads: ZeroLoads, samples: Samples, bar: Progress) -> None:
        self._flink = flink
        self._found = found
        self._loads = loads
        self._samples = samples
        self._bar = bar

    def jobs(self, slots: int, rounds: int, cpu: CpuSeconds) -> dict[str, list[str]]:
        """Measure both jobs in turns; return the names of each job's operators, as the samples number them."""
        with ExitStack() as cleanup:
            job = cleanup.enter_context(instant_job(slots))
            jobs = {
                name: cleanup.enter_context(
                    running(self._flink, self._found, f"{name.replace('_', '-')}-p{slots}", job, script)
                )
                for name, script in JOBS.items()
            }
            # Java compiles code that runs often; most of that is done before the measured loads.
            for _ in range(WARM_UPS):
                for one in jobs.values():
                    one.drain(self._loads.next(slots))
            before = {name: one.operators(WARM_UPS * self._loads.records) for name, one in jobs.items()}
            took_s = dict.fromkeys(jobs, 0.0)
            for round_ in self._bar.track(range(rounds), description=f"zero-time engine, {slots} slots"):
                for name in jobs if round_ % 2 == 0 else reversed(jobs):
                    took_s[name] += self._drain(name, jobs[name], slots, cpu)
            for name, one in jobs.items():
                after = one.operators((WARM_UPS + rounds) * self._loads.records)
                for index, (operator, times) in enumerate(after.items()):
                    for state, percent in times.shares(before[name][operator], took_s[name]).items():
                        self._samples[f"operator_{index}_{state}_percent_{name}_p{slots}"].append(percent)
        return {name: list(before[name]) for name in jobs}

    def loop(self, rounds: int) -> None:
        """Measure the consumer loop over Kafka, in one process."""
        with self._baseline("consumer_loop") as worker:
            for _ in self._bar.track(range(rounds), description="zero-time consumer loop"):
                space = in_own_space(JobConfig(), f"bench-zero-loop-{time.time_ns() // 1_000_000}")
                kafka = space.kafka.model_copy(update={"brokers": self._found.brokers})
                with fresh_topics(kafka, partitions=1), reading(kafka, [kafka.responses_topic]) as reader:
                    worker.prepare(
                        Order(
                            brokers=kafka.brokers,
                            requests_topic=kafka.requests_topic,
                            responses_topic=kafka.responses_topic,
                            partitions=(0,),
                        )
                    )
                    worker.go()
                    drained = drain(kafka, reader, self._loads.next(1), self._flink.idle_timeout_s, "consumer-loop")
                    worker.stop()
                    worker.done()
                self._samples["records_per_s_loop"].append(drained.records_per_s)

    def run_inference(self, rounds: int) -> None:
        """Measure Beam RunInference in one process, from memory to memory."""
        with self._baseline("run_inference") as worker:
            for _ in self._bar.track(range(rounds), description="zero-time RunInference"):
                requests = [timed.created(0.0) for timed in self._loads.next(1)]
                took_s, answers = WorkerGroup([worker]).answer(orders_of(requests, 1))
                self._samples["records_per_s_run_inference"].append(len(answers) / took_s)

    def _drain(self, name: str, job: JobUnderTest, slots: int, cpu: CpuSeconds) -> float:
        """Measure one round of one job; return its seconds."""
        cpu_before = cpu.by_part()
        drained = job.drain(self._loads.next(slots))
        for part, seconds in cpu.by_part().items():
            per_1000 = 1000 * (seconds - cpu_before.get(part, 0.0)) / len(drained.values)
            self._samples[f"cpu_s_per_1000_{part}_{name}_p{slots}"].append(per_1000)
        self._samples[f"records_per_s_{name}_p{slots}"].append(drained.records_per_s)
        if name == OURS:
            require_each_once(drained)
        return drained.took_s

    @contextmanager
    def _baseline(self, module: str) -> Iterator[Worker]:
        """Give a ready process of a baseline that answers without its model."""
        with tempfile.TemporaryDirectory(prefix="zero-engine-") as directory:
            log, timeout_s = Path(directory) / f"{module}.log", self._flink.ready_timeout_s
            worker = Worker(module, EngineConfig(threads=1), LOOP_BATCH, log, timeout_s, zero_time=True)
            try:
                worker.ready()
                yield worker
            finally:
                worker.close()


@contextmanager
def instant_job(slots: int) -> Iterator[JobConfig]:
    """Give a job whose engine takes no time."""
    with tempfile.TemporaryDirectory(prefix="zero-engine-") as directory:
        profile = Path(directory) / "instant.json"
        profile.write_text(DeviceProfile.instant().model_dump_json())
        engine = EngineConfig(engine="simulated", profile=profile, threads=1, max_running=ROWS)
        batching = BatchingConfig(max_in_flight=4 * ROWS)
        yield JobConfig(parallelism=slots, engine=engine, batching=batching, cache=CacheConfig(cache=False))


def require_each_once(drained: Drained) -> None:
    """Raises `UserError` if a request has two answers, so that another one has none."""
    ids = {Response.model_validate_json(value).request_id for value in drained.values}
    if len(ids) != len(drained.values):
        raise UserError(f"{OURS}: {len(drained.values)} answers belong to {len(ids)} requests; this is a bug")


def is_one(sample: str) -> bool:
    """True if a series of samples belongs to this part of the benchmark."""
    return sample.startswith(("records_per_s_", "cpu_s_per_1000_", "operator_"))


def figures_of(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians over rounds; rates have quartiles too. The ratio of the two jobs is taken round by round."""
    figures: dict[str, float] = {}
    for slots in SLOTS:
        both = [samples.get(f"records_per_s_{name}_p{slots}", ()) for name in JOBS]
        if all(both):
            figures |= spread(f"{OURS}_over_pass_through_p{slots}", ratios(*both))
    for name, values in samples.items():
        figures |= spread(name, values) if name.startswith("records_per_s_") else {name: statistics.median(values)}
    return figures
