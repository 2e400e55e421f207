"""The simulated device: it replaces a model and its runner, and waits for as long as they would compute.

The engine is the normal one, so scheduling, batching, deadlines and admission are real. The time of a forward pass
comes from a device profile, and the answers are letters without meaning. Every result says `simulated` as name and
device.
"""

import string
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cache.protocol import ChunkShape
from core.clock import Clock, SystemClock
from core.errors import UserError
from inference_service.active_sequence import Piece, leading_rows
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.device_profile import DeviceProfile
from inference_service.engine import EngineSetting
from inference_service.generation_defaults import GenerationDefaults
from inference_service.prompt_encoder import PromptEncoder

if TYPE_CHECKING:
    from inference_service.grammar_compiler import Grammars

MOST_LATE_MS = 10.0
"""Maximum lateness of a wait that later waits make up for: a process that was stopped must not catch up at once."""

Wait = Callable[[float], None]
"""Waits for the given number of milliseconds."""


def sleep_ms(duration_ms: float) -> None:
    time.sleep(duration_ms / 1e3)


class Timeline:
    """Tracks when the device is busy.

    A sleep ends late, by a fraction of a millisecond or more on a busy machine, but the device would have been done in
    time. So the next pass begins earlier by this lateness. Between two passes of the host the device idles, as a real
    one does.
    """

    def __init__(self, clock: Clock, wait: Wait) -> None:
        self._clock = clock
        self._wait = wait
        self._late_ms = 0.0

    def spend(self, cost_ms: float) -> None:
        """Wait until a pass of `cost_ms` is done."""
        if cost_ms <= 0:
            return
        now_ms = self._clock.monotonic_ms()
        done_ms = now_ms - self._late_ms + cost_ms
        if done_ms > now_ms:
            self._wait(done_ms - now_ms)
        self._late_ms = min(MOST_LATE_MS, max(0.0, self._clock.monotonic_ms() - done_ms))


class NoRows:
    """Rows without memory: moving them costs nothing, and there is nothing in them to reuse."""

    def load_chunks(self, row: int, chunks: Sequence[torch.Tensor]) -> None:
        raise _nothing_to_reuse()

    def chunk_reader(self, row: int, tokens: int) -> Callable[[int, torch.Tensor], None]:
        raise _nothing_to_reuse()

    def is_finite(self, row: int, start: int, end: int) -> bool:
        return True

    def clear(self, row: int, start: int, end: int) -> None:
        pass

    def move_row(self, source: int, target: int, tokens: int) -> None:
        pass

    def swap_rows(self, one: int, one_tokens: int, other: int, other_tokens: int) -> None:
        pass


class SimulatedRunner:
    """Forward passes that only take time. The next token depends only on the one before it and its position."""

    def __init__(
        self, profile: DeviceProfile, rows: int, letters: Sequence[int], vocab: int, timeline: Timeline
    ) -> None:
        """`letters` are the token ids of answers; `vocab` is the width of the logits."""
        self.rows = rows
        self.pool = NoRows()
        self._profile = profile
        # One letter has probability 1, so that the answer is the same at every temperature.
        self._certain = torch.full((len(letters), vocab), -torch.inf)
        self._certain[torch.arange(len(letters)), torch.tensor(letters)] = 0.0
        self._timeline = timeline

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Take the time of the pieces in one pass; logits `[logit rows, vocabulary]`."""
        scored = [(piece, place) for piece in pieces for place in range(-piece.logit_rows, 0)]
        logits = self._logits(
            [piece.tokens[place] for piece, place in scored], [piece.end + place + 1 for piece, place in scored]
        )
        rows = leading_rows(pieces)
        spans = [(len(piece.tokens), piece.start) for piece in pieces[rows:]]
        self._timeline.spend(self._profile.pass_ms([piece.start for piece in pieces[:rows]], spans))
        return logits

    def _logits(self, before: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        choices = [31 * token + 17 * position for token, position in zip(before, positions, strict=True)]
        return self._certain[torch.tensor(choices) % len(self._certain)]


class SimulatedModel:
    """A model as the engine sees it, with only a shape and times."""

    def __init__(
        self,
        profile: DeviceProfile,
        slot: int,
        max_len: int,
        clock: Clock | None = None,
        wait: Wait = sleep_ms,
        *,
        allow_special_tokens: bool = False,
    ) -> None:
        """`max_len` is the maximum length of a sequence in tokens. `wait` and `clock` must use the same time."""
        self.profile = profile
        self.name = f"simulated-{profile.model}"
        self.device = f"simulated:{slot}"
        self.dtype: torch.dtype = getattr(torch, profile.dtype)
        self.max_len = max_len
        self.own_limit = "max_model_len of its profile" if max_len >= profile.max_model_len else None
        self.tokenizer: Any = byte_tokenizer()
        # There is no embedding table, so a prompt may have any token of the model or of the tokenizer.
        self.vocab_size = max(profile.vocab_size, len(self.tokenizer))
        self.eos_token_ids: frozenset[int] = frozenset()
        """Empty, so every answer has the requested length."""
        self.generation = GenerationDefaults()
        self.prompt_encoder = PromptEncoder(self.tokenizer, self.name, allow_special_tokens)
        self._timeline = Timeline(clock or SystemClock(), wait)

    @property
    def grammars(self) -> "Grammars":
        raise UserError("response_format: a simulated engine writes letters without meaning; leave it out")

    def chunk_shape(self, chunk_tokens: int) -> ChunkShape:
        profile = self.profile
        return ChunkShape(profile.layers, profile.kv_heads, chunk_tokens, profile.head_dim, self.dtype)

    def make_runner(self, rows: int, chunk_tokens: int) -> SimulatedRunner:
        # Answers are the tokenizer's text, so the logits have its width, whatever the model's vocabulary.
        letters = self.tokenizer(string.ascii_lowercase)["input_ids"]
        return SimulatedRunner(self.profile, rows, letters, len(self.tokenizer), self._timeline)

    def wait_for_device(self) -> None:
        """Do nothing: there are no copies to wait for."""


def make(config: EngineConfig, setting: EngineSetting) -> ContinuousEngine:
    """An engine on the simulated device of `config.profile`. Scheduler and requests are real; nothing is cached."""
    torch.set_num_threads(setting.threads)
    return ContinuousEngine(
        load_simulated(config, setting.slot),
        config,
        None,
        setting.chunk_tokens,
        setting.clock,
        name="simulated",
        on_begin=setting.on_begin,
        on_pass=setting.on_pass,
    )


def load_simulated(config: EngineConfig, slot: int = 0) -> SimulatedModel:
    """The device of `config.profile`, in slot `slot`. Raises `UserError` if the profile cannot be read."""
    if config.profile is None:
        raise UserError("--profile: missing for the simulated engine; name a file that benchmarks/engine.py wrote")
    profile = DeviceProfile.read(config.profile)
    max_len = min(config.max_model_len, profile.max_model_len)
    return SimulatedModel(profile, slot, max_len, allow_special_tokens=config.allow_special_tokens)


def _nothing_to_reuse() -> UserError:
    return UserError("cache: a simulated engine has no key/value tensors to reuse; add --no-cache")
