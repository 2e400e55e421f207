"""A toy engine, which answers each request with its own prompt, one token per step."""

from core.records import Choice, FinishReason, Request, Sampling
from inference_service.completion import Completion, Failure, TokenEvent
from inference_service.config import EngineConfig
from inference_service.engine import EngineInfo, EngineSetting, TokenListener
from inference_service.stats import EngineStats


class EchoEngine:
    def __init__(self, setting: EngineSetting) -> None:
        self._setting = setting
        self._waiting: list[tuple[Request, float, TokenListener | None]] = []
        self.info = EngineInfo(engine="echo", model="none", device="none", dtype="none", chunk_bytes=0)

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(waiting=len(self._waiting))

    @property
    def waiting_since_ms(self) -> float | None:
        return min((arrived_ms for _, arrived_ms, _ in self._waiting), default=None)

    def submit(self, request: Request, arrived_ms: float, on_token: TokenListener | None = None) -> None:
        self._waiting.append((request, arrived_ms, on_token))

    def cancel(self, request: Request) -> bool:
        before = len(self._waiting)
        self._waiting = [entry for entry in self._waiting if entry[0] is not request]
        return len(self._waiting) < before

    def step(self) -> list[Completion | Failure]:
        if not self._waiting:
            return []
        request, arrived_ms, on_token = self._waiting.pop(0)
        self._setting.on_begin([request])
        text = (request.prompt or "")[: request.max_new_tokens]
        tokens = tuple(map(ord, text))
        if on_token is not None:
            for token in tokens:
                on_token(TokenEvent(request, 0, token, None, chr(token)))
        now_ms = self._setting.clock.wall_ms()
        self._setting.on_pass()
        choice = Choice(text=text, token_ids=tokens, finish_reason=FinishReason.LENGTH)
        return [
            Completion(
                request=request,
                choices=(choice,),
                prompt_logprobs=None,
                sampling=Sampling(),
                prompt_tokens=len(request.prompt or ""),
                local_tokens=0,
                remote_tokens=0,
                computed_tokens=len(request.prompt or ""),
                decode_steps=len(tokens) - 1,
                decode_rows=1.0,
                began_with=1,
                cache_capacity_chunks=0,
                cache_used_chunks=0,
                arrived_ms=arrived_ms,
                began_ms=now_ms,
                first_token_ms=now_ms,
                last_token_ms=now_ms,
                finished_ms=now_ms,
            )
        ]

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        pass


def make(config: EngineConfig, setting: EngineSetting) -> EchoEngine:
    return EchoEngine(setting)
