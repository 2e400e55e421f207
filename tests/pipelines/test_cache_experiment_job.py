"""The job on the real Flink, Kafka and Redis: every request is answered once, whatever else the topic contains."""

import subprocess
import sys

import pytest

from core.errors import UserError
from operators.config import JobConfig
from pipelines import cache_experiment
from pipelines.connectors import ensure_topics
from tests.pipelines.job_run import ROOT, Run, ids

pytestmark = pytest.mark.integration
JOB = ROOT / "pipelines" / "cache_experiment.py"
HOSTILE: list[bytes | None] = [
    b"{",
    b"\xff\xfe\x00 no text",
    None,
    b'{"request_id": "x", "colour": 1}',
    b"[" * 5000,
    b'"' + b"a" * 900_000,
    b'{"prompt_token_ids": [' + b'"",' * 300_000 + b"0]}",
    b"{" + b",".join(b'"%d": 0' % number for number in range(90_000)) + b"}",
]


def test_a_bounded_run_answers_every_request_and_keeps_every_bad_record(run: Run) -> None:
    """53 requests in batches of up to 4: a slot's last batch is partial, and the input ends while it waits."""
    parallelism = 4
    ensure_topics(JobConfig(parallelism=parallelism, kafka=run.kafka))
    run.send(53)
    for raw in HOSTILE:
        run.send_raw(raw)
    run.send(1, start=53, prompt="x" * 200)

    run.submit("--parallelism", str(parallelism), "--batch-size", "4", "--max-wait-ms", "3600000", "--bounded")
    run.settle()
    assert run.job.state() == "FINISHED"
    assert run.job.failures() == []
    assert sorted(ready["slot"] for ready in run.ready) == list(range(parallelism))
    assert run.answered() == ids(53)
    assert sorted(str(letter.raw) for letter in run.letters if letter.stage == "decode") == sorted(map(str, HOSTILE))
    (too_long,) = [letter for letter in run.letters if letter.stage == "inference"]
    assert too_long.request_id == "r53"
    assert "--max-model-len" in too_long.reason
    # Sessions keep their slot, each slot has its own cache, and it is used.
    slots: dict[str, set[int]] = {}
    for answer in run.responses:
        slots.setdefault(answer.session_id, set()).add(answer.slot)
    assert all(len(found) == 1 for found in slots.values())
    assert {slot for found in slots.values() for slot in found} <= set(range(parallelism))
    assert sum(answer.local_tokens for answer in run.responses) > 0
    assert max(answer.batch_size for answer in run.responses) == 4


def test_the_job_works_without_redis_and_closes_batches_by_time(run: Run) -> None:
    options = ["--redis-url", "redis://127.0.0.1:1/0", "--batch-size", "8", "--max-wait-ms", "50"]
    run.submit("--parallelism", "1", *options)
    run.read_until(lambda r: len(r.ready) == 1)
    run.send(10)
    run.read_until(lambda r: len(r.responses) == 10)
    assert run.answered() == ids(10)
    assert sum(answer.local_tokens for answer in run.responses) > 0
    assert sum(answer.remote_tokens for answer in run.responses) == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--strategy", "GUESS"], "--strategy: Input should be 'STATIC', 'FLUID', 'FREQUENCY' or 'MRC'"),
        (["--model", "/nowhere/model"], "--model: no config.json in '/nowhere/model'"),
        (["--redis-url", "http://example"], "redis_url: not a Redis URL"),
        (["--batch-size", "9", "--max-running", "8"], "--batch-size is above --max-running"),
        (["--max-wait-ms", "-1"], "--max-wait-ms: Input should be greater than or equal to 0"),
    ],
)
def test_bad_options_are_told_before_anything_starts(
    options: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(JOB), *options])
    with pytest.raises(UserError) as raised:
        cache_experiment.main()
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--brokers", "127.0.0.1:1"], "brokers: no Kafka broker answers at '127.0.0.1:1'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_a_command_that_can_not_start_prints_one_line_and_exits_2(options: list[str], complaint: str) -> None:
    done = subprocess.run(
        [sys.executable, str(JOB), *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
