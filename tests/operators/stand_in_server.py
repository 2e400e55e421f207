"""A slot's process but for its engine, which is a stand-in: what a real one does seldom, it does when it is told to."""

import builtins
import logging
import runpy
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

from core.clock import Clock
from core.config import JobConfig
from operators.envelope import Answer, Envelope, Ready

logger = logging.getLogger("stand-in")


class StandInSlot:
    """Fails in its first step by the error that the job is named after; a group takes it for ever.

    A model named `broken` cannot be loaded.
    """

    def __init__(self, config: JobConfig, slot: int, clock: Clock) -> None:
        logger.info("loading")
        if config.engine.model == "broken":
            raise OSError("disk lost")
        self._error = config.job_name
        self.ready = Ready(slot=slot, device="cpu", engine="e", model="m", threads=1, chunk_bytes=1, load_s=0.0)
        self.unfinished = 0

    def submit(self, envelope: Envelope) -> None:
        self.unfinished += 1

    def step(self) -> list[Answer]:
        raise getattr(builtins, self._error)("device lost")

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        threading.Event().wait()
        return []

    def close(self) -> None:
        pass


if __name__ == "__main__":
    # In the place of the module that would load libraries for seconds.
    sys.modules["operators.slot"] = ModuleType("operators.slot")
    sys.modules["operators.slot"].InferenceSlot = StandInSlot  # type: ignore[attr-defined]
    runpy.run_module("operators.slot_server", run_name="__main__")
