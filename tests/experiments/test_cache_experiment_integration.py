"""The whole experiment on the real Kafka, Redis and Flink: its results, cleaning up, and an interruption."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from kafka import KafkaAdminClient
from redis import Redis

from experiments.cache_metrics import COLUMNS
from experiments.flink_job import ENDED, FlinkCluster
from experiments.records import read_runs
from local_stack import LocalStack

pytestmark = pytest.mark.integration


def command(stack: LocalStack, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "experiments.cache_experiments", "--stack-dir", str(stack.config.dir), "--out", str(out),
        "--parallelism", "1", "--max-new-tokens", "4", "--base-interval-ms", "200", "--max-prompt-tokens", "512",
        *options,
    ]  # fmt: skip


def leftovers(stack: LocalStack) -> tuple[list[str], list[str], list[str]]:
    """Topics, keys and running jobs of the experiments."""
    addresses = stack.addresses()
    admin = KafkaAdminClient(bootstrap_servers=addresses.brokers)
    # A deletion is acknowledged before it shows everywhere.
    deadline_s = time.monotonic() + 10
    while topics := [name for name in admin.list_topics() if name.startswith("cache-")]:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.2)
    admin.close()
    with Redis.from_url(addresses.redis_url) as client:
        keys = [key.decode() for key in client.scan_iter(match="cache-*")]
    jobs = FlinkCluster(addresses.flink_rest_url, [], {}, Path("/")).get("/jobs/overview")["jobs"]
    alive = [job["name"] for job in jobs if job["state"] not in ENDED and job["name"].startswith("cache-")]
    return topics, keys, alive


def test_two_strategies_on_one_load(stack: LocalStack, tmp_path: Path) -> None:
    done = subprocess.run(
        command(stack, tmp_path, "--strategies", "STATIC,FLUID", "--requests", "12"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (csv,) = tmp_path.glob("cache_experiments_????????_??????.csv")
    results = pd.read_csv(csv)
    assert tuple(results.columns) == COLUMNS
    assert list(results["strategy"]) == ["STATIC", "FLUID"]
    assert list(results["total_requests"] + results["dead_letters"]) == [12, 12]
    # The system prompt alone is shared by all.
    assert (results["cache_hits"] > 0).all()
    assert (results["p50_latency_ms"] > 0).all()
    assert csv.with_suffix(".png").stat().st_size > 50_000
    static, fluid = read_runs(next((tmp_path / "raw").iterdir()))
    assert [sent.request_id for sent in static.sent] == [sent.request_id for sent in fluid.sent]
    assert [slot.slot for slot in static.manifest.slots] == [0]
    # Each has a cold cache, so the first request of each finds nothing.
    for run in (static, fluid):
        first = next(answer for answer in run.responses if answer.request_id == run.sent[0].request_id)
        assert (first.local_tokens, first.remote_tokens) == (0, 0)
    assert leftovers(stack) == ([], [], [])
    assert all(part.problem is None for part in stack.health())


def test_an_interruption_leaves_nothing_running(stack: LocalStack, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(stack, tmp_path, "--strategies", "STATIC", "--requests", "5000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline_s = time.monotonic() + 120
        while not leftovers_jobs(stack):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("interrupted:")
    assert leftovers(stack) == ([], [], [])
    assert all(part.problem is None for part in stack.health())


def leftovers_jobs(stack: LocalStack) -> list[str]:
    """Names of the experiment's running jobs."""
    jobs = FlinkCluster(stack.addresses().flink_rest_url, [], {}, Path("/")).get("/jobs/overview")["jobs"]
    return [job["name"] for job in jobs if job["state"] == "RUNNING" and job["name"].startswith("cache-")]
