"""Keyed state of one operator in a JSON file: the bytes that a release wrote, for tests of later releases."""

import base64
import json
from pathlib import Path
from typing import Any

from pyflink.common import Types
from pyflink.datastream import TimeDomain
from pyflink.fn_execution.beam.beam_coders import FlinkCoder
from pyflink.fn_execution.coders import from_type_info

from tests.operators.flink.snapshot import Snapshot
from tests.operators.flink.timers import Timer


def write(path: Path, snapshot: Snapshot) -> None:
    states = [
        {"name": name, "key": key, "content": _text(content)} for (name, key), content in snapshot.contents.items()
    ]
    timers = [[timer.timestamp, timer.key, timer.domain.name] for timer in snapshot.timers]
    path.write_text(json.dumps({"states": states, "timers": timers}, indent=1) + "\n")


def read(path: Path) -> Snapshot:
    saved = json.loads(path.read_text())
    contents = {(state["name"], state["key"]): _content(state["content"]) for state in saved["states"]}
    timers = tuple(Timer(timestamp, key, TimeDomain[domain]) for timestamp, key, domain in saved["timers"])
    return Snapshot(contents, timers)


def _text(content: Any) -> Any:
    """Encode bytes as base64, a tuple as a list, and a mapping as its pairs."""
    if isinstance(content, bytes):
        return base64.b64encode(content).decode()
    if isinstance(content, tuple):
        return [_text(one) for one in content]
    return {"pairs": [[_text(key), _text(value)] for key, value in content.items()]}


def _content(text: Any) -> Any:
    if isinstance(text, str):
        return base64.b64decode(text)
    if isinstance(text, list):
        return tuple(map(_content, text))
    return {_content(key): _content(value) for key, value in text["pairs"]}


def pickled(value: Any) -> bytes:
    """The bytes that PyFlink stores for a value of `Types.PICKLED_BYTE_ARRAY()`."""
    return bytes(FlinkCoder(from_type_info(Types.PICKLED_BYTE_ARRAY())).encode(value))
