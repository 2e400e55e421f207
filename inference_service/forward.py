"""One forward pass over sequences: their next tokens, and the log-probabilities that requests ask for."""

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from core.clock import Clock
from core.records import TokenLogprob
from inference_service.active_sequence import ActiveSequence, Piece
from inference_service.logprobs import sample_with_logprobs, token_logprobs
from inference_service.protocol import ModelRunner
from inference_service.sampling import BatchSampler, Sampled
from inference_service.stats import EngineStats

logger = logging.getLogger(__name__)

Outcome = int | Exception
"""The result of a pass for one sequence: the token that follows its piece, or the error."""


class NotFiniteError(Exception):
    """A sequence's logits are NaN or infinite."""


class ForwardPass:
    """Runs passes and samples from their logits. If a pass fails, one failing request fails alone."""

    def __init__(self, runner: ModelRunner, clock: Clock, stats: EngineStats, on_pass: Callable[[], None]) -> None:
        self._runner = runner
        self._clock = clock
        self._stats = stats
        self._on_pass = on_pass
        self._sampler = BatchSampler()

    def run(self, sequences: Sequence[ActiveSequence]) -> list[Outcome]:
        """Compute the piece of each sequence in one pass. If that fails, each is tried alone.

        All of them hold what was computed before anything is moved from row to row.
        Raises `torch.AcceleratorError`: nothing runs on the device in this process any more.
        """
        pieces = [sequence.piece for sequence in sequences]
        for sequence, piece in zip(sequences, pieces, strict=True):
            sequence.touched = piece.end
        failed: Exception | None = None
        try:
            tokens = self._choose_tokens(sequences, pieces, self._runner.forward(pieces))
            computed_ms = self._clock.wall_ms()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(sequences) > 1:
                logger.exception("a pass over %d sequences failed; each is tried alone", len(sequences))
            # Its frames hold the tensors of the pass, and the next passes need the memory.
            failed = error.with_traceback(None)
            self._stats.failed_passes += 1
        self._stats.passes += 1
        self._on_pass()
        if failed is not None:
            if isinstance(failed, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            return [failed] if len(sequences) == 1 else [self.run([sequence])[0] for sequence in sequences]
        for sequence, piece in zip(sequences, pieces, strict=True):
            sequence.held = piece.end
            sequence.computed_ms = computed_ms
        return [NotFiniteError() if token is None else token for token in tokens]

    def _choose_tokens(
        self, sequences: Sequence[ActiveSequence], pieces: Sequence[Piece], logits: torch.Tensor
    ) -> list[Sampled]:
        """The next token of each sequence out of a pass's logits, or why there is none; none if they are not finite.

        `logits` `[logit rows, vocabulary]`.
        """
        prompt_logprobs: list[list[TokenLogprob] | None] = [[]] * len(pieces)
        if any(piece.scored for piece in pieces):
            ends = list(accumulate(piece.logit_rows for piece in pieces))
            prompt_logprobs = [
                _prompt_logprobs(sequence, piece, logits[end - piece.logit_rows : end]) if piece.scored else []
                for sequence, piece, end in zip(sequences, pieces, ends, strict=True)
            ]
            logits = logits[[end - 1 for end in ends]]
        draws = [sequence.draw for sequence in sequences]
        asked = [sequence.request.logprobs if draw else None for sequence, draw in zip(sequences, draws, strict=True)]
        tokens, logprobs = sample_with_logprobs(self._sampler, logits, draws, asked)
        for sequence, logprob in zip(sequences, logprobs, strict=True):
            if logprob is not None:
                sequence.logprobs.append(logprob)
        for sequence, found in zip(sequences, prompt_logprobs, strict=True):
            sequence.prompt_logprobs += found or []
        return [None if found is None else token for token, found in zip(tokens, prompt_logprobs, strict=True)]


def _prompt_logprobs(sequence: ActiveSequence, piece: Piece, logits: torch.Tensor) -> list[TokenLogprob] | None:
    """Log-probabilities of the prompt tokens after each token of a piece; none where a logit is not finite.

    `logits` `[tokens of the piece, vocabulary]`.
    """
    tokens = sequence.prompt[piece.start + 1 : piece.end + 1]
    logits = logits[: len(tokens)]
    if not bool(logits.amax(-1).isfinite().all()):
        return None
    return token_logprobs(logits, tokens, [sequence.request.prompt_logprobs or 0] * len(tokens)) if tokens else []
