"""The stack is started, stopped, killed, interrupted and misconfigured, with real servers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic
from redis import Redis

from core.errors import UserError
from core.options import to_options
from local_stack import LocalStack, StackConfig, flink_cli
from local_stack.config import port_is_free
from local_stack.flink import DIRECT
from local_stack.processes import Started, is_alive
from tests.pipelines.job_run import listening_on, processes_of

pytestmark = pytest.mark.integration


@pytest.fixture
def redis_only(stack: LocalStack, tmp_path: Path) -> StackConfig:
    """A stack that starts only Redis, and uses Kafka and Flink of the shared stack, to be fast."""
    shared = stack.addresses()
    return StackConfig.on_free_ports(tmp_path / "own", brokers=shared.brokers, flink_url=shared.flink_rest_url)


def started_by(stack: LocalStack) -> list[Started]:
    return [process for part in stack.health() for process in part.processes]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_stack", *arguments], capture_output=True, text=True, check=False
    )


def write_one(running: LocalStack, topic: str, value: bytes) -> None:
    admin = KafkaAdminClient(bootstrap_servers=running.addresses().brokers)
    admin.create_topics([NewTopic(topic, 1, 1)])
    admin.close()
    producer = KafkaProducer(bootstrap_servers=running.addresses().brokers)
    producer.send(topic, value).get(timeout=10)
    producer.close()


def test_every_part_answers(stack: LocalStack) -> None:
    addresses = stack.addresses()
    write_one(stack, "stack-echo", b"a record")
    consumer = KafkaConsumer(
        "stack-echo", bootstrap_servers=addresses.brokers, auto_offset_reset="earliest", group_id="stack-echo"
    )
    assert next(consumer).value == b"a record"
    consumer.close()

    redis = Redis.from_url(addresses.redis_url)
    assert redis.ping()
    assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
    assert redis.config_get("save") == {"save": ""}

    with DIRECT.open(f"{addresses.flink_rest_url}/overview", timeout=10) as answer:
        assert json.load(answer)["slots-total"] == 4

    assert [part.problem for part in stack.health()] == [None, None, None]
    assert stack.start() is False, "it runs already"


def test_everything_listens_on_loopback_only(stack: LocalStack) -> None:
    """tests/pipelines/test_inference_job.py checks the same for the processes of a job."""
    assert listening_on(processes_of(stack)) == {"127.0.0.1"}


def test_flink_has_the_kafka_connector_and_the_project(stack: LocalStack, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(
        "import core.records\n"
        "from pyflink.java_gateway import get_gateway\n"
        "get_gateway().jvm.Class.forName('org.apache.flink.connector.kafka.source.KafkaSource')\n"
        "print('both are there')\n"
    )
    argv, env = flink_cli(stack)
    # Not from the checkout, or `import core` would always work.
    done = subprocess.run(
        [*argv, "run", "-py", str(job)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "both are there" in done.stdout, done.stdout + done.stderr


def test_start_status_and_stop_as_commands(tmp_path: Path) -> None:
    config = StackConfig.on_free_ports(tmp_path, task_managers=1, task_slots=1, high_availability=True)
    directory = ["--dir", str(tmp_path)]
    begun = command("start", *to_options(config))
    try:
        assert begun.returncode == 0, begun.stderr
        state = json.loads((tmp_path / "state.json").read_text())
        pids = [process["pid"] for process in state["processes"]]
        assert len(pids) == 5
        shown = command("status", *directory)
        assert shown.returncode == 0
        assert shown.stdout.count("healthy") == 3
        assert "already running" in command("start", *to_options(config)).stdout
        other = command("start", *to_options(config), "--task-slots", "2")
        assert other.returncode == 2
        assert "--task-slots is 1" in other.stderr
        before = {process.name: process.pid for process in LocalStack(config).processes}
        for name in ("jobmanager", "redis"):
            os.kill(before[name], signal.SIGKILL)
        assert command("status", *directory).stdout.count("healthy") == 1
        assert command("start", *to_options(config)).returncode == 0
        assert command("status", *directory).stdout.count("healthy") == 3
        after = {process.name: process.pid for process in LocalStack(config).processes}
        assert {name for name in after if after[name] != before[name]} == {"jobmanager", "redis"}
        pids += after.values()
    finally:
        ended = command("stop", *directory)
    assert ended.returncode == 0
    # ZooKeeper's script waits beside its JVM.
    assert "stopped 6 processes" in ended.stdout
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert command("status", *directory).returncode == 1
    assert "nothing was running" in command("stop", *directory).stdout


def test_kafka_starts_again_on_its_data_and_other_ports(stack: LocalStack, tmp_path: Path) -> None:
    shared = stack.addresses()
    users_own = {"redis_url": shared.redis_url, "flink_url": shared.flink_rest_url}
    with LocalStack(StackConfig.on_free_ports(tmp_path, **users_own)) as first:
        write_one(first, "kept", b"a record")
    with LocalStack(StackConfig.on_free_ports(tmp_path, **users_own)) as second:
        assert second.addresses().brokers != first.addresses().brokers
        consumer = KafkaConsumer("kept", bootstrap_servers=second.addresses().brokers, auto_offset_reset="earliest")
        assert next(consumer).value == b"a record"
        consumer.close()


def test_what_a_killed_run_left_is_cleaned_up_by_the_next_start(redis_only: StackConfig) -> None:
    with LocalStack(redis_only) as running:
        (before,) = started_by(running)
        os.kill(before.pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(before.pid)], timeout=5)
        assert [part.problem for part in running.health()] == [None, "redis ended", None]
        assert LocalStack(redis_only).start() is True
        (after,) = started_by(running)
        assert after.pid != before.pid
        assert is_alive(after)
        # A process that runs and does not answer is ended as well.
        psutil.Process(after.pid).suspend()
        assert LocalStack(redis_only.model_copy(update={"stop_grace_s": 0.2})).start() is True
        assert not is_alive(after)
        assert [part.problem for part in running.health()] == [None, None, None]


def test_descendants_end_although_their_leader_was_killed(redis_only: StackConfig) -> None:
    with LocalStack(redis_only) as running:
        (redis,) = started_by(running)
        # Replaces Redis in the state: a session leader that dies and leaves a child, as a killed TaskManager may.
        leader = subprocess.Popen(["bash", "-c", "sleep 600 & wait"], start_new_session=True)
        process = psutil.Process(leader.pid)
        while not (children := process.children()):
            time.sleep(0.01)
        record = redis.model_copy(
            update={"pid": leader.pid, "since_boot_s": process.create_time() - psutil.boot_time()}
        )
        add_to_state(redis_only, record)
        leader.kill()
        leader.wait()
        assert children[0].is_running()
        running.stop()
        assert not children[0].is_running()
        assert not is_alive(redis)


def test_stop_leaves_a_stranger_with_a_recycled_pid_alone(redis_only: StackConfig) -> None:
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    process = psutil.Process(stranger.pid)
    started_s = process.create_time() - psutil.boot_time()
    try:
        with LocalStack(redis_only) as running:
            (redis,) = started_by(running)
            add_to_state(redis_only, redis.model_copy(update={"pid": stranger.pid, "since_boot_s": started_s - 1.0}))
        assert process.is_running()
        assert process.status() != psutil.STATUS_ZOMBIE
        assert not is_alive(redis)
    finally:
        stranger.kill()
        stranger.wait()


def add_to_state(config: StackConfig, record: Started) -> None:
    file = config.dir / "state.json"
    state = json.loads(file.read_text())
    state["processes"].append(record.model_dump())
    file.write_text(json.dumps(state))


def test_a_taken_port_is_named_and_nothing_is_left_running(stack: LocalStack, tmp_path: Path) -> None:
    taken = stack.config.redis_port
    config = StackConfig.on_free_ports(tmp_path / "other", redis_port=taken)
    done = command("start", *to_options(config))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: port {taken} of Redis is taken; choose another with --redis-port")
    assert not (config.dir / "state.json").exists()


def test_a_port_given_twice_is_named(tmp_path: Path) -> None:
    config = StackConfig.on_free_ports(tmp_path)
    config = config.model_copy(update={"kafka_port": config.redis_port})
    with pytest.raises(UserError, match=r"of Kafka is also --redis-port; choose another with --kafka-port"):
        LocalStack(config).start()


@pytest.mark.parametrize(
    ("field", "address", "option"),
    [
        ("brokers", "127.0.0.1:1", "--brokers"),
        ("redis_url", "redis://127.0.0.1:1/0", "--redis-url"),
        ("flink_url", "http://127.0.0.1:1", "--flink-url"),
    ],
)
def test_a_users_own_address_that_does_not_answer_is_named(
    tmp_path: Path, field: str, address: str, option: str
) -> None:
    config = StackConfig.on_free_ports(tmp_path, **{field: address})
    with pytest.raises(UserError, match=rf"^{option}: no \w+ answers at {address} \("):
        LocalStack(config).start()
    assert not (tmp_path / "state.json").exists()


def test_a_start_that_fails_shows_the_log_and_ends_the_rest(redis_only: StackConfig) -> None:
    # Redis starts, Kafka cannot: a JVM refuses a heap that no machine has.
    config = redis_only.model_copy(update={"brokers": None, "kafka_heap_mb": 1 << 40})
    with pytest.raises(UserError, match=r"kafka ended while starting(.|\n)*--- end of .*kafka.out(.|\n)*heap"):
        LocalStack(config).start()
    assert not (config.dir / "state.json").exists()
    assert port_is_free(config.redis_port)


def test_an_interrupted_start_ends_what_it_had_started(tmp_path: Path) -> None:
    config = StackConfig.on_free_ports(tmp_path, task_managers=1)
    starting = subprocess.Popen(
        [sys.executable, "-m", "local_stack", "start", *to_options(config)], stdout=subprocess.DEVNULL
    )
    state = tmp_path / "state.json"
    while not state.exists() or len(recorded := json.loads(state.read_text())["processes"]) < 3:
        assert starting.poll() is None
        time.sleep(0.02)
    starting.terminate()
    assert starting.wait(timeout=30) == 128 + signal.SIGTERM
    assert not state.exists()
    assert not any(psutil.pid_exists(process["pid"]) for process in recorded)
