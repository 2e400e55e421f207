"""Which package may import which, checked on all sources."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

JOB_CONFIGURATION = (
    "cache.config",
    "cache.registry",
    "inference_service.config",
    "inference_service.registry",
    "operators.config",
    "operators.job_files",
)
"""The modules that describe a job. Experiments import them to submit jobs, and import nothing else that a job runs."""

MAY_IMPORT = {
    "core": (),
    "cache": ("core",),
    "cache/config.py": ("core", "cache.registry"),
    "cache/registry.py": ("core", "cache.eviction", "cache.sizing"),
    "inference_service": ("core", "cache.protocol"),
    "inference_service/config.py": ("core", "inference_service.registry"),
    "inference_service/registry.py": ("core", "inference_service"),
    "operators": ("core", "cache", "inference_service"),
    "operators/config.py": ("core", "cache.config", "inference_service.config"),
    "operators/job_files.py": ("core", "operators.config"),
    "pipelines": ("core", "operators"),
    "workloads": ("core",),
    "local_stack": ("core",),
    "experiments": ("core", "workloads", "local_stack", *JOB_CONFIGURATION),
    "experiments/lab": ("core", "cache", "workloads", "experiments"),
    "benchmarks": (
        "core",
        "cache",
        "inference_service",
        "operators",
        "pipelines",
        "workloads",
        "local_stack",
        "experiments",
    ),
}
"""What each package may import besides itself. `cache.protocol` allows that one module only.

A folder or a module within a package may have a rule of its own. The policy lab runs the cache itself, which all
other experiments reach through a job. A module with a rule of its own may not import the rest of its package.
"""

LIGHT = ("core", *(name.replace(".", "/") + ".py" for name in JOB_CONFIGURATION))
"""What may import no other libraries than `LIGHT_LIBRARIES`, so that submitting a job stays cheap."""
LIGHT_LIBRARIES = ("pydantic", "pydantic_core", "xxhash")

USES_FLINK = ("operators/flink/", "pipelines/", "benchmarks/pass_through.py")
"""What may import PyFlink. The last one is a job of its own: the pipeline's graph with other functions."""

REGISTERED = re.compile(r"(\w+(?:\.\w+)+):([A-Za-z_]\w*)")
"""An entry of a `core.registry.Registry`: `package.module:attribute`."""


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import in `source`, lazy ones and entries of registries included."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in names)
        elif isinstance(node, ast.Constant) and (place := REGISTERED.fullmatch(str(node.value))):
            yield node.lineno, f"{place[1]}.{place[2]}"


def violations(path: str, source: str) -> list[str]:
    """Each import that the file at `path` (below the root, with slashes) may not make."""
    part = max((part for part in MAY_IMPORT if f"{path}/".startswith(f"{part}/")), key=len)
    may_import = MAY_IMPORT[part] if part == path else (path.split("/", maxsplit=1)[0], *MAY_IMPORT[part])
    found = []
    for line, name in imports(path, source):
        top = name.split(".", maxsplit=1)[0]
        if top in MAY_IMPORT:
            allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in may_import)
        elif top == "pyflink":
            allowed = path.startswith(USES_FLINK)
        else:
            allowed = part not in LIGHT or top in sys.stdlib_module_names or top in LIGHT_LIBRARIES
        if not allowed:
            found.append(f"{path}:{line} imports {name}")
    return found


def sources() -> list[str]:
    return sorted({path.relative_to(ROOT).as_posix() for part in MAY_IMPORT for path in (ROOT / part).rglob("*.py")})


def test_every_package_imports_only_what_it_may() -> None:
    found = [line for path in sources() for line in violations(path, (ROOT / path).read_text())]
    assert found == []


def test_the_sources_are_found() -> None:
    paths = set(sources())
    assert {"core/records.py", "cache/protocol.py", "inference_service/engine.py"} <= paths
    assert {part for part in MAY_IMPORT if part.endswith(".py")} <= paths


