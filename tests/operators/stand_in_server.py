"""A slot's process with a stand-in engine that fails on demand."""

import builtins
import logging
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType

from core.clock import Clock
from core.errors import UserError
from core.records import Response
from inference_service.stats import EngineStats
from operators.config import JobConfig
from operators.envelope import Answer, Envelope, Ready, RecordPosition, SlotStats, WrittenResponse

logger = logging.getLogger("stand-in")
STEP_S = 0.002
AT_ONCE = " at once"


class StandInInferenceSlot:
    """Answers a request after one step per requested token. The prompt can cause a fault in the third step:

    `kill`, `stop`: the process is, by its signal; `tokenize`: it is killed before the request is in the queue;
    `stall`: the step never ends; `raise NAME`: the engine does. With ` at once` behind it, it happens in the first of
    them. What begins with `refuse` is refused; `log` is too, and an error is logged.
    A model named `broken` cannot be loaded, one named `refused` is the user's fault, `stalled` takes for ever, `killed`
    kills.
    """

    def __init__(
        self,
        config: JobConfig,
        slot: int,
        clock: Clock,
        on_begin: Callable[[Sequence[RecordPosition]], None] = lambda positions: None,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        logger.info("loading")
        if config.engine.model == "broken":
            raise OSError("disk lost")
        if config.engine.model == "refused":
            raise UserError("model: not this one")
        if config.engine.model == "stalled":
            time.sleep(3600)
        if config.engine.model == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        self._on_begin = on_begin
        self._on_pass = on_pass
        self._rows = config.engine.max_running
        self._steps = 0
        self._waiting: list[Envelope] = []
        self._running: dict[RecordPosition, tuple[Envelope, int]] = {}
        self.ready = Ready(
            slot=slot, device="cpu", engine="e", model="m", dtype="float32", threads=1, chunk_bytes=1, load_s=0.0
        )

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def stats(self) -> SlotStats:
        """Statistics that count the steps as passes."""
        engine = EngineStats(passes=self._steps, waiting=len(self._waiting), running=len(self._running))
        return SlotStats(engine, None, resident_bytes=1 << 20)

    def submit(self, envelope: Envelope) -> Answer | None:
        if envelope.request.prompt == "tokenize":
            os.kill(os.getpid(), signal.SIGKILL)
        if envelope.request.prompt == "log":
            try:
                raise TypeError("no prompt")
            except TypeError:
                logger.exception("request %r could not be tokenized", envelope.request.request_id)
            return envelope.unanswered("logged")
        if (envelope.request.prompt or "").startswith("refuse"):
            return envelope.unanswered("refused")
        self._waiting.append(envelope)
        return None

    def step(self) -> list[Answer]:
        time.sleep(STEP_S)
        self._steps += 1
        while self._waiting and len(self._running) < self._rows:
            envelope = self._waiting.pop(0)
            self._on_begin([envelope.position])
            self._running[envelope.position] = (envelope, 0)
        for position, (envelope, steps) in self._running.items():
            self._running[position] = (envelope, steps + 1)
            prompt = envelope.request.prompt or ""
            if steps == (0 if prompt.endswith(AT_ONCE) else 2):
                misbehave(prompt.removesuffix(AT_ONCE))
        self._on_pass()
        done = [envelope for envelope, steps in self._running.values() if steps >= envelope.request.max_new_tokens]
        for envelope in done:
            del self._running[envelope.position]
        return [Answer(envelope.position, WrittenResponse.of(response(envelope, self.ready.slot))) for envelope in done]

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        answers = [answer for envelope in batch if (answer := self.submit(envelope)) is not None]
        while self.unfinished:
            answers += self.step()
        return answers

    def close(self) -> None:
        pass


def misbehave(prompt: str) -> None:
    if prompt == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if prompt == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if prompt == "stall":
        time.sleep(3600)
    if prompt.startswith("raise "):
        raise getattr(builtins, prompt.removeprefix("raise "))("device lost")


def response(envelope: Envelope, slot: int) -> Response:
    """A response whose text is the id of the process."""
    request = envelope.request
    return Response(
        request_id=request.request_id,
        session_id=request.session_id,
        user_id=request.user_id,
        text=str(os.getpid()),
        token_ids=(1,) * request.max_new_tokens,
        finish_reason="length",
        slot=slot,
        device="cpu",
        engine="e",
        model="m",
        batch_id="b",
        batch_size=1,
        prompt_tokens=1,
        local_tokens=0,
        remote_tokens=0,
        computed_tokens=1,
        output_tokens=request.max_new_tokens,
        created_at_ms=request.created_at_ms,
        completed_at_ms=request.created_at_ms,
        wait_ms=0.0,
        ttft_ms=None,
        tpot_ms=None,
        inference_ms=0.0,
        e2e_ms=0.0,
        cache_capacity_chunks=0,
        cache_used_chunks=0,
        chunk_bytes=1,
    )


if __name__ == "__main__":
    # Replaces the module that would load libraries for seconds.
    sys.modules["operators.slots.slot"] = ModuleType("operators.slots.slot")
    sys.modules["operators.slots.slot"].InferenceSlot = StandInInferenceSlot  # type: ignore[attr-defined]
    runpy.run_module("operators.slots.server", run_name="__main__")
