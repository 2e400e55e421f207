"""One process of a baseline: it loads and warms up, reports that it is ready, and answers loads on command.

It writes JSON lines: `ready` once; `prepared` for each order that it reads; after `go`, `done` with its answers.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

import torch
from pydantic import Field

from benchmarks.report import device_facts, model_facts
from core.config import Config
from core.errors import exit_on_user_error
from core.options import Parser, add_options, from_options
from core.records import Request
from inference_service.config import EngineConfig
from inference_service.model import LoadedModel, load_model

GO, STOP = "go", "stop"

Answers = dict[str, list[int]]
"""Token ids by request id."""


class Order(Config):
    """One load: the requests themselves, or the topics from which they are read."""

    requests: tuple[Request, ...] = ()
    brokers: str = ""
    requests_topic: str = ""
    responses_topic: str = ""
    partitions: tuple[int, ...] = ()
    """Partitions of the requests topic that this process reads."""


class Done(Config):
    """The report of a process about a load that it has answered."""

    answers: Answers
    ended_s: float
    """Time of the last answer, on the clock that all processes of a machine share (`time.monotonic`)."""


class Baseline(Protocol):
    """A way to answer requests. One thread calls it."""

    def prepare(self, order: Order) -> None:
        """Do all that may happen before the clock starts."""
        ...

    def answer(self, stopped: Callable[[], bool]) -> Answers:
        """Answer the load. A load from topics lasts until `stopped` returns true."""
        ...

    def close(self) -> None:
        """End all threads that would keep the process alive."""
        ...


class WorkerConfig(Config):
    """Options of a baseline's process."""

    batch: int = Field(default=8, ge=1, le=1024, description="maximum number of requests that are answered together")
    zero_time: bool = Field(default=False, description="answer one token at once, without the model")
    engine: EngineConfig = EngineConfig()


def run_worker(name: str, make: Callable[[LoadedModel, WorkerConfig], Baseline]) -> None:
    """Run a baseline's module: read options, load the model, then answer orders until stdin ends."""
    exit_on_user_error(lambda: _run(name, make))


def _run(name: str, make: Callable[[LoadedModel, WorkerConfig], Baseline]) -> None:
    parser = Parser(prog=f"python -m benchmarks.baselines.{name}", description=__doc__)
    add_options(parser, WorkerConfig)
    config = from_options(WorkerConfig, parser.parse_args())
    # Libraries print to stdout; the benchmark must read only our lines.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        model = load_model(config.engine)
        baseline = make(model, config)
        try:
            serve(baseline, {"device": device_facts(model), "model": model_facts(model)}, sys.stdin, out)
        finally:
            baseline.close()


def serve(baseline: Baseline, facts: dict[str, Any], orders: TextIO, out: TextIO) -> None:
    """Answer one order after the other until `orders` ends. The first line contains `facts`."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    # A thread reads the input, so that a command that arrives while the baseline works is seen without blocking.
    threading.Thread(target=_read, args=(orders, lines), daemon=True).start()
    _say(out, "ready", facts=facts)
    while line := lines.get():
        baseline.prepare(Order.model_validate_json(line))
        _say(out, "prepared")
        if lines.get() != GO:
            return
        answers = baseline.answer(lambda: not lines.empty())
        ended_s = time.monotonic()
        # A load from topics was ended by STOP, which is not the next order.
        if not lines.empty() and lines.get() != STOP:
            return
        _say(out, "done", done=Done(answers=answers, ended_s=ended_s).model_dump())


def _read(orders: TextIO, lines: "queue.SimpleQueue[str]") -> None:
    for line in orders:
        lines.put(line.strip())
    lines.put("")


def _say(out: TextIO, word: str, **more: Any) -> None:
    out.write(json.dumps({"says": word, **more}) + "\n")
    out.flush()