def test_every_folder_of_code_has_a_rule() -> None:
    with_code = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert with_code - {"tests"} <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("path", "source", "named"),
    [
        ("core/clock.py", "import torch", "core/clock.py:1 imports torch"),
        (
            "core/clock.py",
            "import os\nfrom cache.protocol import CachedPrefix",
            "core/clock.py:2 imports cache.protocol.CachedPrefix",
        ),
        ("cache/local.py", "from inference_service.engine import Engine", "inference_service.engine.Engine"),
        ("workloads/trace.py", "from ..operators import batcher", "operators.batcher"),
        ("inference_service/engine.py", "from cache.manager import open_cache", "cache.manager.open_cache"),
        ("inference_service/engine.py", "from cache import manager", "cache.manager"),
        ("inference_service/engine.py", "import cache", "imports cache"),
        ("inference_service/engine.py", "import cache.protocol_two", "cache.protocol_two"),
        ("workloads/trace.py", "def late():\n    import experiments.run", "workloads/trace.py:2"),
        ("pipelines/job.py", "from inference_service import engine", "inference_service.engine"),
        ("operators/batcher.py", "from pyflink.datastream import KeyedProcessFunction", "pyflink.datastream"),
        ("benchmarks/pipeline.py", "from pyflink.datastream import KeyedProcessFunction", "pyflink.datastream"),
        (
            "experiments/run.py",
            "import importlib\nimportlib.import_module('operators.flink.decode')",
            "operators.flink.decode",
        ),
        ("experiments/run.py", "from cache.sizing import fluid", "cache.sizing.fluid"),
        ("experiments/run.py", "from operators.configuration import JobConfig", "operators.configuration.JobConfig"),
        ("core/config.py", "from cache.config import CacheConfig", "cache.config.CacheConfig"),
        ("workloads/registry.py", "R = Registry({'x': 'operators.batching:Batch'})", "operators.batching.Batch"),
        ("cache/config.py", "from cache.manager import open_cache", "cache.manager.open_cache"),
        ("inference_service/config.py", "import torch", "torch"),
        ("operators/config.py", "from cache.remote import RemoteTier", "cache.remote.RemoteTier"),
        ("experiments/policy_lab.py", "from cache.eviction import LRU", "cache.eviction.LRU"),
        ("experiments/lab/drive.py", "from operators.slots.pump import Pump", "operators.slots.pump.Pump"),
    ],
)
def test_a_violation_is_named(path: str, source: str, named: str) -> None:
    (found,) = violations(path, source)
    assert named in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/records.py", "import json\nfrom pydantic import BaseModel\nfrom core.errors import UserError"),
        ("inference_service/engine.py", "from cache.protocol import KVCache\nfrom cache import protocol\nimport torch"),
        ("operators/flink/rows.py", "from pyflink.common import Row\nfrom cache.manager import open_cache"),
        ("pipelines/job.py", "from pyflink.datastream import StreamExecutionEnvironment\nimport operators.flink.rows"),
        ("benchmarks/pass_through.py", "from pyflink.datastream import ProcessFunction\nfrom pipelines.job import run"),
        ("experiments/lab/drive.py", "from cache.manager import TwoLevelCache\nimport experiments.report"),
        ("cache/eviction/lru.py", "from . import policy\nfrom ..protocol import ChunkShape"),
        ("operators/config.py", "from cache.config import CacheConfig\nfrom pydantic import Field"),
        ("experiments/run.py", "from operators.config import JobConfig\nfrom cache.registry import EVICTION"),
        ("cache/registry.py", "EVICTION = Registry({'LRU': 'cache.eviction.lru:LRU'})"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


FRAGMENTS = ("Of", "Whether")
"""First words of a docstring that names no subject."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring in `source`, those below a field or a constant included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_every_docstring_names_its_subject() -> None:
    paths = [*sources(), *(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))]
    found = [
        f"{path}:{line} begins with {text.split()[0]!r}"
        for path in paths
        for line, text in docstrings((ROOT / path).read_text())
        if text.split()[:1] and text.split()[0] in FRAGMENTS
    ]
    assert found == []


def test_docstrings_of_fields_and_functions_are_found() -> None:
    source = 'X = 1\n"""Of a field."""\n\n\ndef f():\n    """Whether it is."""\n'
    assert list(docstrings(source)) == [(2, "Of a field."), (6, "Whether it is.")]
