"""Another engine needs one module and one line in the registry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core.clock import SystemClock
from core.errors import UserError
from core.options import Parser, add_options, from_options
from inference_service.engine import Engine, EngineSetting
from inference_service.registry import ENGINES
from operators.config import JobConfig
from operators.envelope import Envelope, RecordPosition
from operators.slots.slot import InferenceSlot
from tests.operators.answers import response_of
from tests.operators.toy_engine import EchoEngine

ROOT = Path(__file__).parents[2]


def job(*options: str) -> JobConfig:
    parser = Parser(prog="job")
    add_options(parser, JobConfig)
    return from_options(JobConfig, parser.parse_args(options))


def envelope(number: int, prompt: str) -> Envelope:
    fields = {"request_id": f"r{number}", "session_id": "s", "user_id": "u", "max_new_tokens": 3, "created_at_ms": 0.0}
    position = RecordPosition("t", 0, number)
    return Envelope(0, json.dumps(fields | {"prompt": prompt}).encode(), position, SystemClock().wall_ms())


def test_a_new_engine_answers_in_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES.places, "echo", "tests.operators.toy_engine:make")
    slot = InferenceSlot(job("--engine", "echo", "--parallelism", "1"), 0, SystemClock())
    assert (slot.ready.engine, slot.ready.model) == ("echo", "none")
    answers = slot.answer([envelope(0, "hello"), envelope(1, "hi")])
    assert {one.record.request_id: response_of(one).text for one in answers} == {"r0": "hel", "r1": "hi"}
    assert slot.unfinished == 0
    slot.close()


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--engine: Input should be 'transformers' or 'simulated'"):
        job("--engine", "echo")


def test_it_fits_the_protocol() -> None:
    setting = EngineSetting(slot=0, threads=1, chunk_tokens=8, clock=SystemClock())
    engine: Engine = EchoEngine(setting)
    assert engine.unfinished == 0


def test_libraries_that_compute_are_imported_by_the_engine_that_needs_them() -> None:
    program = """
import sys
import inference_service.engine, inference_service.scheduler
assert "torch" not in sys.modules
import operators.slots.slot
assert "transformers" not in sys.modules
import inference_service.simulated
inference_service.simulated.byte_tokenizer()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
