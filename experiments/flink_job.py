"""A job on a Flink cluster: submitted with Flink's command line, watched and stopped over its REST interface."""

import http.client
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.stack_trace import root_cause

ENDED = frozenset({"FINISHED", "FAILED", "CANCELED"})
REQUEST_TIMEOUT_S = 20.0
POLL_S = 0.3
SUBMIT_TIMEOUT_S = 600.0
CANCEL_TIMEOUT_S = 60.0
JOB_ID = re.compile(r"JobID ([0-9a-f]{32})")


class NotFound(Exception):  # noqa: N818 - an answer of Flink's, not a fault
    """Flink does not know the requested resource."""


class FlinkCluster:
    """A running cluster. `argv` and `env` call its `flink` command."""

    def __init__(self, rest_url: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self._rest_url = rest_url.rstrip("/")
        self._argv = list(argv)
        self._env = dict(env)
        self._cwd = cwd

    def submit(self, script: Path, options: Sequence[str], savepoint: str | None = None) -> "FlinkJob":
        """Start `script` detached, with the state of `savepoint`.

        Raises `UserError` with the reason in one line if Flink does not accept it.
        """
        state = [] if savepoint is None else ["-s", savepoint]
        argv = [*self._argv, "run", "-d", *state, "-py", str(script), *options]
        # A new session, so that Ctrl-C reaches only this process, which then knows if a job has to be cancelled.
        process = subprocess.Popen(
            argv,
            cwd=self._cwd,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=SUBMIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"flink run did not submit {script.name} within {SUBMIT_TIMEOUT_S:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = JOB_ID.search(output)
        if process.returncode != 0 or found is None:
            raise UserError(f"flink run did not submit {script.name}: {root_cause(output)}")
        return FlinkJob(self, found[1])

    def jobs_named(self, name: str) -> "list[FlinkJob]":
        """Return the jobs of this name that have not ended."""
        overview = self.get("/jobs/overview")["jobs"]
        return [FlinkJob(self, job["jid"]) for job in overview if job["name"] == name and job["state"] not in ENDED]

    def slots(self) -> int:
        """Return the number of slots of the cluster, free and taken."""
        return int(self.get("/overview")["slots-total"])

    def get(self, path: str) -> Any:
        return self._ask(urllib.request.Request(self._rest_url + path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        return self._ask(urllib.request.Request(self._rest_url + path, data=data, headers=headers, method="POST"))

    def patch(self, path: str) -> None:
        self._ask(urllib.request.Request(self._rest_url + path, method="PATCH"))

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code == 404:
                raise NotFound(text) from None
            raise UserError(f"Flink refused {request.selector}: {_refusal(text)}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"Flink at {self._rest_url} does not answer ({error}); is it running?") from None


@dataclass(frozen=True)
class FlinkJob:
    cluster: FlinkCluster
    job_id: str

    def state(self) -> str:
        """Return Flink's state of the job: CREATED, RUNNING, RESTARTING, FINISHED, FAILED, ..."""
        return str(self.cluster.get(f"/jobs/{self.job_id}")["state"])

    def failures(self) -> list[str]:
        """Return the cause of each failure so far, one line each, the latest first."""
        history = self.cluster.get(f"/jobs/{self.job_id}/exceptions").get("exceptionHistory", {})
        return [root_cause(entry.get("stacktrace", "")) for entry in history.get("entries", [])]

    def require_alive(self, *, untouched: bool = False) -> None:
        """Raises `UserError` with the cause if the job has ended or, with `untouched`, has failed and may restart."""
        state = self.state()
        failures = self.failures() if untouched or state in ENDED else []
        if state in ENDED or failures:
            cause = failures[0] if failures else "Flink states no cause"
            how = "is" if state in ENDED else "failed and is"
            raise UserError(f"job {self.job_id} {how} {state}: {cause}")

    def stop(self, savepoint_dir: str | None, timeout_s: float) -> None:
        """Drain the job and wait for its end. Raises `UserError` if it has not ended within `timeout_s`."""
        savepoint = self._stop(drain=True, savepoint_dir=savepoint_dir, timeout_s=timeout_s)
        # Only draining is needed; if its savepoint cannot be deleted, the run is still good.
        with suppress(UserError, NotFound):
            self.cluster.post("/savepoint-disposal", {"savepoint-path": savepoint})

    def suspend(self, timeout_s: float) -> str:
        """Stop the job without draining; return the savepoint for another job to resume. Raises as `stop` does."""
        return self._stop(drain=False, savepoint_dir=None, timeout_s=timeout_s)

    def cancel(self) -> None:
        """Cancel the job and wait for its end. Does nothing if the job has ended."""
        try:
            if self.state() in ENDED:
                return
            self.cluster.patch(f"/jobs/{self.job_id}?mode=cancel")
            self.wait_ended(CANCEL_TIMEOUT_S)
        except NotFound:
            return

    def wait_ended(self, timeout_s: float) -> str:
        """Wait for the job's end and return its final state. Raises `UserError` after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (state := self.state()) not in ENDED:
            if time.monotonic() > deadline_s:
                raise UserError(f"job {self.job_id} is still {state}; look at Flink's log, or cancel it there")
            time.sleep(POLL_S)
        return state

    def _stop(self, *, drain: bool, savepoint_dir: str | None, timeout_s: float) -> str:
        deadline_s = time.monotonic() + timeout_s
        body: dict[str, Any] = {"drain": drain}
        if savepoint_dir is not None:
            body["targetDirectory"] = savepoint_dir
        trigger = self.cluster.post(f"/jobs/{self.job_id}/stop", body)["request-id"]
        outcome = self._savepoint(trigger, deadline_s)
        if "failure-cause" in outcome:
            raise UserError(f"job {self.job_id} did not stop: {root_cause(outcome['failure-cause']['stack-trace'])}")
        state = self.wait_ended(deadline_s - time.monotonic())
        if state != "FINISHED":
            self.require_alive()
        return str(outcome["location"])

    def _savepoint(self, trigger: str, deadline_s: float) -> dict[str, Any]:
        while True:
            answer = self.cluster.get(f"/jobs/{self.job_id}/savepoints/{trigger}")
            if answer["status"]["id"] == "COMPLETED":
                return dict(answer["operation"])
            if time.monotonic() > deadline_s:
                raise UserError(f"job {self.job_id} does not stop in time; allow more with --stop-timeout-s")
            time.sleep(POLL_S)


def _refusal(text: str) -> str:
    try:
        return root_cause("\n".join(json.loads(text)["errors"]))
    except (ValueError, KeyError, TypeError):
        return root_cause(text)
