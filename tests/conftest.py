"""Fixtures for tests of several packages: one real Kafka, Redis and Flink for the whole run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from core.registry import Registry
from local_stack import LocalStack, StackConfig
from local_stack.processes import is_alive
from local_stack.service import log_tail

# The models are tiny and several processes share the cores, so a second thread would mostly spin and wait for a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The duration of an example depends on other work of the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A running stack with four slots, on free ports. All tests share its topics and Redis keys: use unique names."""
    config = StackConfig.on_free_ports(
        tmp_path_factory.mktemp("stack"), task_managers=1, task_slots=4, task_manager_mb=1536
    )
    with LocalStack(config) as running:
        yield running


@pytest.fixture(autouse=True)
def stack_survives(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that kills a service of the shared stack, with the end of its log, and restarts the service."""
    running: LocalStack | None = request.getfixturevalue("stack") if "stack" in request.fixturenames else None
    yield
    if running is None:
        return
    if dead := [process for process in running.processes if not is_alive(process)]:
        told = "".join(f"{process.name} has died" + log_tail(process, running.config.dir / "log") for process in dead)
        running.start()
        pytest.fail(told, pytrace=False)


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Registry, str, str, str], None]:
    """Adds to a registry as a developer would: writes a module with `source`, and adds one line for its `attribute`."""

    def add(registry: Registry, name: str, attribute: str, source: str) -> None:
        module = f"added_{name.lower()}"
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(registry.places, name, f"{module}:{attribute}")

    return add
