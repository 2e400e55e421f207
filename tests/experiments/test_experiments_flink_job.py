"""Jobs on a fake REST interface of Flink: failures in one line, draining, a job that ends."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from core.stack_trace import root_cause
from experiments.flink_job import FlinkCluster, FlinkJob

PYTHON_FAILURE = """\
org.apache.flink.runtime.JobException: Recovery is suppressed
\tat org.apache.flink.runtime.Some.method(Some.java:1)
Caused by: java.lang.RuntimeException: Error received from SDK harness: Traceback (most recent call last):
  File "worker.py", line 1, in run
    raise UserError("x")
core.errors.UserError: model: no config.json in '/m'; give another
\tat org.apache.beam.Other.method(Other.java:1)
Caused by: java.lang.RuntimeException: harness
"""
JOB = "a" * 32


class Played:
    """Answers each path with the next of its list, and the last one from then on; records the requests."""

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, Any]] = []

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((method, path, body))
        left = self.answers.get(path)
        if left is None:
            return 404, {"errors": ["no such thing"]}
        answer = left.pop(0) if len(left) > 1 else left[0]
        return (400, {"errors": [answer]}) if isinstance(answer, str) else (200, answer)


@pytest.fixture
def played() -> Iterator[tuple[Played, FlinkCluster]]:
    played = Played({})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = played.answer(self.command, self.path, json.loads(body or b"null"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST = do_PATCH = do  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield played, FlinkCluster(f"http://127.0.0.1:{server.server_port}/", ["false"], {}, Path("/"))
        server.shutdown()


def test_the_cause_is_the_python_exception_or_the_innermost_java_one() -> None:
    assert root_cause(PYTHON_FAILURE) == "core.errors.UserError: model: no config.json in '/m'; give another"
    assert root_cause("a.B: x\n\tat y\nCaused by: c.D: deep\n\tat z") == "c.D: deep"
    java = "Traceback (most recent call last):\n  File\npy4j.protocol.Py4JJavaError: An\n: a.B: x\nCaused by: c.D: deep"
    assert root_cause(java) == "c.D: deep"
    assert root_cause("Starting\nerror: --model: wrong\n") == "--model: wrong"
    assert root_cause("An error occurred while calling o1.execute.\n: c.D: deep\n\tat z") == "c.D: deep"
    assert root_cause("") == "no reason was given"


def test_a_failed_job_is_reported_with_its_cause(played: tuple[Played, FlinkCluster]) -> None:
    rest, cluster = played
    rest.answers |= {
        f"/jobs/{JOB}": [{"state": "RESTARTING"}],
        f"/jobs/{JOB}/exceptions": [{"exceptionHistory": {"entries": [{"stacktrace": PYTHON_FAILURE}]}}],
    }
    job = FlinkJob(cluster, JOB)
    job.require_alive()
    with pytest.raises(UserError, match=r"failed and is RESTARTING: core\.errors\.UserError: model: no config\.json"):
        job.require_alive(untouched=True)
    rest.answers[f"/jobs/{JOB}"] = [{"state": "FAILED"}]
    with pytest.raises(UserError, match="is FAILED: core"):
        job.require_alive()


def test_stopping_drains_and_throws_the_savepoint_away(played: tuple[Played, FlinkCluster]) -> None:
    rest, cluster = played
    done = {"status": {"id": "COMPLETED"}, "operation": {"location": "file:/s"}}
    rest.answers |= {
        f"/jobs/{JOB}/stop": [{"request-id": "t"}],
        f"/jobs/{JOB}/savepoints/t": [{"status": {"id": "IN_PROGRESS"}}, done],
        "/savepoint-disposal": [{"request-id": "u"}],
        f"/jobs/{JOB}": [{"state": "RUNNING"}, {"state": "FINISHED"}],
    }
    FlinkJob(cluster, JOB).stop("file:///d", 10)
    assert ("POST", f"/jobs/{JOB}/stop", {"drain": True, "targetDirectory": "file:///d"}) in rest.asked
    assert ("POST", "/savepoint-disposal", {"savepoint-path": "file:/s"}) in rest.asked


def test_a_job_that_does_not_drain_is_an_error(played: tuple[Played, FlinkCluster]) -> None:
    rest, cluster = played
    failed = {"failure-cause": {"stack-trace": "a.B: x\nCaused by: c.D: no room"}}
    rest.answers |= {
        f"/jobs/{JOB}/stop": [{"request-id": "t"}],
        f"/jobs/{JOB}/savepoints/t": [{"status": {"id": "COMPLETED"}, "operation": failed}],
    }
    with pytest.raises(UserError, match=r"did not stop: c\.D: no room"):
        FlinkJob(cluster, JOB).stop(None, 10)


def test_cancelling_waits_and_leaves_alone_what_has_ended(played: tuple[Played, FlinkCluster]) -> None:
    rest, cluster = played
    FlinkJob(cluster, "unknown").cancel()
    rest.answers[f"/jobs/{JOB}"] = [{"state": "FINISHED"}]
    FlinkJob(cluster, JOB).cancel()
    assert not [method for method, _, _ in rest.asked if method == "PATCH"]
    rest.answers |= {f"/jobs/{JOB}": [{"state": "RUNNING"}, {"state": "CANCELED"}], f"/jobs/{JOB}?mode=cancel": [{}]}
    FlinkJob(cluster, JOB).cancel()
    assert ("PATCH", f"/jobs/{JOB}?mode=cancel", None) in rest.asked


def test_only_living_jobs_of_the_name_are_found(played: tuple[Played, FlinkCluster]) -> None:
    rest, cluster = played
    jobs = [("1", "mine", "RUNNING"), ("2", "mine", "FINISHED"), ("3", "other", "RUNNING")]
    rest.answers["/jobs/overview"] = [{"jobs": [dict(zip(("jid", "name", "state"), job, strict=True)) for job in jobs]}]
    assert [job.job_id for job in cluster.jobs_named("mine")] == ["1"]


def test_a_refused_submission_gives_its_reason(tmp_path: Path) -> None:
    script = "echo starting; echo 'error: --model: wrong'; exit 2"
    cluster = FlinkCluster("http://127.0.0.1:1", ["bash", "-c", script], {}, tmp_path)
    with pytest.raises(UserError, match=r"flink run did not submit job\.py: --model: wrong"):
        cluster.submit(Path("job.py"), [])


def test_an_accepted_submission_gives_the_job(tmp_path: Path) -> None:
    script = f'echo "Job has been submitted with JobID {JOB}"; echo "$@" >arguments'
    cluster = FlinkCluster("http://127.0.0.1:1", ["bash", "-c", script, "flink"], {}, tmp_path)
    assert cluster.submit(Path("job.py"), ["--parallelism", "1"]).job_id == JOB
    assert (tmp_path / "arguments").read_text().split() == ["run", "-d", "-py", "job.py", "--parallelism", "1"]


def test_a_cluster_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"Flink at http://127\.0\.0\.1:1 does not answer"):
        FlinkCluster("http://127.0.0.1:1", [], {}, Path("/")).slots()
