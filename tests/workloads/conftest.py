import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACES = os.environ.get("INFERTUNER_TRACES")
"""Folder of real traces with their released names. Without it the tests use only generated ones."""

MADE_ROWS = [
    {"timestamp": 0, "input_length": 700, "output_length": 100, "hash_ids": [0, 1]},
    # Extends the first by a second whole block. All requests share block 0, so this is still a new session.
    {"timestamp": 0, "input_length": 1500, "output_length": 2, "hash_ids": [0, 2, 3]},
    {"timestamp": 3000, "input_length": 1024, "output_length": 2000, "hash_ids": [0, 4]},
    # Extends the row before, twice; the second time by way of its own extension.
    {"timestamp": 3000, "input_length": 1537, "output_length": 50, "hash_ids": [0, 4, 5, 6]},
    {"timestamp": 9000.5, "input_length": 2560, "output_length": 16, "hash_ids": [0, 4, 5, 7, 8]},
    {"timestamp": 12000, "input_length": 51200, "output_length": 16, "hash_ids": [0, *range(100, 199)]},
    {"timestamp": 15000, "input_length": 1, "output_length": 0, "hash_ids": [9]},
]

MADE_AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.5000000,374,44
2023-11-16 23:59:59.5000000,1,0
2023-11-17 00:00:00.7501237,8000,109
2023-11-17 00:00:03.5000000,1600,3200
"""

MADE_BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,0,0,0,Conversation log
45,ChatGPT,1,230,231,API log
118,GPT-4,8000,276,8276,API log
"""

MADE_BURSTGPT_SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5.0,7,2.5,ChatGPT,320,18,338,Conversation log
6.0,8,0.5,GPT-4,320,20,340,Conversation log
7.5,7,3.5,ChatGPT,800,20,820,Conversation log
8.0,,1.0,ChatGPT,320,20,340,API log
8.0,,1.0,ChatGPT,320,20,340,API log
9.0,8,0.0,GPT-4,0,0,0,Conversation log
9.5,7,3.5,ChatGPT,480,40,520,Conversation log
11.0,7,3.5,ChatGPT,480,40,520,Conversation log
"""


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "trace.csv"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return path

    return write


@pytest.fixture
def write_trace(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[object], name: str = "trace.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def made_trace(write_trace: Callable[..., Path]) -> Path:
    return write_trace(list(MADE_ROWS))


@pytest.fixture(params=["made", "real"] if TRACES else ["made"])
def any_trace(request: pytest.FixtureRequest, made_trace: Path) -> Path:
    """Each available Mooncake trace: the small generated one, and the real one if its folder is given."""
    return Path(TRACES or "") / "mooncake_conversation_trace.jsonl" if request.param == "real" else made_trace


@pytest.fixture
def made_azure_trace(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(MADE_AZURE)
    return path


@pytest.fixture(params=["made", "real"] if TRACES else ["made"])
def any_azure_trace(request: pytest.FixtureRequest, made_azure_trace: Path) -> Path:
    """Each available Azure trace, likewise."""
    return Path(TRACES or "") / "AzureLLMInferenceTrace_conv.csv" if request.param == "real" else made_azure_trace


@pytest.fixture
def made_burstgpt_trace(tmp_path: Path) -> Path:
    """A trace with the columns of the first release, without sessions."""
    path = tmp_path / "burstgpt.csv"
    path.write_text(MADE_BURSTGPT)
    return path


@pytest.fixture
def made_burstgpt_sessions(tmp_path: Path) -> Path:
    """A trace with the columns of the later release."""
    path = tmp_path / "burstgpt_sessions.csv"
    path.write_text(MADE_BURSTGPT_SESSIONS)
    return path


@pytest.fixture
def run_workloads() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m workloads` with these arguments in a new process."""

    def run(*arguments: str, hash_seed: str = "0", timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "workloads", *arguments],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
